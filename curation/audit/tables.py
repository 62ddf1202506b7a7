"""The figures behind the data card and the report: tables in, tables out.

Every function takes paths of parts and streams over them (`curation/audit/scans.py`).
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import parquet
from curation.audit.scans import (
    NOTHING,
    count_by,
    current_rows,
    cut_groups,
    cut_text,
    first_per_group,
    first_rows,
    firsts_per_group,
    group_sizes,
    host,
    id_range,
    merge_counts,
    reason_class,
    source_number,
    stream,
    top_counts,
    with_hash,
)
from curation.hidden import hide


def status_counts(paths: Sequence[str]) -> pa.Table:
    """`source`, `status`, `reason`, `images` of tables of images.

    A row that a retry fetched again counts once, as what the last attempt made of it.
    """
    keys = {"source": pc.field("source"), "status": pc.field("status"), "reason": reason_class()}
    tables = [count_by(group, keys, where) for group, where in current_rows(paths)]
    return merge_counts(tables, list(keys)) if tables else count_by([], keys)


def lost() -> Any:
    """Which rows of images bring nothing and were listed once."""
    return pc.field("status").isin(["failed", "transient", "excluded"])  # at import this would bring pandas along


def host_failures(paths: Sequence[str], limit: int) -> tuple[pa.Table, int]:
    """`host`, `status`, `reason`, `images`: the `limit` most frequent of what was not fetched or not decoded.

    The second value: by how much a count may be too low (0 but with more than a million combinations).
    """
    keys = {"host": host(), "status": pc.field("status"), "reason": reason_class()}
    return top_counts(_lost(paths), keys, limit)


def failing_hosts(paths: Sequence[str], limit: int) -> pa.Table:
    """`host`, `images` (lost there), `rows` (listed there): the hosts that lost most."""
    worst, _ = top_counts(_lost(paths), {"host": host()}, limit)
    if not worst.num_rows:
        return worst.append_column("rows", pa.array([], pa.int64()))
    mine = host().isin(worst["host"].combine_chunks())
    every = [count_by(g, {"host": host()}, mine if w is None else mine & w) for g, w in current_rows(paths)]
    rows = {r["host"]: r["images"] for r in merge_counts(every, ["host"]).to_pylist()}
    return worst.append_column("rows", pa.array([rows.get(h, 0) for h in worst["host"].to_pylist()], pa.int64()))


def _lost(paths: Sequence[str]) -> list[tuple[list[str], Any]]:
    return [(group, lost() if where is None else lost() & where) for group, where in current_rows(paths)]


def duplicate_counts(paths: Sequence[str]) -> pa.Table:
    """`source_number`, `kept`, `reason`, `images` of tables of duplicates."""
    keys = {"source_number": source_number(), "kept": pc.field("kept"), "reason": pc.field("reason")}
    return count_by(paths, keys)


def count_by_reason(paths: Sequence[str], where: Any) -> list[dict[str, Any]]:
    """`reason`, `images` of the rows of DUPLICATES for which `where` holds."""
    return list(count_by(paths, {"reason": pc.field("reason")}, where).to_pylist())


def source_counts(paths: Sequence[str]) -> pa.Table:
    """`source_number`, `images` of any table with `image_id`."""
    return count_by(paths, {"source_number": source_number()})


def components(
    paths: Sequence[str], column: str, largest: int, random: int, seed: int, where: Any = None
) -> tuple[pa.Table, pa.Table]:
    """Which components to show, and how large they are.

    column: `component_id` or `reference_component_id`. where: the rows that count; without it, components of one are
    left out.
    Returns (`group`, `images`, `choice`: largest | random) and (`images`, `components`: how many are of this size).
    """
    members = where if where is not None else pc.field("component_id") != pc.field("image_id")
    plus = 0 if where is not None else 1
    sizes: list[pa.Table] = []
    candidates: list[pa.Table] = []
    for found in group_sizes(paths, column, members):
        counted = found.filter(pc.is_valid(found["group"]))
        counted = counted.set_column(1, "images", pc.add(counted["images"], pa.scalar(plus, pa.int64())))
        sizes.append(counted.group_by("images").aggregate([([], "count_all")]).rename_columns(["images", "components"]))
        keyed = with_hash(counted, seed, "report components", "group")
        candidates.append(keyed.sort_by([("images", "descending"), ("group", "ascending")]).slice(0, largest))
        candidates.append(keyed.sort_by([("hash", "ascending")]).slice(0, largest + random))
    if not candidates:
        empty = pa.table({"group": pa.array([], pa.uint64()), "images": pa.array([], pa.int64())})
        nothing = pa.table({"images": pa.array([], pa.int64()), "components": pa.array([], pa.int64())})
        return empty.append_column("choice", pa.array([], pa.string())), nothing
    every = pa.concat_tables(candidates).group_by("group").aggregate([("images", "min"), ("hash", "min")])
    every = every.rename_columns(["group", "images", "hash"])
    big = every.sort_by([("images", "descending"), ("group", "ascending")]).slice(0, largest)
    rest = every.filter(~pc.field("group").isin(big["group"].combine_chunks()))
    drawn = rest.sort_by([("hash", "ascending")]).slice(0, random)
    choice = pa.array(["largest"] * big.num_rows + ["random"] * drawn.num_rows, pa.string())
    chosen = pa.concat_tables([big, drawn]).select(["group", "images"]).append_column("choice", choice)
    return chosen.combine_chunks(), merge_counts(sizes, ["images"], "components")


def component_members(
    paths: Sequence[str], column: str, chosen: pa.Array, where: Any = None, hidden: np.ndarray = NOTHING
) -> pa.Table:
    """All rows of the chosen components but the hidden ones, those kept first.

    Columns: `image_id`, `kept`, `reason`, `nearest_id`, `similarity`, `group` (the component).
    """
    names = ["image_id", "kept", "reason", "nearest_id", "similarity"]
    columns = {name: pc.field(name) for name in names} | {"group": pc.field(column)}
    mine = pc.field(column).isin(chosen)
    found = list(stream(paths, columns, mine if where is None else mine & where, hidden))
    kinds = [pa.uint64(), pa.bool_(), pa.string(), pa.uint64(), pa.float32(), pa.uint64()]
    empty = pa.table({name: pa.array([], kind) for name, kind in zip(columns, kinds, strict=True)})
    table = pa.concat_tables(found) if found else empty
    return table.sort_by([("group", "ascending"), ("kept", "descending"), ("image_id", "ascending")]).combine_chunks()


def weakest_edges(paths: Sequence[str], members: pa.Table) -> pa.Table:
    """The least similar link of each component's chains: `group`, `edges`, `low`, `high`, `similarity`.

    paths: parts of the self forest. members: `image_id`, `group` of all members of the components asked for.
    """
    ids = members["image_id"].to_numpy()
    order = np.argsort(ids, kind="stable")
    ids, groups = ids[order], members["group"].to_numpy()[order]

    def edges() -> Iterator[pa.Table]:
        wanted = (
            pc.field("low").isin(pa.array(ids, pa.uint64()))
            & (pc.field("low_space") == 0)
            & (pc.field("high_space") == 0)
        )
        for table in stream(paths, ["low", "high", "similarity"], wanted):
            low, high = table["low"].to_numpy(), table["high"].to_numpy()
            group = groups[np.searchsorted(ids, low)]
            at = np.minimum(np.searchsorted(ids, high), len(ids) - 1)
            same = (ids[at] == high) & (groups[at] == group)
            yield table.append_column("group", pa.array(group, pa.uint64())).filter(pa.array(same))

    found = list(edges()) if len(ids) else []
    if not found:
        kinds = {"group": pa.uint64(), "edges": pa.int64(), "low": pa.uint64(), "high": pa.uint64()}
        return pa.table({n: pa.array([], k) for n, k in kinds.items()} | {"similarity": pa.array([], pa.float32())})
    every = pa.concat_tables(found)
    order_keys = [("similarity", "ascending"), ("low", "ascending"), ("high", "ascending")]
    least = first_per_group([every], "group", 1, order_keys)
    assert least is not None
    counted = every.group_by("group").aggregate([([], "count_all")]).rename_columns(["group", "edges"])
    joined = least.join(counted, "group").sort_by("group")
    return joined.select(["group", "edges", "low", "high", "similarity"]).combine_chunks()


def nearest_pairs(
    paths: Sequence[str], threshold: float, reach: float, each: int, hidden: np.ndarray = NOTHING
) -> list[dict[str, Any]]:
    """Images and their nearest one, `each` random pairs just above the threshold and so many just below.

    Rows: `image_id`, `nearest_id`, `similarity`, `kept`, `reason`, `above`; within `reach` of the threshold, the most
    similar first. A pair that is nearest both ways is there once.
    """
    similarity = pc.field("similarity")
    near = (similarity > threshold - reach) & (similarity <= threshold + reach)
    once = near & (pc.field("image_id") > pc.field("nearest_id"))
    names = ["image_id", "nearest_id", "similarity", "kept", "reason"]
    columns = {name: pc.field(name) for name in names} | {"above": similarity > pa.scalar(threshold, pa.float32())}
    tables = (with_hash(hide(t, hidden, "nearest_id"), 0, "report pairs") for t in stream(paths, columns, once, hidden))
    found = first_rows(tables, "above", each, [("hash", "ascending")])
    return sorted(found, key=lambda row: (-row["similarity"], row["image_id"]))


def reference_pairs(paths: Sequence[str], hidden: np.ndarray = NOTHING) -> Iterator[pa.Table]:
    """Direct hits, the best per image and set, hidden images left out.

    Columns: `image_id`, `reference_set`, `reference_id`, `similarity`, `kept`, `reason`.
    """
    columns = ["image_id", "kept", "reason", "references"]
    for table in stream(paths, columns, pc.list_value_length(pc.field("references")) > 0, hidden):
        if not table.num_rows:
            continue
        lists = table["references"].combine_chunks()
        rows = pc.list_parent_indices(lists)
        hits = lists.flatten()
        flat = pa.table(
            {
                "image_id": pc.take(table["image_id"], rows),
                "reference_set": pc.struct_field(hits, "reference_set"),
                "reference_id": pc.struct_field(hits, "reference_id"),
                "similarity": pc.struct_field(hits, "similarity"),
                "kept": pc.take(table["kept"], rows),
                "reason": pc.take(table["reason"], rows),
            }
        )
        flat = flat.sort_by(
            [
                ("image_id", "ascending"),
                ("reference_set", "ascending"),
                ("similarity", "descending"),
                ("reference_id", "ascending"),
            ]
        )
        ids = flat["image_id"].to_numpy()
        names = pc.dictionary_encode(flat["reference_set"].combine_chunks()).indices.to_numpy()
        first = np.r_[True, (ids[1:] != ids[:-1]) | (names[1:] != names[:-1])]
        yield flat.filter(pa.array(first)).combine_chunks()


def reference_summary(paths: Sequence[str], thresholds: Sequence[float]) -> pa.Table:
    """Per reference set: `reference_set`, `images` with a direct hit, `dropped` of these, and `at` each threshold.

    at: list of counts, one per threshold: images whose best match in the set is strictly more similar.
    """
    names: dict[str, list[int]] = {}
    for table in reference_pairs(paths):
        for name in pc.unique(table["reference_set"]).to_pylist():
            mine = table.filter(pc.field("reference_set") == name)
            similarity = mine["similarity"].to_numpy()
            dropped = int(pc.sum(pc.equal(mine["reason"], "reference")).as_py() or 0)
            figures = [mine.num_rows, dropped, *(int((similarity > np.float32(t)).sum()) for t in thresholds)]
            names[name] = [a + b for a, b in zip(names.get(name, [0] * len(figures)), figures, strict=True)]
    found = sorted(names)
    return pa.table(
        {
            "reference_set": pa.array(found, pa.string()),
            "images": pa.array([names[n][0] for n in found], pa.int64()),
            "dropped": pa.array([names[n][1] for n in found], pa.int64()),
            "at": pa.array([names[n][2:] for n in found], pa.list_(pa.int64())),
        }
    )


def reference_samples(paths: Sequence[str], each: int, seed: int, hidden: np.ndarray = NOTHING) -> list[dict[str, Any]]:
    """Pairs to show per reference set, `each` of every `choice`: best, weakest (that still counted), random."""
    ties = [("image_id", "ascending"), ("reference_id", "ascending")]
    orders = [("similarity", "descending"), ("similarity", "ascending"), ("hash", "ascending")]
    tables = (
        with_hash(hide(t, hidden, "reference_id"), seed, "report references") for t in reference_pairs(paths, hidden)
    )
    firsts = firsts_per_group(tables, "reference_set", [(3 * each, [order, *ties]) for order in orders])
    found: list[dict[str, Any]] = []
    seen: set[tuple[int, str]] = set()
    for choice, table in zip(("best", "weakest", "random"), firsts, strict=True):
        taken: dict[str, int] = {}
        for row in [] if table is None else table.to_pylist():
            name = row["reference_set"]
            if (row["image_id"], name) not in seen and taken.get(name, 0) < each:
                seen.add((row["image_id"], name))
                taken[name] = taken.get(name, 0) + 1
                found.append({**row, "choice": choice})
    return found


SEED_SET_FIGURES = ("nominal", "unique", "colliding", "shared", "alone")


def seed_set_counts(manifest: Sequence[str]) -> pa.Table:
    """What each seed set brought into a manifest: `seed_set` and SEED_SET_FIGURES.

    nominal: retrievals, the paper's count. unique: images. colliding: of the unique, images that more than one seed of
    the set drew. shared: of the unique, images that another seed set drew too; alone: the others.
    """
    totals: dict[str, np.ndarray] = {}
    for table in stream(manifest, ["retrieved_by"], pc.list_value_length(pc.field("retrieved_by")) > 0):
        for name, figures in _seed_sets(table["retrieved_by"]).items():
            totals[name] = totals.get(name, np.zeros(len(SEED_SET_FIGURES), np.int64)) + figures
    names = sorted(totals)
    columns = {f: pa.array([int(totals[n][i]) for n in names], pa.int64()) for i, f in enumerate(SEED_SET_FIGURES)}
    return pa.table({"seed_set": pa.array(names, pa.string()), **columns})


def _seed_sets(retrieved_by: pa.ChunkedArray) -> dict[str, np.ndarray]:
    """SEED_SET_FIGURES per seed set of a column of `retrieved_by`."""
    lists = retrieved_by.combine_chunks()
    rows = pc.list_parent_indices(lists).to_numpy()
    encoded = pc.dictionary_encode(pc.struct_field(lists.flatten(), "seed_set"))
    names, codes = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    if not names:
        return {}
    pairs, draws = np.unique(rows.astype(np.int64) * len(names) + codes, return_counts=True)
    sets_of_row = np.bincount(pairs // len(names), minlength=len(lists))
    several = sets_of_row[pairs // len(names)] > 1
    of_set = [codes, *(pairs[chosen] % len(names) for chosen in (draws > 0, draws > 1, several, ~several))]
    counts = np.stack([np.bincount(some, minlength=len(names)) for some in of_set])
    return {name: counts[:, i] for i, name in enumerate(names)}


def retrieval_counts(paths: Sequence[str]) -> pa.Table:
    """`seed_set`, `mode`, `images`: rows of a table of retrieval."""
    return count_by(paths, {"seed_set": pc.field("seed_set"), "mode": pc.field("mode")})


LOCATION_COLUMNS = (
    *("image_id", "source", "url", "width", "height", "shard", "offset", "length", "status", "error"),
    *("duplicate_of", "nsfw", "faces_blurred", "label", "caption"),
)


def locations(paths: Sequence[str], ids: np.ndarray) -> pa.Table:
    """Rows of tables of images for these ids, long strings cut; of several rows of one id the usable or the last one.

    Only files whose range of ids holds one of them are read beyond the footer. ids: (n,) uint64.
    """
    ids = np.unique(ids)

    def read(path: str) -> pa.Table | None:
        file = parquet.open_file(path)
        low, high = id_range(file)
        if low is not None and high is not None and not ((ids >= low) & (ids <= high)).any():
            return None
        columns = {n: cut_text(n) for n in LOCATION_COLUMNS if n in file.schema_arrow.names}
        tables = list(stream([path], columns, pc.field("image_id").isin(pa.array(ids, pa.uint64()))))
        return pa.concat_tables(tables) if tables else None

    with ThreadPoolExecutor(8) as pool:
        tables = [t for t in pool.map(read, paths) if t is not None] if len(ids) else []
    if not tables:
        return pa.table({"image_id": pa.array([], pa.uint64())})
    every = pa.concat_tables(tables)
    rank = pa.array(np.arange(every.num_rows), pa.int64())
    every = every.append_column("usable", pc.cast(pc.equal(every["status"], "ok"), pa.int8())).append_column(
        "rank", rank
    )
    order = [("usable", "descending"), ("rank", "descending")]
    return cut_groups(every, "image_id", 1, order).drop_columns(["usable", "rank"])
