"""`curate train` and `curate distill`: from a manifest to features."""

import os
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from cli.terminal import console, handle_errors, print_result
from cli.training_display import TrainingDisplay
from curation.errors import UserError

TRAIN_HELP = """Train a DINOv2 on the images of a run, a manifest, packed shards or a folder.

The configuration says everything; options and --set change single values of it. Without a GPU it runs on the CPU; on
several processes start it with torchrun, or with --launcher ray. Run the same command again to go on where it stopped.

Example: curate train --config tiny --manifest demo-run --out runs/tiny

Example: torchrun --nproc-per-node 8 -m cli.main train --config vit-l14 --manifest runs/lvd142m --out runs/vit-l14

Example: curate train --config vit-b14-1gpu --manifest runs/a --out runs/b --set schedule.learning_rate=1e-3
"""
DISTILL_HELP = """Train one or several students from a frozen teacher, whose pass they share.

Example: curate distill --config distill --teacher runs/g/pretrain/checkpoints/step-000625000/model --manifest runs/a
"""

ConfigOption = Annotated[
    str, typer.Option("--config", help="YAML file, or the name of a shipped one: tiny, vit-s14-1gpu, vit-l14, ...")
]
ManifestOption = Annotated[
    str | None,
    typer.Option("--manifest", help="run, manifest, packed shards or folder of images [data.source]"),
]
OutOption = Annotated[str | None, typer.Option("--out", help="folder for checkpoints and logs [output]")]
StepsOption = Annotated[
    int | None, typer.Option("--steps", min=1, help="updates; the schedule is compressed into them")
]
BatchOption = Annotated[int | None, typer.Option("--batch-size", min=2, help="images of an update [batch_size]")]
SeedOption = Annotated[int | None, typer.Option("--seed", min=0, help="of every random choice [seed]")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="any other value, e.g. losses.koleo_weight=0")
]
LauncherOption = Annotated[
    str, typer.Option("--launcher", help="local: this process, or torchrun's; ray: workers of Ray Train")
]
ProcessesOption = Annotated[int, typer.Option("--processes", min=1, help="with --launcher ray: workers, one GPU each")]
RayOption = Annotated[
    str | None,
    typer.Option(
        "--ray-address", help="with --launcher ray: cluster to join; http://... submits the training as a job"
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("train", help=TRAIN_HELP)(train)
    app.command("distill", help=DISTILL_HELP)(distill)


def train(
    config: ConfigOption,
    manifest: ManifestOption = None,
    out: OutOption = None,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = None,
    values: SetOption = None,
    launcher: LauncherOption = "local",
    processes: ProcessesOption = 1,
    ray_address: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """See TRAIN_HELP."""
    given = {"steps": steps, "batch_size": batch_size, "seed": seed, "output": out, "data.source": manifest}
    handle_errors(lambda: _train("train", config, given, values, launcher, processes, ray_address, as_json))


def distill(
    config: ConfigOption = "distill",
    teacher: Annotated[
        str | None, typer.Option("--teacher", help="folder `model` of the teacher's checkpoint [distill.teacher]")
    ] = None,
    manifest: ManifestOption = None,
    out: OutOption = None,
    steps: StepsOption = None,
    batch_size: BatchOption = None,
    seed: SeedOption = None,
    values: SetOption = None,
    launcher: LauncherOption = "local",
    processes: ProcessesOption = 1,
    ray_address: RayOption = None,
    as_json: JsonOption = False,
) -> None:
    """See DISTILL_HELP."""
    given = {"steps": steps, "batch_size": batch_size, "seed": seed, "output": out, "data.source": manifest}
    given["distill.teacher"] = teacher
    handle_errors(lambda: _train("distill", config, given, values, launcher, processes, ray_address, as_json))


def _train(
    command: Literal["train", "distill"],
    path: str,
    given: dict[str, Any],
    values: list[str] | None,
    launcher: str,
    processes: int,
    ray_address: str | None,
    as_json: bool,
) -> None:
    document = {name: value for name, value in given.items() if value is not None} | _set_values(values or [])
    config = read(path, document)
    from training.config import stages

    distils = [stage.distill is not None for _, stage in stages(config)]
    if command == "distill" and not any(distils):
        raise UserError(f"{path}: has no block `distill` with a teacher and students; `curate train` trains without")
    if command == "train" and all(distils):
        raise UserError(f"{path}: is a distillation; `curate distill` runs it")
    if launcher == "ray":
        from pipelines import launch

        if ray_address is not None and ray_address.startswith("http"):
            job = launch.submit(config, command, processes, ray_address)
            print_result(
                {"job": job}, [f"submitted {job}: curate submit --logs {job} --address {ray_address}"], as_json
            )
            return
        with TrainingDisplay(quiet=as_json) as display:
            result = launch.train(config, processes, ray_address, display)
    elif launcher == "local":
        from training.loop import train as run

        first = os.environ.get("RANK", "0") == "0"
        with TrainingDisplay(quiet=as_json or not first) as display:
            result = run(config, display)
        if not first:
            return
    else:
        raise UserError(f"--launcher {launcher}: there are local and ray")
    if result.stopped:
        console.print(f"stopped after step {result.step} of {result.steps}; run the same command again to go on")
        raise typer.Exit(143)
    lines = [f"{result.stage}: {result.step} steps in {result.folder}"]
    lines += [f"  weights: {folder} (curate embed --model checkpoint:{folder})" for folder in result.models]
    print_result(vars(result), lines, as_json)


def read(path: str, changes: dict[str, Any]) -> Any:
    """The training of a YAML with changes by dotted name. Raises UserError that names the key and the line."""
    from pipelines import configuration
    from training.config import TrainConfig, compressed

    place = _place(path)
    document, text = configuration.read_mapping(str(place))
    nested: dict[str, Any] = {}
    for name, value in changes.items():
        *above, last = name.split(".")
        at = nested
        for part in above:
            at = at.setdefault(part, {})
            if not isinstance(at, dict):
                raise UserError(f"{name}: stands beside a value for {part} itself")
        at[last] = value
    configuration.check(TrainConfig, {"data": {"source": "?"}} | document, str(place), configuration.lines_of(text))
    where = f"{place} with the options given" if changes else str(place)
    return configuration.check(TrainConfig, compressed(document, nested), where)


def _place(name: str) -> Path:
    """A file, or one that is shipped."""
    if Path(name).is_file():
        return Path(name)
    folder = Path(__file__).parent / "configs" / "train"
    shipped = folder / f"{name}.yaml"
    if "/" not in name and shipped.is_file():
        return shipped
    names = ", ".join(sorted(path.stem for path in folder.glob("*.yaml")))
    raise UserError(f"--config {name}: no such file; shipped are {names}")


def _set_values(pairs: list[str]) -> dict[str, Any]:
    """By dotted name; values are read as YAML, and 1e-3 is a number."""
    import yaml

    found: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise UserError(f"--set {pair}: expected KEY=VALUE, e.g. schedule.learning_rate=1e-3")
        try:
            found[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"--set {pair}: {text} is not a YAML value") from error
        if isinstance(found[name], str):
            try:
                found[name] = float(found[name])
            except ValueError:
                continue
    return found
