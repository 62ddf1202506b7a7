"""Measures `curate report` on made-up runs of growing size: time, memory, and what the folder takes.

    python -m benchmarks.report_scale --rows 100000 1000000 3000000 --out benchmarks/results/report_scale.json

The tables are those of a finished run, with URLs of 5,000 hosts, losses, scores, near-duplicates in components up to
thousands of images, leaks, three levels of clusters with centroids, ten seed sets, a balanced sample and a manifest;
only the pictures are few, which many rows share. Everything runs in one process of its own on one thread, sheets of
thumbnails included, so that its peak is that of the driver and a worker together.
"""

# ruff: noqa: E402
import argparse
import io
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import numpy as np
import pyarrow as pa

from curation import storage
from curation.schemas import (
    BALANCE,
    DUPLICATES,
    EDGES,
    IMAGES,
    MIX,
    RETRIEVAL,
    centroids_schema,
    clusters_schema,
    image_id,
)
from pipelines.context import Context, Outcome
from pipelines.run_directory import Fingerprint, Generation, RunDirectory, Source

PART_ROWS = 1 << 17
HOSTS, PICTURES, SEED_SETS, SEEDS = 5000, 512, 10, 100
LEVELS, DIMENSION = (2000, 200, 20), 256
FILTER = {"nsfw_threshold": 0.9, "solid_colour": 4.0, "min_side": 64, "aspect_ratio": 3.0}
DEDUP = {"threshold": 0.6, "against_threshold": 0.45}
VERSIONS = ("pyarrow", "numpy", "pillow", "jinja2")


class Here(Context):
    """A stage's surroundings without Ray: what would be tasks is done in this process, one after the other."""

    def spread(self, function: Any, calls: Iterable[tuple[str, Any]], *, shared: Any = None, **_: Any) -> Iterator[Any]:
        for name, arguments in calls:
            yield name, function(*arguments, shared)


def main() -> None:
    """Measure each size in a process of its own and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 3_000_000])
    parser.add_argument("--folder", type=Path, help="where the runs are made; default: a temporary folder, removed")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/report_scale.json"))
    arguments = parser.parse_args()
    document: dict[str, Any] = {"program": "benchmarks/report_scale.py", "versions": machine.versions(VERSIONS)}
    document["runs"] = []
    for rows in arguments.rows:
        folder = arguments.folder or Path(tempfile.mkdtemp(prefix="report-scale-"))
        root = str(folder / f"run-{rows}")
        if not Path(root).exists():
            machine.measured(build, root, rows)
        summary, cost = machine.measured(make_report, root)
        document["runs"].append({"rows": rows, **summary, **asdict(cost)})
        print(json.dumps(document["runs"][-1]))
        if arguments.folder is None:
            shutil.rmtree(folder)
    document["machine"] = machine.facts()
    storage.write_whole(str(arguments.out), (json.dumps(document, indent=1) + "\n").encode())


def make_report(root: str) -> dict[str, Any]:
    """The pages of a run; returns the stage's summary, with the largest page and what there is of tables."""
    from pipelines.stages import report

    context = Here(RunDirectory(root))
    summary = report.execute(replace(context, rebuild=True), report.ReportConfig()).summary
    pages = list(Path(root, "report").glob("*.html"))
    tables = sum(p.stat().st_size for p in Path(root).rglob("*.parquet"))
    return {**summary, "largest_page": max(p.stat().st_size for p in pages), "table_bytes": tables}


def build(root: str, rows: int) -> None:
    """A finished run of so many pool rows, from the URL list to the manifest."""
    run, rng = RunDirectory(root), np.random.default_rng(rows)
    names = ["pool:web", *(f"seed:set-{n:02d}" for n in range(SEED_SETS)), "reference:evaluation"]
    counts = [rows, *[SEEDS] * SEED_SETS, 1000]
    for number, (name, count) in enumerate(zip(names, counts, strict=True)):
        stage = "download" if number == 0 else "import"
        run.register(Source(number, name, "urls", f"/lists/{number}", count, f"d{number}", stage, max(0, number - 1)))
    offsets, lengths = _pictures(root)
    kept: list[np.ndarray] = []
    sequence = [
        (number, name, start, min(start + PART_ROWS, count))
        for number, (name, count) in enumerate(zip(names, counts, strict=True))
        for start in range(0, count, PART_ROWS)
    ]
    stages = {
        name: _Stage(run, name, options)
        for name, options in {
            "download": {},
            "import": {},
            "filter": FILTER,
            "dedup": DEDUP,
            "cluster": {"levels": list(LEVELS)},
        }.items()
    }
    for number, name, start, stop in sequence:
        part = f"part-{number:03d}-{start // PART_ROWS:06d}"
        ids = np.arange(start, stop, dtype=np.uint64) + np.uint64(image_id(number, 0))
        fetched, filtered = _images(rng, name, ids, offsets, lengths)
        stages["download" if number == 0 else "import"].add(part, fetched)
        stages["filter"].add(part, filtered)
        if number:
            continue
        usable = ids[np.asarray(filtered["status"].to_numpy(zero_copy_only=False) == "ok")]
        duplicates, edges, stays = _duplicates(rng, usable)
        stages["dedup"].add(part, duplicates)
        stages["dedup"].edges.append(edges)
        stages["cluster"].add(part, _clusters(rng, stays))
        kept.append(stays)
    stages["dedup"].file("self_forest/part-00000.parquet", storage.table_bytes(pa.concat_tables(stages["dedup"].edges)))
    recall = {"self": {"recall": 0.994, "recall_low": 0.991, "recall_high": 0.996, "recall_asked": 0.99}}
    stages["dedup"].file("recall.json", json.dumps(recall).encode())
    for level, count in enumerate(LEVELS, 1):
        stages["cluster"].file(f"centroids/level-{level}.parquet", storage.table_bytes(_centroids(rng, level, count)))
    for stage in stages.values():
        stage.finish()
    _choose(run, rng, np.concatenate(kept), names)


class _Stage:
    """A stage's only generation, part by part."""

    def __init__(self, run: RunDirectory, name: str, options: Mapping[str, Any]) -> None:
        self.directory = run.stage(name)
        fingerprint = Fingerprint(name, 1, {"seed": 0, **options}, {}, {})
        self.generation = Generation(0, self.directory.generation_directory(0), fingerprint, {})
        self.edges: list[pa.Table] = []

    def add(self, part: str, table: pa.Table) -> None:
        self.generation.parts.append(self.generation.writer.write(part, table))

    def file(self, name: str, data: bytes) -> None:
        self.generation.put_file(name, data)

    def finish(self) -> None:
        self.generation.complete = True
        self.directory.save(self.generation)


def _pictures(root: str) -> tuple[np.ndarray, np.ndarray]:
    """A shard of JPEGs of 200 x 150 pixels that compress like photographs; returns their offsets and lengths."""
    from PIL import Image

    blob, offsets, lengths = bytearray(), [], []
    for number in range(PICTURES):
        rng = np.random.default_rng([7, number])
        coarse = rng.integers(0, 255, (12, 16, 3), dtype=np.uint8)
        pixels = np.asarray(Image.fromarray(coarse).resize((200, 150), Image.Resampling.BICUBIC), np.float64)
        pixels = np.clip(pixels + rng.normal(0, 10, pixels.shape), 0, 255).astype(np.uint8)
        sink = io.BytesIO()
        Image.fromarray(pixels).save(sink, "JPEG", quality=85)
        offsets.append(len(blob))
        lengths.append(sink.tell())
        blob += sink.getvalue()
    storage.write_whole(storage.join(root, "download/gen-0000/shards/part-000-000000.tar"), bytes(blob))
    return np.array(offsets), np.array(lengths)


def _images(
    rng: np.random.Generator, name: str, ids: np.ndarray, offsets: np.ndarray, lengths: np.ndarray
) -> tuple[pa.Table, pa.Table]:
    """Rows of IMAGES as fetched and as filtered."""
    n = len(ids)
    draw = rng.random(n) if name == "pool:web" else np.ones(n)
    lost = np.select([draw < 0.06, draw < 0.09, draw < 0.11], ["http_404", "not_an_image", "timeout: 10 s"], "")
    fetched = np.select([draw < 0.09, draw < 0.11], ["failed", "transient"], "ok")
    fails = fetched != "ok"
    dropped = (draw > 0.9) & (draw < 1)
    reason = np.where(draw > 0.95, "duplicate_pixels", np.where(draw > 0.92, "too_small", "nsfw: 0.97"))
    hosts = (HOSTS * rng.random(n) ** 3).astype(int)
    numbers = ids & np.uint64((1 << 40) - 1)
    urls = [f"http://host-{h}.example/pictures/{i}.jpg" for h, i in zip(hosts.tolist(), numbers.tolist(), strict=True)]
    at = rng.integers(0, PICTURES, n)
    digest = pa.array([int(i).to_bytes(32, "big") for i in ids.tolist()], pa.binary(32))
    faces = pa.ListArray.from_arrays(
        pa.array(np.zeros(n + 1, np.int32)), pa.array([], IMAGES.field("faces").type.value_type)
    )
    columns: dict[str, Any] = {
        "image_id": ids,
        "source": pa.array(np.full(n, name)),
        "url": pa.array(urls),
        **dict.fromkeys(("sha256", "stored_sha256", "pixel_sha256"), digest),
        "pca_hash": rng.integers(0, 2**63, n).astype(np.uint64),
        **dict.fromkeys(("width", "original_width"), pa.array(rng.integers(40, 2000, n), pa.int32(), mask=fails)),
        **dict.fromkeys(("height", "original_height"), pa.array(rng.integers(40, 2000, n), pa.int32(), mask=fails)),
        "shard": pa.array(np.full(n, "download/gen-0000/shards/part-000-000000.tar"), mask=fails),
        "offset": pa.array(offsets[at], mask=fails),
        "length": pa.array(lengths[at], mask=fails),
        "duplicate_of": pa.array(ids - np.uint64(1), mask=~(dropped & (draw > 0.95)) | (ids == ids[0])),
        "nsfw": pa.array(rng.beta(0.3, 3, n).astype(np.float32), mask=fails),
        "faces": faces,
        "faces_blurred": pa.array(np.zeros(n, bool)),
        "contrast": pa.array(rng.gamma(6, 7, n).astype(np.float32), mask=fails),
        "label": pa.array(np.char.add("class-", rng.integers(0, 100, n).astype(str)), mask=rng.random(n) > 0.2),
        "caption": pa.array([f"a picture of thing {h}" for h in hosts.tolist()]),
    }
    before = {"status": pa.array(fetched), "error": pa.array(lost, mask=~fails)}
    after = {
        "status": pa.array(np.where(dropped, "dropped", fetched)),
        "error": pa.array(np.where(dropped, reason, lost), mask=~(fails | dropped)),
    }
    return _table(columns | before, IMAGES), _table(columns | after, IMAGES)


def _table(columns: Mapping[str, Any], schema: pa.Schema) -> pa.Table:
    return pa.table(
        [
            pa.array(columns[f.name], f.type)
            if isinstance(columns[f.name], np.ndarray)
            else columns[f.name].cast(f.type)
            for f in schema
        ],
        schema=schema,
    )


def _duplicates(rng: np.random.Generator, ids: np.ndarray) -> tuple[pa.Table, pa.Table, np.ndarray]:
    """DUPLICATES of a part, its forest, and who stays: a third lies in components, whose sizes have a long tail."""
    sizes = np.minimum(np.ceil(rng.pareto(1.3, len(ids)) + 1).astype(int), 4000)
    ends = np.cumsum(np.where(rng.random(len(ids)) < 0.8, 1, sizes))
    group = np.searchsorted(ends, np.arange(len(ids)), side="right")
    first = np.searchsorted(group, group)
    copy = first != np.arange(len(ids))
    similarity = rng.uniform(0.45, 1, len(ids)).astype(np.float32)
    similarity = np.where(copy, np.maximum(similarity, np.float32(0.601)), np.minimum(similarity, np.float32(0.6)))
    nearest = ids[np.where(copy, first, np.maximum(1, np.arange(len(ids))) - 1)]
    hit = ~copy & (rng.random(len(ids)) < 0.002)
    value = pa.StructArray.from_arrays(
        [
            pa.array(np.full(hit.sum(), "evaluation")),
            pa.array(rng.integers(0, 1000, hit.sum()).astype(np.uint64) + np.uint64(image_id(SEED_SETS + 1, 0))),
            pa.array(rng.uniform(0.45, 1, hit.sum()).astype(np.float32)),
        ],
        names=["reference_set", "reference_id", "similarity"],
    )
    references = pa.ListArray.from_arrays(pa.array(np.r_[0, np.cumsum(hit)].astype(np.int32)), value)
    stays = ~copy & ~hit
    columns = {
        "image_id": ids,
        "component_id": ids[first],
        "kept": pa.array(stays),
        "reason": pa.array(np.where(hit, "reference", np.where(copy, "self", "kept"))),
        "nearest_id": pa.array(nearest, mask=~copy & (rng.random(len(ids)) < 0.5)),
        "similarity": pa.array(similarity),
        "reference_component_id": ids,
        "references": references,
    }
    edges = {
        "low_space": np.zeros(copy.sum(), np.uint8),
        "low": ids[first[copy]],
        "high_space": np.zeros(copy.sum(), np.uint8),
        "high": ids[copy],
        "similarity": similarity[copy],
    }
    return _table(columns, DUPLICATES), _table(edges, EDGES), ids[stays]


def _path(leaf: np.ndarray) -> list[np.ndarray]:
    """Clusters of every level of these leaves."""
    return [(leaf * count // LEVELS[0]).astype(np.int32) for count in LEVELS]


def _clusters(rng: np.random.Generator, ids: np.ndarray) -> pa.Table:
    leaf = (LEVELS[0] * rng.random(len(ids)) ** 2).astype(np.int64)
    levels = {f"cluster_{k}": found for k, found in enumerate(_path(leaf), 1)}
    distance = rng.gamma(9, 0.08, len(ids)).astype(np.float32)
    return _table({"image_id": ids, **levels, "distance": distance}, clusters_schema(len(LEVELS)))


def _centroids(rng: np.random.Generator, level: int, count: int) -> pa.Table:
    places = np.linspace(0, 6, count)[:, None] * rng.normal(size=(1, DIMENSION))
    vectors = (np.sin(places) + rng.normal(0, 0.3, (count, DIMENSION))).astype(np.float32)
    above = LEVELS[level] if level < len(LEVELS) else 0
    parent = pa.array(np.arange(count) * above // count, pa.int32(), mask=np.full(count, above == 0))
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), DIMENSION)
    columns = {"cluster": np.arange(count, dtype=np.int32), "parent": parent}
    columns |= {"size": np.ones(count, np.int64), "centroid": vectors}
    return _table(columns, centroids_schema(DIMENSION))


def _choose(run: RunDirectory, rng: np.random.Generator, kept: np.ndarray, names: Sequence[str]) -> None:
    """Retrieval, balance and mix of what stays, and the manifest by its own stage."""
    from pipelines.stages import manifest

    each = max(4, len(kept) // 10 // (SEED_SETS * SEEDS))
    retrieve = _Stage(run, "retrieve", {"mode": "sample", "neighbours": each})
    drawn: list[np.ndarray] = []
    for number in range(1, SEED_SETS + 1):
        ids = np.sort(rng.choice(kept, SEEDS * each))
        rank = np.tile(np.arange(each), SEEDS)
        columns = {
            "image_id": ids,
            "seed_set": pa.array(np.full(len(ids), names[number].split(":")[1])),
            "seed_id": rng.permutation(np.repeat(np.arange(SEEDS), each)).astype(np.uint64)
            + np.uint64(image_id(number, 0)),
            "mode": pa.array(np.full(len(ids), "sample")),
            "rank": rank.astype(np.int32),
            "similarity": (0.9 - 0.3 * rank / each + rng.normal(0, 0.05, len(ids))).astype(np.float32),
            "cluster_id": pa.nulls(len(ids), pa.int32()),
        }
        retrieve.add(f"part-{number:06d}", _table(columns, RETRIEVAL))
        drawn.append(ids)
    retrieve.finish()
    taken = np.sort(rng.choice(kept, len(kept) // 10, replace=False))
    balance = _Stage(run, "balance", {"target": len(taken)})
    leaf = rng.integers(0, LEVELS[0], len(taken)).astype(np.int32)
    columns = {"image_id": taken, "rank": np.arange(len(taken)), "cluster_id": leaf}
    balance.add("part-000000", _table(columns, BALANCE))
    balance.finish()
    chosen, nominal = np.unique(np.concatenate([taken, *drawn]), return_counts=True)
    mix = _Stage(run, "mix", {})
    sources = pa.ListArray.from_arrays(
        pa.array(np.arange(len(chosen) + 1, dtype=np.int32)), pa.array(np.full(len(chosen), "balance"))
    )
    columns = {"image_id": chosen, "sources": sources, "nominal": nominal.astype(np.int64)}
    columns["weight"] = np.ones(len(chosen), np.float32)
    mix.add("part-000000", _table(columns, MIX))
    mix.finish()
    outcome: Outcome = manifest.execute(Here(run), manifest.ManifestConfig())
    assert outcome.rows == len(chosen)


if __name__ == "__main__":
    main()
