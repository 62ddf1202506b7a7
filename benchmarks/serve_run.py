"""A synthetic run of any number of rows for `benchmarks.serve`: every table that the server reads, made cheaply.

Captions are drawn from a vocabulary with Zipf frequencies, hosts as well; a tenth of the images are copies; vectors of
128 dimensions lie around as many centres as there are leaf clusters, spread along 24 common directions with a little
noise in all. Bytes are stored of a few images, at which all rows point.
"""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from curation.schemas import DUPLICATES, IMAGES, MIX, RETRIEVAL, centroids_schema, clusters_schema, embeddings_schema
from pipelines.context import Context
from pipelines.run_directory import Generation, RunDirectory, Source

PART_ROWS = 100_000
DIMENSION, INTRINSIC = 128, 24
WORDS, HOSTS, PICTURES = 200_000, 50_000, 64


def make(root: str, rows: int) -> None:
    """Write the run."""
    context = Context(RunDirectory(root))
    seeds = 200
    context.run.register(Source(0, "pool:web", "urls", "list", rows, "digest", "download", 0))
    context.run.register(Source(1, "seed:birds", "parquet", "list", seeds, "digest", "import", 0))
    leaves = max(64, round(rows**0.5))
    random = np.random.default_rng(0)
    centres = random.normal(size=(leaves, DIMENSION)).astype(np.float32)
    axes = random.normal(size=(INTRINSIC, DIMENSION)).astype(np.float32) / INTRINSIC**0.5
    tops = np.arange(leaves) % 64
    vocabulary = _vocabulary(random)
    shard, places = _pictures(Path(root))
    names = [
        (f"part-000-{i:06d}", 0, i * PART_ROWS, min(PART_ROWS, rows - i * PART_ROWS))
        for i in range(-(-rows // PART_ROWS))
    ]
    names.append(("part-001-000000", 1, 0, seeds))
    stages = {
        name: _begin(context, name) for name in ("filter", "dedup", "embed/synthetic", "cluster", "retrieve", "mix")
    }
    sizes = np.zeros(leaves, np.int64)
    metadata = {"curate.model": json.dumps({"name": "synthetic", "dimension": DIMENSION})}
    kept_seen: list[np.ndarray] = []
    for name, source, first, count in names:
        random = np.random.default_rng([7, source, first])
        ids = (np.uint64(source) << np.uint64(40)) + np.arange(first, first + count, dtype=np.uint64)
        status = np.where(random.random(count) < 0.05, "failed", "ok") if source == 0 else np.full(count, "ok")
        ok = status == "ok"
        _put(stages["filter"], name, _images(ids, source, status, random, vocabulary, shard, places))
        copy = ok & (random.random(count) < 0.1) & (np.arange(count) > 200) if source == 0 else np.zeros(count, bool)
        kept = ok & ~copy
        _put(stages["dedup"], name, _duplicates(ids, ok, copy, random))
        leaf = (leaves * random.random(count) ** 2).astype(np.int32)
        spread = random.standard_normal((count, INTRINSIC), np.float32) @ axes
        vectors = centres[leaf] + spread + 0.2 * random.standard_normal((count, DIMENSION), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        flat = pa.array(np.ascontiguousarray(vectors[kept].astype(np.float16)).reshape(-1), pa.float16())
        schema = embeddings_schema(DIMENSION)
        column = pa.FixedSizeListArray.from_arrays(flat, DIMENSION).cast(schema.field(1).type)
        table = pa.Table.from_arrays([pa.array(ids[kept], pa.uint64()), column], schema=schema)
        _put(stages["embed/synthetic"], name, table, metadata)
        if source == 0:
            columns = [ids[kept], leaf[kept], tops[leaf[kept]], random.random(int(kept.sum()))]
            _put(stages["cluster"], name, _table(columns, clusters_schema(2)))
            sizes += np.bincount(leaf[kept], minlength=leaves)
            kept_seen.append(ids[kept][::7])
    _centroids(stages["cluster"], centres, tops, sizes)
    _choose(stages, np.concatenate(kept_seen), seeds)
    for generation in stages.values():
        context.finish(generation, {})


def _begin(context: Context, stage: str) -> Generation:
    generation = context.begin_keyed(stage, 1, {}, {"synthetic": stage})
    assert generation is not None
    return generation


def _put(generation: Generation, name: str, table: pa.Table, metadata: dict[str, str] | None = None) -> None:
    generation.parts.append(generation.writer.write(name, table, metadata=metadata))


def _table(columns: list[object], schema: pa.Schema) -> pa.Table:
    arrays = [c if isinstance(c, pa.Array) else pa.array(c, f.type) for c, f in zip(columns, schema, strict=True)]
    return pa.Table.from_arrays(arrays, schema=schema)


def _vocabulary(random: np.random.Generator) -> np.ndarray:
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    lengths = random.integers(3, 10, WORDS)
    drawn = random.integers(0, 26, (WORDS, 10))
    return np.array(["".join(letters[row[:n]]) for row, n in zip(drawn, lengths, strict=True)])


def _zipf(random: np.random.Generator, count: int, most: int) -> np.ndarray:
    return np.minimum((most ** random.random(count)).astype(np.int64) - 1, most - 1)


def _pictures(root: Path) -> tuple[str, list[tuple[int, int]]]:
    from PIL import Image

    random = np.random.default_rng(3)
    sink, places = io.BytesIO(), []
    for _ in range(PICTURES):
        at = sink.tell()
        small = Image.fromarray(random.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((512, 384), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=85)
        places.append((at, sink.tell() - at))
    (root / "pictures").mkdir(parents=True, exist_ok=True)
    (root / "pictures" / "shard.tar").write_bytes(sink.getvalue())
    return "pictures/shard.tar", places


def _images(
    ids: np.ndarray,
    source: int,
    status: np.ndarray,
    random: np.random.Generator,
    vocabulary: np.ndarray,
    shard: str,
    places: list[tuple[int, int]],
) -> pa.Table:
    count = len(ids)
    per_row = random.integers(4, 12, count)
    words = vocabulary[_zipf(random, int(per_row.sum()), WORDS)]
    lists = pa.ListArray.from_arrays(pa.array(np.r_[0, np.cumsum(per_row)], pa.int32()), pa.array(words))
    import pyarrow.compute as pc

    captions = pc.binary_join(lists, " ")
    hosts = pc.binary_join_element_wise(
        "http://host-", pa.array(_zipf(random, count, HOSTS)).cast(pa.string()), ".example/", ""
    )
    urls = (
        pc.binary_join_element_wise(hosts, pa.array(ids).cast(pa.string()), ".jpg", "")
        if source == 0
        else pa.nulls(count, pa.string())
    )
    digest = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(random.bytes(32 * count))])
    pixel = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), count, [None, pa.py_buffer(random.bytes(32 * count))])
    missing = status != "ok"
    place = np.array(places)[ids.astype(np.int64) % len(places)]
    given = {
        "image_id": ids,
        "source": pa.array(["pool:web" if source == 0 else "seed:birds"] * count),
        "url": urls,
        "sha256": digest,
        "stored_sha256": digest,
        "pixel_sha256": pixel,
        "pca_hash": random.integers(0, 1 << 63, count).astype(np.uint64),
        "width": np.full(count, 512, np.int32),
        "height": np.full(count, 384, np.int32),
        "original_width": random.integers(64, 4000, count).astype(np.int32),
        "original_height": random.integers(64, 4000, count).astype(np.int32),
        "shard": pa.array([shard] * count, mask=missing),
        "offset": pa.array(place[:, 0], pa.int64(), mask=missing),
        "length": pa.array(place[:, 1], pa.int64(), mask=missing),
        "status": pa.array(status.tolist()),
        "error": pa.array(np.where(missing, "http_404", None).tolist(), pa.string()),
        "nsfw": random.random(count).astype(np.float32) ** 4,
        "contrast": (random.random(count) * 90).astype(np.float32),
        "caption": captions if source == 0 else pa.nulls(count, pa.string()),
        "label": pa.nulls(count, pa.string()) if source == 0 else pa.array(["bird"] * count),
    }
    return _table([given.get(f.name, pa.nulls(count, f.type)) for f in IMAGES], IMAGES)


def _duplicates(ids: np.ndarray, ok: np.ndarray, copy: np.ndarray, random: np.random.Generator) -> pa.Table:
    original = np.where(
        copy, ids - np.minimum(random.integers(1, 200, len(ids)), np.arange(len(ids))).astype(np.uint64), ids
    )
    # A copy of a copy belongs to the component of its original.
    at = (original - ids[0]).astype(np.int64)
    for _ in range(20):
        at = np.where(copy[at] | ~ok[at], np.maximum(at - 1, 0), at)
    component = np.where(copy, ids[at], ids)
    given = {
        "image_id": ids[ok],
        "component_id": component[ok],
        "kept": ~copy[ok],
        "reason": pa.array(np.where(copy[ok], "self", "kept").tolist()),
        "nearest_id": pa.array(component[ok], pa.uint64(), mask=~copy[ok]),
        "similarity": pa.array((0.6 + 0.4 * random.random(int(ok.sum()))).astype(np.float32), mask=~copy[ok]),
        "reference_component_id": ids[ok],
    }
    count = int(ok.sum())
    return _table([given.get(f.name, pa.nulls(count, f.type)) for f in DUPLICATES], DUPLICATES)


def _centroids(generation: Generation, centres: np.ndarray, tops: np.ndarray, sizes: np.ndarray) -> None:
    from curation import storage

    coarse = np.stack([centres[tops == t].mean(axis=0) for t in range(64)])
    for level, (vectors, parent, size) in enumerate(
        ((centres, tops, sizes), (coarse, None, np.bincount(tops, sizes, 64).astype(np.int64))), 1
    ):
        flat = pa.array(np.ascontiguousarray(vectors, np.float32).reshape(-1), pa.float32())
        schema = centroids_schema(DIMENSION)
        table = pa.Table.from_arrays(
            [
                pa.array(np.arange(len(vectors)), pa.int32()),
                pa.nulls(len(vectors), pa.int32()) if parent is None else pa.array(parent, pa.int32()),
                pa.array(size, pa.int64()),
                pa.FixedSizeListArray.from_arrays(flat, DIMENSION).cast(schema.field(3).type),
            ],
            schema=schema,
        )
        generation.put_file(f"centroids/level-{level}.parquet", storage.table_bytes(table))


def _choose(stages: dict[str, Generation], kept: np.ndarray, seeds: int) -> None:
    """Every seventh kept image is retrieved, by the seed that its id gives."""
    random = np.random.default_rng(11)
    base = np.uint64(1) << np.uint64(40)
    for at in range(0, len(kept), PART_ROWS):
        ids = kept[at : at + PART_ROWS]
        given = {
            "image_id": ids,
            "seed_set": pa.array(["birds"] * len(ids)),
            "seed_id": base + ids % np.uint64(seeds),
            "mode": pa.array(["sample"] * len(ids)),
            "rank": np.arange(at, at + len(ids), dtype=np.int32) // seeds,
            "similarity": random.random(len(ids)).astype(np.float32),
        }
        table = _table([given.get(f.name, pa.nulls(len(ids), f.type)) for f in RETRIEVAL], RETRIEVAL)
        _put(stages["retrieve"], f"part-{at // PART_ROWS:06d}", table)
        sources = pa.array([["retrieve:birds"]] * len(ids), pa.list_(pa.string()))
        mix = [ids, sources, np.ones(len(ids), np.int64), np.ones(len(ids), np.float32)]
        _put(stages["mix"], f"part-{at // PART_ROWS:06d}", _table(mix, MIX))
