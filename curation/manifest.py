"""The manifest: one row per image of the dataset, with all a trainer and an auditor need; and its data card.

The tables of the stages are joined range by range of ids: `join_range` sees the rows of one range only.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import secrets
from curation.audit.tables import SEED_SET_FIGURES
from curation.errors import UserError
from curation.schemas import MANIFEST, MIX, RETRIEVAL

CARD_FORMAT = 1
"""Raised when a key of the data card changes its meaning."""


def cut_ranges(lows: Sequence[int], rows: Sequence[int], rows_per_range: int) -> list[int]:
    """Where to cut the ids into ranges of about `rows_per_range` rows: the positions of the parts that open one.

    lows: smallest id of each part, ascending. rows: of each part. Depends on the rows alone, never on the workers.
    """
    cuts: list[int] = []
    filled = 0
    for position, count in enumerate(rows):
        fresh_id = position == 0 or lows[position] != lows[position - 1]
        if not cuts or (filled + count > rows_per_range and fresh_id):
            cuts.append(position)
            filled = 0
        filled += count
    return cuts


def join_range(
    images: pa.Table,
    mix: pa.Table,
    duplicates: pa.Table | None,
    clusters: pa.Table | None,
    retrieval: pa.Table | None,
) -> pa.Table:
    """MANIFEST rows, by id, for the rows of MIX given.

    images: rows of the filter's table of the same range of ids; of several of one id (a retry) the usable one, else the
    last. duplicates and clusters: the last row of an id stands. Raises UserError for an id of MIX without an image.
    """
    mix = mix.select(MIX.names).sort_by("image_id").combine_chunks()
    ids = mix["image_id"].to_numpy()
    repeated = np.flatnonzero(ids[1:] == ids[:-1])
    if len(repeated):
        raise UserError(
            f"mix holds image_id {ids[repeated[0]]} more than once; make it again with `curate mix --rebuild`", 1
        )
    image_rows = _positions(images["image_id"].to_numpy(), ids, pc.equal(images["status"], "ok").to_numpy())
    lost = np.flatnonzero(image_rows < 0)
    if len(lost):
        raise UserError(
            f"mix names image_id {ids[lost[0]]} ({len(lost):,} such rows), which the filter's table does not hold; "
            "make it again with `curate mix --rebuild`",
            1,
        )
    found = images.take(pa.array(image_rows))
    columns: dict[str, Any] = {name: found[name] for name in MANIFEST.names if name in found.column_names}
    columns["image_id"] = mix["image_id"]
    columns["component_id"] = _looked_up(duplicates, "component_id", ids, pa.uint64())
    columns["clusters"] = _cluster_paths(clusters, ids)
    columns["sources"] = mix["sources"]
    columns["retrieved_by"] = _retrieved_by(retrieval, ids)
    columns["weight"] = mix["weight"]
    arrays = [_one_chunk(columns[field.name], field.type) for field in MANIFEST]
    return pa.Table.from_arrays(arrays, schema=MANIFEST)


def _positions(table_ids: np.ndarray, wanted: np.ndarray, preferred: np.ndarray | None = None) -> np.ndarray:
    """(len(wanted),) int64: the last (preferred) row of each wanted id, -1 where there is none."""
    if not len(table_ids):
        return np.full(len(wanted), -1, np.int64)
    rank = np.zeros(len(table_ids), bool) if preferred is None else preferred
    order = np.lexsort((np.arange(len(table_ids)), rank, table_ids))
    at = np.searchsorted(table_ids[order], wanted, side="right") - 1
    rows = order[np.maximum(at, 0)]
    return np.where((at >= 0) & (table_ids[rows] == wanted), rows, -1)


def _looked_up(table: pa.Table | None, name: str, ids: np.ndarray, kind: pa.DataType) -> pa.Array:
    if table is None or not table.num_rows:
        return pa.nulls(len(ids), kind)
    rows = _positions(table["image_id"].to_numpy(), ids)
    return table[name].take(pa.array(rows, mask=rows < 0))


def _cluster_paths(clusters: pa.Table | None, ids: np.ndarray) -> pa.Array:
    kind = MANIFEST.field("clusters").type
    if clusters is None or not clusters.num_rows:
        return pa.nulls(len(ids), kind)
    levels = sorted((n for n in clusters.column_names if n.startswith("cluster_")), key=lambda n: int(n[8:]))
    rows = _positions(clusters["image_id"].to_numpy(), ids)
    known = np.flatnonzero(rows >= 0)
    paths = np.stack([clusters[level].to_numpy()[rows[known]] for level in levels], axis=1)
    lengths = np.where(rows >= 0, len(levels), 0)
    offsets = np.r_[0, np.cumsum(lengths)].astype(np.int32)
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(paths.reshape(-1), pa.int32()), type=kind, mask=pa.array(rows < 0)
    )


def _retrieved_by(retrieval: pa.Table | None, ids: np.ndarray) -> pa.Array:
    """Lists of the retrievals of each id: by similarity (none known last), seed set, seed, mode, rank."""
    kind = MANIFEST.field("retrieved_by").type
    fields = [kind.value_type.field(i) for i in range(kind.value_type.num_fields)]
    if retrieval is None:
        retrieval = RETRIEVAL.empty_table()
    mine = retrieval.filter(pc.is_in(retrieval["image_id"], value_set=pa.array(ids, pa.uint64())))
    mine = mine.sort_by(
        [("image_id", "ascending"), ("similarity", "descending")]
        + [(name, "ascending") for name in ("seed_set", "seed_id", "mode", "rank")]
    ).combine_chunks()
    found = mine["image_id"].to_numpy()
    offsets = np.r_[np.searchsorted(found, ids, side="left"), len(found)].astype(np.int32)
    values = pa.StructArray.from_arrays([_one_chunk(mine[f.name], f.type) for f in fields], fields=fields)
    return pa.ListArray.from_arrays(pa.array(offsets), values, type=kind)


def _one_chunk(column: Any, kind: pa.DataType) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks() if column.num_chunks != 1 else column.chunk(0)
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], kind)
    return column if column.type == kind else column.cast(kind)


def range_counts(manifest: pa.Table, mix: pa.Table) -> dict[str, float]:
    """Figures of one range that add up over ranges: nominal, weight (float64), bytes, images by what brought them."""
    counts: dict[str, float] = {
        "nominal": int(pc.sum(mix["nominal"]).as_py() or 0),
        "weight": float(np.sum(manifest["weight"].to_numpy(), dtype=np.float64)),
        "bytes": int(pc.sum(manifest["length"]).as_py() or 0),
    }
    brought = pc.value_counts(manifest["sources"].combine_chunks().flatten())
    for entry in brought.to_pylist():
        counts[f"brought_by {entry['values']}"] = int(entry["counts"])
    return counts


def portable(value: Any) -> Any:
    """A value of a configuration without secrets and absolute paths: of these only the last name stays."""
    if isinstance(value, Mapping):
        return {str(key): portable(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [portable(inner) for inner in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "file://")) or value[1:3] in (":\\", ":/")):
        return value.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]
    return secrets.hide_all(value)


def rows_of(table: pa.Table) -> list[dict[str, Any]]:
    """A table of counts as the data card stores it."""
    return list(table.to_pylist())


def seed_set_figures(
    retrieved: Sequence[Mapping[str, Any]],
    in_manifest: Sequence[Mapping[str, Any]],
    sources: Sequence[Mapping[str, Any]],
    described: Mapping[str, Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """Per seed set: mode, seeds, planned and actual retrievals, and what of them the manifest holds.

    retrieved: rows of `tables.retrieval_counts`. in_manifest: rows of `tables.seed_set_counts`. described:
    what the retrieve stage says of each set, by name, with the retrievals `planned`.
    """
    seeds = {s["name"].split(":", 1)[1]: s for s in sources if s["role"] == "seed"}
    held = {row["seed_set"]: row for row in in_manifest}
    drawn: dict[str, dict[str, int]] = {}
    for row in retrieved:
        drawn.setdefault(row["seed_set"], {})[row["mode"]] = int(row["images"])
    figures = []
    for name in sorted(seeds.keys() | held.keys() | drawn.keys() | described.keys()):
        source = seeds.get(name, {})
        figures.append(
            {
                "seed_set": name,
                "seed_images": source.get("rows"),
                "exempt": bool(source.get("exempt", False)),
                "licence": source.get("licence"),
                "retrieved": drawn.get(name, {}),
                **{key: held.get(name, {}).get(key, 0) for key in SEED_SET_FIGURES},
                "planned": described.get(name, {}).get("planned"),
                "retrieve": {k: v for k, v in described.get(name, {}).items() if k != "planned"},
            }
        )
    return figures


def card_bytes(card: Mapping[str, Any]) -> bytes:
    """`manifest.json`: equal cards give equal bytes."""
    text = json.dumps({"format": CARD_FORMAT, **card}, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode("utf-8", "replace")
