"""`curate evaluate`, `curate export`, `curate pack`: what a model is worth, models for others, packed images."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from cli.terminal import handle_errors, print_result
from curation import storage
from curation.errors import UserError

EVALUATE_HELP = """Measure frozen features: k-NN, linear and logistic probes, retrieval, segmentation.

A model is the folder `model` of a checkpoint, a folder `checkpoints` (all of its steps), an exported or released
model, a name that `curate embed` knows, `random:FOLDER` (the shape of a checkpoint, untrained) or `pixels`. Labelled
images are a folder with one folder per class, or a run or manifest with labels; for segmentation a folder with images/
and masks/.

Example: curate evaluate runs/tiny/pretrain/checkpoints pixels mobilenet_v2 --train data/train --test data/test
"""
EXPORT_HELP = """Write a backbone for timm, for Hugging Face or as a checkpoint of ours; reads these, and Meta's.

timm: timm.create_model("local-dir:FOLDER", pretrained=True). hf: AutoModel.from_pretrained("FOLDER"). checkpoint: what
`curate embed --model checkpoint:FOLDER` takes.

Example: curate export runs/tiny/pretrain/checkpoints/step-000001000/model --layout hf --out exported
"""
PACK_HELP = """Rewrite the images of a manifest once, in permuted order, into large shards read from end to end.

The folder is a manifest itself: give it to `curate train --manifest`. Run the same command again to go on where it
stopped.

Example: curate pack runs/a --out s3://bucket/packed --shard-gigabytes 1
"""

ModelsArgument = Annotated[list[str], typer.Argument(help="models, see above")]
TrainOption = Annotated[str, typer.Option("--train", help="labelled images to learn from")]
TestOption = Annotated[str, typer.Option("--test", help="labelled images to be told; --train again: leave one out")]
ProbesOption = Annotated[str, typer.Option("--probes", help="of knn, logistic, linear, retrieval, segmentation")]
WorkersOption = Annotated[int, typer.Option("--workers", min=0, help="processes that decode; 0: this one")]
SeedOption = Annotated[int, typer.Option("--seed", min=0, help="of every random choice")]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("evaluate", help=EVALUATE_HELP)(evaluate)
    app.command("export", help=EXPORT_HELP)(export)
    app.command("pack", help=PACK_HELP)(pack)


def evaluate(
    models: ModelsArgument,
    train: TrainOption,
    test: TestOption,
    probes: ProbesOption = "knn",
    out: Annotated[str | None, typer.Option("--out", help="JSON file for the figures")] = None,
    plot: Annotated[str | None, typer.Option("--plot", help="SVG file: k-NN over the steps of the checkpoints")] = None,
    size: Annotated[int | None, typer.Option("--size", min=8, help="pixels, for our backbones")] = None,
    workers: WorkersOption = 0,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """See EVALUATE_HELP."""
    names = tuple(name.strip() for name in probes.split(",") if name.strip())
    handle_errors(lambda: _evaluate(models, train, test, names, out, plot, size, workers, seed, as_json))


def export(
    model: Annotated[str, typer.Argument(help="folder or file of a backbone, in any layout")],
    out: Annotated[str, typer.Option("--out", help="folder to write")],
    layout: Annotated[str, typer.Option("--layout", help="timm, hf or checkpoint")] = "checkpoint",
    student: Annotated[bool, typer.Option("--student", help="the student, in place of the average")] = False,
    as_json: JsonOption = False,
) -> None:
    """See EXPORT_HELP."""
    handle_errors(lambda: _export(model, out, layout, student, as_json))


def pack(
    manifest: Annotated[str, typer.Argument(help="run, manifest or folder of images")],
    out: Annotated[str, typer.Option("--out", help="folder or URL for the shards")],
    shard_gigabytes: Annotated[float, typer.Option("--shard-gigabytes", min=0.0001, help="of a shard, about")] = 1.0,
    sampling: Annotated[
        str, typer.Option("--sampling", help="uniform: each image once; weight: as often as its weight says")
    ] = "uniform",
    reads_in_flight: Annotated[int, typer.Option("--reads-in-flight", min=1, help="reads kept under way")] = 64,
    seed: SeedOption = 0,
    as_json: JsonOption = False,
) -> None:
    """See PACK_HELP."""
    handle_errors(lambda: _pack(manifest, out, shard_gigabytes, sampling, reads_in_flight, seed, as_json))


def _evaluate(
    models: list[str],
    train: str,
    test: str,
    probes: tuple[str, ...],
    out: str | None,
    plot: str | None,
    size: int | None,
    workers: int,
    seed: int,
    as_json: bool,
) -> None:
    from embeddings.models.registry import best_device
    from training import evaluation

    device = best_device()
    results: list[dict[str, Any]] = []
    for name, step, path in _expanded(models):
        task = evaluation.Task(_encoder(path, size, device), train, test, seed=seed, workers=workers, device=device)
        results.append({"model": name, "step": step, **evaluation.evaluate(task, probes)})
    document = {"train": train, "test": test, "seed": seed, "results": results}
    text = json.dumps(document, indent=1) + "\n"
    if out is not None:
        storage.write_whole(out, text.encode())
    if plot is not None:
        storage.write_whole(plot, _drawn(results).encode())
    lines = [f"{r['model']}: {_said(r)}" for r in results]
    print_result(document, lines, as_json)


def _expanded(models: list[str]) -> list[tuple[str, int | None, str]]:
    """(name, step, what to load) of each model; a folder of checkpoints stands for its steps."""
    found: list[tuple[str, int | None, str]] = []
    for name in models:
        folder = Path(name)
        steps = sorted(path for path in folder.glob("step-*/model") if path.is_dir()) if folder.is_dir() else []
        found += [(f"{name.rstrip('/')}/{path.parent.name}", int(path.parent.name[5:]), str(path)) for path in steps]
        if not steps:
            found.append((name, None, name))
    return found


def _encoder(name: str, size: int | None, device: str) -> Any:
    from embeddings.models import registry
    from training import evaluation
    from training.export import read
    from training.model import VisionTransformer

    if name == "pixels":
        return evaluation.PixelEncoder()
    folder = name.removeprefix("random:").removeprefix("checkpoint:")
    if not Path(folder).exists() and not name.startswith("random:"):
        return registry.load(name, device)
    backbone, settings = read(folder)
    if name.startswith("random:"):
        import torch

        torch.manual_seed(0)
        backbone = VisionTransformer(backbone.config).eval()
    return evaluation.BackboneEncoder(
        backbone.to(device),
        size=size or int(settings["size"]),
        resize=None if size else int(settings["resize"]),
        mean=settings["mean"],
        std=settings["std"],
        device=device,
    )


def _said(result: dict[str, Any]) -> str:
    """The figures of one model on one line."""
    figures = []
    for probe, found in result.items():
        for name, value in found.items() if isinstance(found, dict) else ():
            if isinstance(value, dict) and "low" in value:
                figures.append(f"{probe} {name} {value['value']:.3f} ({value['low']:.3f} to {value['high']:.3f})")
            elif name == "miou":
                figures.append(f"{probe} {name} {value:.3f}")
    return ", ".join(figures)


def _drawn(results: list[dict[str, Any]]) -> str:
    from training.evaluation.plot import over_training

    with_knn = [result for result in results if "knn" in result]
    if not with_knn:
        raise UserError("--plot draws the k-NN accuracy; add knn to --probes")
    series: dict[str, list[tuple[float, float, float, float]]] = {}
    levels: dict[str, float] = {}
    for result in with_knn:
        figure = result["knn"]["accuracy_k10"]
        if result["step"] is None:
            levels[result["model"]] = figure["value"]
        else:
            name = result["model"].rsplit("/", 1)[0]
            series.setdefault(name, []).append((result["step"], figure["value"], figure["low"], figure["high"]))
    return over_training(series, levels, "k-NN accuracy (k = 10) over training, 95 % intervals")


def _export(model: str, out: str, layout: str, student: bool, as_json: bool) -> None:
    from training import export as exporting

    backbone, settings = exporting.read(model, student=student)
    about = exporting.write(backbone, settings, layout, out)
    lines = [f"{out}: {about['parameters']:,} parameters in the layout `{layout}`"]
    if not about["exact_at_other_sizes"]:
        lines.append(
            f"at {about['image_size']} pixels it gives the same tokens; at other sizes that library interpolates "
            f"positions in another way than this model ({about['position_interpolation']})"
        )
    print_result(about, lines, as_json)


def _pack(
    manifest: str, out: str, shard_gigabytes: float, sampling: str, reads_in_flight: int, seed: int, as_json: bool
) -> None:
    from training.data.packing import PackConfig
    from training.data.packing import pack as pack_images

    if sampling not in ("uniform", "weight"):
        raise UserError(f"--sampling {sampling}: uniform or weight")
    config = PackConfig(manifest, out, int(shard_gigabytes * 1e9), sampling, reads_in_flight, seed)
    about = pack_images(config)
    lines = [
        f"{out}: {about['images']:,} images in {about['shards']:,} shards, {about['bytes']:,} bytes"
        + (f"; {about['left_out']:,} could not be read" if about["left_out"] else "")
    ]
    print_result(about, lines, as_json)
