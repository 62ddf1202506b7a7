"""A finished run in small: real JPEGs in real tars' place, real Parquet through the stages' own writers.

What is in it is known exactly, so that figures of the manifest and the report can be compared with it.
"""

import hashlib
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from curation import storage
from curation.schemas import BALANCE, DUPLICATES, EDGES, IMAGES, MIX, RETRIEVAL, clusters_schema, image_id
from curation.vectors import embeddings_table
from pipelines.run_directory import Fingerprint, Generation, RunDirectory, Source

POOL, FLOWERS, ANIMALS, EVALUATION = 0, 1, 2, 3
LEAVES = 4


def picture(number: int, side: int = 48) -> bytes:
    """A JPEG of its own colours and shape."""
    from PIL import Image, ImageDraw

    random = np.random.default_rng(number)
    image = Image.new("RGB", (side, side * 3 // 4), tuple(int(v) for v in random.integers(0, 255, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y, w, h = (int(v) for v in random.integers(0, side, 4))
        draw.ellipse([x, y, x + w, y + h], fill=tuple(int(v) for v in random.integers(0, 255, 3)))
    sink = io.BytesIO()
    image.save(sink, "JPEG", quality=80)
    return sink.getvalue()


@dataclass
class SyntheticRun:
    """Where it lies and what was put in."""

    run: RunDirectory
    usable: list[int] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    in_mix: list[int] = field(default_factory=list)
    retrievals: list[tuple[int, str, int, int, float]] = field(default_factory=list)


def finish(
    run: RunDirectory, stage: str, parts: Mapping[str, pa.Table], inputs: Sequence[str] = (), **more: Any
) -> None:
    """Write a stage whole, as its own code would. more: files (of the generation), part_files, metadata, summary."""
    directory = run.stage(stage)
    number = len(directory.all_generations())
    digests = {i: [g.digest for g in run.stage(i).generations()] for i in inputs}
    fingerprint = Fingerprint(stage, 1, {"seed": 0}, digests, {"numpy": "2"})
    generation = Generation(number, directory.generation_directory(number), fingerprint, {i: [0] for i in inputs})
    for name, data in more.get("files", {}).items():
        generation.put_file(name, data)
    for name in sorted(parts):
        files = more.get("part_files", {}).get(name)
        generation.parts.append(generation.writer.write(name, parts[name], files=files, metadata=more.get("metadata")))
    generation.summary = dict(more.get("summary", {}))
    generation.complete = True
    directory.save(generation)


def image_rows(run: RunDirectory, part: str, rows: Sequence[dict[str, Any]], data: Sequence[bytes | None]) -> pa.Table:
    """A table of images; the bytes go into one shard."""
    blob, filled = bytearray(), []
    for row, content in zip(rows, data, strict=True):
        full: dict[str, Any] = dict.fromkeys(IMAGES.names) | {"status": "ok"} | row
        if content is not None:
            digest = hashlib.sha256(content).digest()
            full |= {"shard": f"download/gen-0000/shards/{part}.tar", "offset": len(blob), "length": len(content)}
            full |= {
                "sha256": digest,
                "stored_sha256": digest,
                "pixel_sha256": digest,
                "pca_hash": int(full["image_id"]) * 7,
            }
            blob += content
        filled.append(full)
    storage.write_whole(run.path(f"download/gen-0000/shards/{part}.tar"), bytes(blob))
    return pa.Table.from_pylist(filled, schema=IMAGES)


def build(
    root: Path | str,
    *,
    pool: int = 40,
    per_part: int = 16,
    optional: bool = True,
    hostile: bool = False,
    content: Callable[[int, int], bytes] | None = None,
) -> SyntheticRun:
    """Make a run. optional: with dedup, clusters, retrieval and balance. content(source, row): the image's bytes.

    Of every 10 pool rows: row 3 is a near-duplicate of row 2, row 5 a leak (direct hit), row 6 in the same reference
    component by a chain, row 7 failed, row 8 dropped by a filter, row 9 flagged as not safe.
    """
    made = SyntheticRun(RunDirectory(str(root)))
    run = made.run
    names = ["pool:web", "seed:flowers", "seed:animals", "reference:evaluation"]
    if hostile:
        names[1] = "seed:<script>alert(1)</script>"
    seeds, references = 5, 4
    counts = [pool, seeds, seeds, references]
    content = content or (lambda source, row: picture(1000 * source + row))
    for number, name in enumerate(names):
        licence = ["various", "CC0-1.0", None, "CC-BY-4.0"][number]
        is_pool = number == POOL
        kind, stage, generation = ("urls", "download", 0) if is_pool else ("folder", "import", number - 1)
        origin, exempt = f"/somewhere/{number}", number == ANIMALS
        source = Source(number, name, kind, origin, counts[number], f"d{number}", stage, generation, licence, exempt)
        run.register(source)

    parts: dict[str, pa.Table] = {}
    fetched: dict[str, pa.Table] = {}
    for number, name in enumerate(names):
        for index, start in enumerate(range(0, counts[number], per_part)):
            part = f"part-{number:03d}-{index:06d}"
            rows, data = [], []
            for row in range(start, min(start + per_part, counts[number])):
                entry, usable = _row(number, name, row, hostile)
                rows.append(entry)
                copied = row - 1 if number == POOL and row % 10 == 3 else row
                data.append(content(number, copied) if usable else None)
                if entry.get("status", "ok") == "ok":
                    made.usable.append(entry["image_id"])
            parts[part] = image_rows(run, part, rows, data)
            before = [
                {**r, "status": "ok", "error": None} if r["status"] == "dropped" else r for r in parts[part].to_pylist()
            ]
            fetched[part] = pa.Table.from_pylist(before, schema=IMAGES)
    finish(run, "download", {n: t for n, t in fetched.items() if n.startswith("part-000")})
    finish(run, "import", {n: t for n, t in fetched.items() if not n.startswith("part-000")})
    finish(run, "score", parts, ["download", "import"])
    finish(run, "filter", parts, ["score"], summary={"dropped": pool // 10})

    pool_ids = [i for i in made.usable if i >> 40 == POOL]
    seed_ids = [i for i in made.usable if i >> 40 in (FLOWERS, ANIMALS)]
    dropped = {i for i in pool_ids if i % 10 in (3, 5, 6)} if optional else set()
    made.kept = [i for i in pool_ids if i not in dropped]
    if optional:
        _dedup(run, pool_ids, per_part)
    random = np.random.default_rng(0)
    for part, table in parts.items():
        mine = [i for i in table["image_id"].to_pylist() if i in set(made.kept) | set(seed_ids)]
        del table
        parts[part] = pa.table({"image_id": pa.array(mine, pa.uint64())})
    vectors = {
        name: embeddings_table(ids["image_id"].to_numpy(), random.normal(size=(ids.num_rows, 16)))
        for name, ids in parts.items()
        if ids.num_rows
    }
    model = json.dumps({"name": "mobilenet_v2", "weights": "sha256:0123", "size": 224})
    finish(run, "embed/mobilenet_v2", vectors, ["filter"], metadata={"curate.model": model})
    if optional:
        _choose(made, parts, seed_ids, names)
    else:
        made.in_mix = sorted(seed_ids + made.kept)
        table = pa.Table.from_pylist(
            [{"image_id": i, "sources": ["seed:flowers"], "nominal": 1, "weight": 1.0} for i in made.in_mix], schema=MIX
        )
        finish(run, "mix", {"part-000000": table}, ["filter"])
    return made


def _row(number: int, name: str, row: int, hostile: bool) -> tuple[dict[str, Any], bool]:
    entry: dict[str, Any] = {
        "image_id": image_id(number, row),
        "source": name,
        "width": 48,
        "height": 36,
        "original_width": 48,
        "original_height": 36,
        "contrast": 20.0 + row % 50,
        "nsfw": 0.05,
        "faces": [],
        "label": f"class-{row % 4}",
    }
    if number != POOL:
        return entry, True
    entry |= {"url": f"http://host-{row % 3}.example/{row}.jpg", "caption": f"picture {row}"}
    if hostile:
        nasty = [
            '"><script>alert(1)</script>',
            "javascript:alert(1)",
            "\u202egpj.exe",
            "' onerror='alert(1)",
            "x" * 1_000_000,
        ]
        entry |= {"url": f"http://h/{nasty[row % 5]}", "caption": nasty[row % 5], "label": nasty[row % 5]}
    if row % 10 == 7:
        gone = {"nsfw": None, "faces": None, "contrast": None, "width": None, "height": None}
        return entry | gone | {"status": "failed", "error": "http_404: <b>gone</b>"}, False
    if row % 10 == 8:
        return entry | {"status": "dropped", "error": "solid_colour: 1.2", "contrast": 1.2}, True
    if row % 10 == 9:
        entry["nsfw"] = 0.8
    return entry, True


def _dedup(run: RunDirectory, pool_ids: Sequence[int], per_part: int) -> None:
    rows, edges = [], []
    for i in pool_ids:
        row: dict[str, Any] = dict.fromkeys(DUPLICATES.names)
        row |= {"image_id": i, "component_id": i, "kept": True, "reason": "kept", "reference_component_id": i}
        if i % 10 == 3:
            row |= {"component_id": i - 1, "kept": False, "reason": "self", "nearest_id": i - 1, "similarity": 0.9}
            edges.append({"low_space": 0, "low": i - 1, "high_space": 0, "high": i, "similarity": 0.9})
        if i % 10 in (5, 6):
            row |= {"kept": False, "reason": "reference", "reference_component_id": i - i % 10 + 5}
        if i % 10 == 5:
            hit = {"reference_set": "evaluation", "reference_id": image_id(EVALUATION, i // 10 % 4), "similarity": 0.7}
            row |= {"references": [hit]}
        rows.append(row)
    parts = {
        f"part-000-{start // per_part:06d}": pa.Table.from_pylist(
            [r for r in rows if start <= r["image_id"] < start + per_part], schema=DUPLICATES
        )
        for start in range(0, max(pool_ids) + 1, per_part)
    }
    forest = storage.table_bytes(pa.Table.from_pylist(edges, schema=EDGES))
    recall = json.dumps({"recall": 0.995, "recall_low": 0.99, "recall_high": 1.0}).encode()
    finish(run, "dedup", parts, ["filter"], files={"self_forest/part-000000.parquet": forest, "recall.json": recall})


def _choose(made: SyntheticRun, parts: Mapping[str, pa.Table], seed_ids: Sequence[int], names: Sequence[str]) -> None:
    run, kept = made.run, made.kept
    clusters = {
        part: pa.Table.from_pylist(
            [
                {"image_id": i, "cluster_1": i % LEAVES, "cluster_2": i % LEAVES // 2, "distance": (i % 7) / 10}
                for i in table["image_id"].to_pylist()
                if i in set(kept)
            ],
            schema=clusters_schema(2),
        )
        for part, table in parts.items()
        if part.startswith("part-000")
    }
    finish(run, "cluster", clusters, ["embed/mobilenet_v2"])
    for position, seed in enumerate(seed_ids):
        seed_set = names[seed >> 40].split(":", 1)[1]
        for rank in range(4):
            at = (position * 3 + rank * 2) % len(kept)
            made.retrievals.append((kept[at], seed_set, seed, rank, round(0.9 - rank / 10, 2)))
    rows = [
        {
            "image_id": i,
            "seed_set": s,
            "seed_id": seed,
            "mode": "sample",
            "rank": r,
            "similarity": v,
            "cluster_id": None,
        }
        for i, s, seed, r, v in sorted(made.retrievals)
    ]
    half = len(rows) // 2
    tables = {
        f"part-{n:06d}": pa.Table.from_pylist(chunk, schema=RETRIEVAL)
        for n, chunk in enumerate([rows[:half], rows[half:]])
    }
    sets = {n.split(":", 1)[1]: {"mode": "sample", "seeds": 5, "neighbours": 4, "chosen": [1]} for n in names[1:3]}
    finish(run, "retrieve", tables, ["cluster"], files={"seed_sets.json": json.dumps(sets).encode()})
    balanced = kept[:: max(1, len(kept) // 8)]
    balance = [{"image_id": i, "rank": n, "cluster_id": i % LEAVES} for n, i in enumerate(balanced)]
    finish(run, "balance", {"part-000000": pa.Table.from_pylist(balance, schema=BALANCE)}, ["cluster"])
    brought: dict[int, list[str]] = {i: [names[i >> 40]] for i in seed_ids}
    for i, seed_set, *_ in made.retrievals:
        brought.setdefault(i, []).append(f"retrieve:{seed_set}")
    for i in balanced:
        brought.setdefault(i, []).append("balance")
    made.in_mix = sorted(brought)
    mix = [
        {"image_id": i, "sources": sorted(set(brought[i])), "nominal": len(brought[i]), "weight": 1.0}
        for i in made.in_mix
    ]
    finish(run, "mix", {"part-000000": pa.Table.from_pylist(mix, schema=MIX)}, ["retrieve", "balance"])
