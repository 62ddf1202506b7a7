"""Measures the loader of the trainer: images per second and core, requests per second, and opening a large manifest.

    python -m benchmarks.train_loader --cache .cache/corpus --out benchmarks/results/train_loader.json

Photographs of the demo's corpus as JPEGs of short side 375 (as ImageNet's are), in shards on the local disk. CPU
seconds of one core, child processes included, so that other work on the machine counts little; each figure in a process
of its own, start-up and compilation subtracted by a first batch. Beside it in the same run: decoding alone, and the
same recipe by torchvision's transforms on Pillow images. Requests are made of a filesystem that answers after 20 ms.
"""
# ruff: noqa: E402

import argparse
import io
import itertools
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation.schemas import MANIFEST
from demo import corpus as corpora
from demo.originals import candidates, shuffled
from embeddings.decoding import Decoder, decode
from training.data import DataConfig, batches
from training.data.chunks import ChunkReader, Lanes, chunks_of
from training.data.index import open_index
from training.data.packing import PackConfig, pack
from training.data.reading import Reader
from training.data.sampling import UniformOrder, WeightOrder, order_of

SIDE, QUALITY, IMAGES = 375, 90, 400
BATCH, WARM, COUNTED = 32, 1, 6
LATENCY_S = 0.02
INDEX_ROWS = 4_000_000


def cpu_seconds() -> float:
    """Of this process and of the children it has waited for."""
    uses = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def write_images(cache: Path, folder: Path) -> None:
    """A manifest of IMAGES photographs in shards of 100."""
    found = corpora.collect(cache, lambda text: None)
    images: list[bytes] = []
    for picture in shuffled(candidates(found), "train_loader"):
        try:
            image = Image.open(found.root / picture.path)
            if image.format != "JPEG" or min(image.size) < 300:
                continue
            scale = SIDE / min(image.size)
            small = image.convert("RGB").resize((round(image.width * scale), round(image.height * scale)))
        except OSError:
            continue
        if max(small.size) > 2 * SIDE:
            continue
        sink = io.BytesIO()
        small.save(sink, "JPEG", quality=QUALITY)
        images.append(sink.getvalue())
        if len(images) == IMAGES:
            break
    rows: list[dict[str, Any]] = []
    for at in range(0, len(images), 100):
        offset = 0
        for i, data in enumerate(images[at : at + 100], start=at):
            own = {"image_id": i, "source": "pool:a", "sources": ["balance"], "weight": 1.0}
            place = {"shard": f"{at:06d}.tar", "offset": offset, "length": len(data)}
            rows.append(dict.fromkeys(MANIFEST.names) | own | place)
            offset += len(data)
        (folder / f"{at:06d}.tar").write_bytes(b"".join(images[at : at + 100]))
    pq.write_table(pa.Table.from_pylist(rows, schema=MANIFEST), folder / "part-000000.parquet")


def bytes_of(folder: str) -> list[bytes]:
    index = open_index(folder, folder + "-index")
    reader = Reader(index, 8)
    found = [read.result() for read in reader.submit(range(len(index)))]
    reader.close()
    return found


def decoded(folder: str, in_child: bool) -> dict[str, Any]:
    """CPU milliseconds per image of decoding alone."""
    images = bytes_of(folder)
    if not in_child:
        decode(images[0])
        start = cpu_seconds()
        for data in images:
            decode(data)
        return {"ms_per_image": 1000 * (cpu_seconds() - start) / len(images)}
    spent = []
    for repeats in (1, 2):  # the child's start-up cancels out
        start = cpu_seconds()
        with Decoder() as decoder:
            for data in images * repeats:
                decoder.decode(data)
        spent.append(cpu_seconds() - start)
    return {"ms_per_image": 1000 * (spent[1] - spent[0]) / len(images)}


def loaded(folder: str) -> dict[str, Any]:
    """CPU milliseconds per image of the whole loader, in this process: reads, decoding, crops, masks, normalisation."""
    config = DataConfig(source=folder, index_folder=folder + "-index")
    spent = []
    for count in (WARM, WARM, WARM + COUNTED):
        start = cpu_seconds()
        stream = batches(config, seed=0, global_batch=BATCH, group_size=BATCH, patch_size=14)
        for _ in itertools.islice(stream, count):
            pass
        stream.close()  # type: ignore[attr-defined]
        spent.append(cpu_seconds() - start)
    return {"ms_per_image": 1000 * (spent[2] - spent[1]) / (COUNTED * BATCH)}


def reference(folder: str) -> dict[str, Any]:
    """The same recipe by torchvision on Pillow images, decoding in this process included."""
    import torch
    from torchvision import transforms as t
    from torchvision.transforms import InterpolationMode

    torch.set_num_threads(1)

    def crop(size: int, scale: tuple[float, float], blur: float, solarise: float) -> Any:
        steps = [
            t.RandomResizedCrop(size, scale, interpolation=InterpolationMode.BICUBIC),
            t.RandomHorizontalFlip(),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            t.RandomGrayscale(0.2),
            t.RandomApply([t.GaussianBlur(9, (0.1, 2.0))], blur),
            t.RandomSolarize(128, solarise),
            t.ToTensor(),
            t.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
        return t.Compose(steps)

    recipe = [crop(224, (0.32, 1), 0.0, 0.0), crop(224, (0.32, 1), 0.9, 0.2), *[crop(98, (0.05, 0.32), 0.5, 0.0)] * 8]
    images = bytes_of(folder)[: COUNTED * BATCH]
    for one in recipe:
        one(Image.open(io.BytesIO(images[0])).convert("RGB"))
    start = cpu_seconds()
    for data in images:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        for one in recipe:
            one(image)
    return {"ms_per_image": 1000 * (cpu_seconds() - start) / len(images)}


def requests(folder: str) -> list[dict[str, Any]]:
    """Reads by ranges with more and more in flight, then packed shards by chunks."""
    far = fsspec.filesystem("memory")
    answer = type(far).cat_file

    def late(self: Any, path: str, *arguments: Any, **options: Any) -> Any:
        time.sleep(LATENCY_S)
        return answer(self, path, *arguments, **options)

    type(far).cat_file = late
    for path in Path(folder).iterdir():
        far.pipe_file(f"/plain/{path.name}", path.read_bytes())
    index = open_index("memory://plain", folder + "-index")
    found = []
    for in_flight in (1, 8, 32, 128):
        reader = Reader(index, in_flight)
        wanted = UniformOrder(len(index), 0).rows(np.arange(min(len(index), 24 * in_flight)))
        start = time.perf_counter()
        for read in reader.submit(wanted.tolist()):
            read.result()
        seconds = time.perf_counter() - start
        reader.close()
        found.append(
            {
                "how": "range reads",
                "reads_in_flight": in_flight,
                "requests_per_second": round(reader.requests / seconds, 1),
                "images_per_second": round(len(wanted) / seconds, 1),
            }
        )
    packed = tempfile.mkdtemp()
    pack(PackConfig(folder, packed, 10_000_000, index_folder=folder + "-index"))
    for path in Path(packed).iterdir():
        far.pipe_file(f"/packed/{path.name}", path.read_bytes())
    index = open_index("memory://packed", folder + "-index")
    config, lanes = DataConfig(source="memory://packed", chunk_images=64, shuffle_chunks=2), Lanes(1, 32)
    order, spool = order_of(config, index, 0, lanes), tempfile.mkdtemp()
    reader = ChunkReader(index, 8, chunks_of(config, len(index), lanes), spool, 16)
    wanted = order.rows(np.arange(len(index)))
    start = time.perf_counter()
    for read in reader.submit(wanted.tolist()):
        read.result()
    seconds = time.perf_counter() - start
    reader.close()
    found.append(
        {
            "how": "packed shards, chunks of 64 images",
            "reads_in_flight": 8,
            "requests_per_second": round(reader.requests / seconds, 1),
            "images_per_second": round(len(wanted) / seconds, 1),
        }
    )
    return found


def opened(folder: str, rows: int) -> dict[str, Any]:
    """A manifest of many rows: its index made, opened again, and entered at random places."""
    per_part = rows // 8
    for part in range(8):
        ids = np.arange(part * per_part, (part + 1) * per_part)
        columns = {
            "image_id": pa.array(ids, pa.uint64()),
            "shard": pa.array([f"download/gen-0000/shards/part-{i:06d}.tar" for i in range(per_part // 10_000)])
            .take(pa.array(np.minimum(np.arange(per_part) // 10_000, per_part // 10_000 - 1)))
            .dictionary_encode(),
            "offset": pa.array(np.arange(per_part) % 10_000 * 60_000, pa.int64()),
            "length": pa.array(np.full(per_part, 50_000), pa.int64()),
            "weight": pa.array(np.random.default_rng(part).gamma(1, 1, per_part), pa.float32()),
        }
        pq.write_table(pa.table(columns), f"{folder}/part-{part:06d}.parquet", row_group_size=1 << 16)
    machine.forget_peak()
    start = time.perf_counter()
    index = open_index(folder, folder + "-index")
    build = time.perf_counter() - start
    build_peak = machine.peak_bytes()
    start = time.perf_counter()
    index = open_index(folder, folder + "-index")
    assert index.weights is not None
    order = WeightOrder(index.weights, 0)
    again = time.perf_counter() - start
    order.rows(np.arange(10))
    start = time.perf_counter()
    order.rows(np.random.default_rng(0).integers(0, 100 * rows, 20_000))
    return {
        "rows": rows,
        "first_open_s": round(build, 2),
        "first_open_peak_bytes": build_peak,
        "later_open_s": round(again, 3),
        "weighted_draws_per_second": round(20_000 / (time.perf_counter() - start)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="the demo's corpus")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "images"
        folder.mkdir()
        write_images(arguments.cache, folder)
        large = Path(scratch) / "large"
        large.mkdir()
        costs: dict[str, Any] = {}
        for name, function, own in (
            ("decoding alone", decoded, (str(folder), False)),
            ("decoding alone, in a child process", decoded, (str(folder), True)),
            ("loader", loaded, (str(folder),)),
            ("torchvision on Pillow images", reference, (str(folder),)),
        ):
            figure, cost = machine.measured(function, *own)
            ms = figure["ms_per_image"]
            costs[name] = {
                "cpu_ms_per_image": round(ms, 2),
                "images_per_second_per_core": round(1000 / ms, 1),
                "peak_bytes": cost.peak_bytes,
            }
        served, _ = machine.measured(requests, str(folder))
        index, _ = machine.measured(opened, str(large), INDEX_ROWS)
        length = round(float(np.mean([len(data) for data in bytes_of(str(folder))])))
    rate = {name: entry["images_per_second_per_core"] for name, entry in costs.items()}
    document = {
        "command": "python -m benchmarks.train_loader",
        "inputs": {
            "packages": [f"{p.name} {p.version}" for p in corpora.PACKAGES],
            "images": IMAGES,
            "short_side": SIDE,
            "jpeg_quality": QUALITY,
            "mean_bytes": length,
            "crops": "2 x 224, 8 x 98, blur 0 / 0.9 / 0.5",
            "batch": BATCH,
            "request_latency_s": LATENCY_S,
        },
        "machine": machine.facts(),
        "versions": machine.versions(("numpy", "pillow", "torch", "torchvision", "opencv-python-headless", "pyarrow")),
        "cost": costs,
        "loader_over_decoding_alone": round(rate["loader"] / rate["decoding alone"], 3),
        "loader_over_torchvision": round(rate["loader"] / rate["torchvision on Pillow images"], 2),
        "requests": served,
        "index": index,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
