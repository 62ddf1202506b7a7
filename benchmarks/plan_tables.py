"""Made tables for the stages that only move rows (balance, mix, manifest), run as those stages run them."""

import numpy as np
import pyarrow as pa

from curation import balance, mixing, order, storage
from curation.manifest import join_range
from curation.schemas import BALANCE, IMAGES, MANIFEST, RETRIEVAL

PART_ROWS = 65_536
LEAVES = 1000
TAKEN = 10
"""One image of so many is taken by balance."""
RANGE = 131_072
MIX_ROWS = 1_000_000


def ids_of(rows: int) -> np.ndarray:
    return np.arange(rows, dtype=np.uint64)


def balance_inputs(rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """image_id, leaf and distance of every image; leaves of very different sizes."""
    random = np.random.default_rng(0)
    leaves = (LEAVES * random.random(rows) ** 2).astype(np.int32)
    return ids_of(rows), leaves, random.random(rows).astype(np.float32)


def run_balance(inputs: tuple[np.ndarray, np.ndarray, np.ndarray]) -> int:
    """Targets, the first of each leaf, their order, the written table: its bytes."""
    ids, leaves, distances = inputs
    wanted = balance.leaf_targets([np.bincount(leaves, minlength=LEAVES)], [], len(ids) // TAKEN, 0)
    taken = order.FirstPerGroup(wanted)
    for start in range(0, len(ids), PART_ROWS):
        part = slice(start, start + PART_ROWS)
        keys = balance.member_keys(ids[part], distances[part], "random", 0)
        chosen, _ = order.first_per_group(leaves[part], keys, ids[part], wanted)
        taken.add(leaves[part][chosen], keys[chosen], ids[part][chosen])
    groups, _, found, ranks = taken.result()
    position = np.empty(len(found), np.int64)
    position[np.lexsort((order.hash_keys(found, 0, "balance rounds"), ranks))] = np.arange(len(found))
    by_id = np.argsort(found)
    columns = [pa.array(found[by_id]), pa.array(position[by_id]), pa.array(groups[by_id], pa.int32())]
    return len(storage.table_bytes(pa.Table.from_arrays(columns, schema=BALANCE)))


def mix_inputs(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """image_id and source of every row brought by three sources; many images are brought more than once."""
    random = np.random.default_rng(1)
    return np.sort(random.integers(0, 2 * rows, rows)).astype(np.uint64), random.integers(0, 3, rows)


def run_mix(inputs: tuple[np.ndarray, np.ndarray]) -> int:
    """Rows brought together range by range, written: their bytes."""
    brought, sources = inputs
    names, written = ["seed:one", "retrieve:one", "balance"], 0
    for start in range(0, len(brought), MIX_ROWS):
        part = slice(start, start + MIX_ROWS)
        ids, starts, pairs = mixing.merge_sources(brought[part], sources[part])
        written += len(storage.table_bytes(mixing.mix_table(ids, starts, pairs, names, np.ones(len(ids)))))
    return written


def made_images(rows: int) -> pa.Table:
    """A filter's table of `rows` images."""
    random = np.random.default_rng(2)
    numbers = {
        "width": 640, "height": 480, "original_width": 640, "original_height": 480,
        "offset": 1 << 20, "length": 100_000, "contrast": 40.0, "nsfw": 0.01,
    }  # fmt: skip
    columns = []
    for field in IMAGES:
        if field.name == "image_id":
            column = pa.array(ids_of(rows))
        elif field.name == "url":
            column = pa.array([f"https://pictures.test/{i:08x}/picture.jpg" for i in range(rows)])
        elif field.type == pa.binary(32):
            column = pa.array([random.bytes(32) for _ in range(rows)], pa.binary(32))
        elif field.name == "pca_hash":
            column = pa.array(random.integers(0, 1 << 63, rows), pa.uint64())
        elif field.name in numbers:
            column = pa.array(np.full(rows, numbers[field.name])).cast(field.type)
        elif field.name == "shard":
            column = pa.array([f"download/shards/part-000-{i // 1000:06d}.tar" for i in range(rows)])
        elif field.name in ("source", "status"):
            column = pa.array(["pool:made" if field.name == "source" else "ok"] * rows)
        else:
            column = pa.nulls(rows, field.type)
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=IMAGES)


def manifest_inputs() -> tuple[pa.Table, ...]:
    """images, mix, duplicates, clusters and retrieval of one range of ids."""
    random = np.random.default_rng(3)
    ids = ids_of(RANGE)
    images = made_images(RANGE)
    pairs = np.stack([random.integers(0, 3, RANGE), np.ones(RANGE, np.int64)], axis=1)
    names = ["seed:one", "retrieve:one", "balance"]
    mix = mixing.mix_table(ids, np.arange(RANGE), pairs, names, np.ones(RANGE))
    duplicates = pa.table({"image_id": ids, "component_id": ids})
    leaves = random.integers(0, LEAVES, RANGE).astype(np.int32)
    clusters = pa.table({"image_id": ids, "cluster_1": leaves, "cluster_2": leaves // 10})
    third = ids[::3]
    count = len(third)
    retrieval = pa.Table.from_arrays(
        [
            pa.array(third),
            pa.array(["one"] * count),
            pa.array(third),
            pa.array(["sample"] * count),
            pa.array(np.zeros(count), pa.int32()),
            pa.array(random.random(count), pa.float32()),
            pa.nulls(count, pa.int32()),
        ],
        schema=RETRIEVAL,
    )
    return images, mix, duplicates, clusters, retrieval


def run_manifest(inputs: tuple[pa.Table, ...], rows: int) -> int:
    """Ranges joined and written: their bytes. The inputs serve for every range; the last one is cut."""
    written = 0
    for start in range(0, rows, RANGE):
        count = min(RANGE, rows - start)
        images, mix, *others = (table.slice(0, count) if len(table) == RANGE else table for table in inputs)
        table = join_range(images, mix, *others)
        assert table.schema == MANIFEST
        written += len(storage.table_bytes(table))
    return written
