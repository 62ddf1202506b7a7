"""Streaming over Parquet: scans with projections, counts by key, the first rows per group.

Memory depends on what is kept and on the number of distinct keys, never on the rows of the run.
What is sampled is sampled in hash order (`curation/order.py`): the same rows whatever the order of arrival.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from curation import parquet, storage
from curation.hidden import hide
from curation.order import hash_keys
from curation.schemas import SOURCE_SHIFT

if TYPE_CHECKING:  # these bring pandas along, and `curate --help` need not wait for it
    import pyarrow.dataset as ds

BATCH_ROWS = 1 << 16
GROUPS_PER_PASS = 1 << 23
"""Group-bys over ids run in so many passes that one pass holds at most about this many groups."""
COUNTED_GROUPS = 1 << 20
"""`top_counts` holds at most about twice so many groups."""
NOTHING = np.empty(0, np.uint64)
TEXT_CHARACTERS = 400
"""Longer strings of tables (URLs, captions) are cut when read: a page needs no more."""
RETRY = re.compile(r"-r(\d+)\.parquet$")


# Functions, since a scalar of pyarrow imports pandas, half a second of every command.
@cache
def source_number() -> pc.Expression:
    return pc.shift_right(pc.field("image_id"), pa.scalar(SOURCE_SHIFT, pa.uint64()))


@cache
def reason_class() -> pc.Expression:
    """The class of an `error`: what stands before the first colon."""
    return pc.replace_substring_regex(
        pc.utf8_slice_codeunits(pc.coalesce(pc.field("error"), pa.scalar("")), 0, 200),
        pattern=r"(?s)\s*:.*$",
        replacement="",
    )


@cache
def host() -> pc.Expression:
    """The host of `url` in lower case, with its port."""
    return pc.utf8_lower(
        pc.replace_substring_regex(
            pc.utf8_slice_codeunits(pc.coalesce(pc.field("url"), pa.scalar("")), 0, TEXT_CHARACTERS),
            pattern=r"(?s)^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@?#]*@)?([^/?#]*).*$",
            replacement=r"\1",
        )
    )


def open_parts(paths: Sequence[str]) -> "ds.Dataset":
    """Parquet files, local or of any fsspec filesystem, as one dataset. paths: at least one, all of one filesystem."""
    import pyarrow.dataset as ds

    checked = ds.ParquetFragmentScanOptions(page_checksum_verification=True)
    form = ds.ParquetFileFormat(default_fragment_scan_options=checked)
    parquet.look_at_footers(paths)
    if all(storage.is_local(path) for path in paths):
        return ds.dataset([storage.filesystem(path)[1] for path in paths], format=form)
    fs = storage.filesystem(paths[0])[0]
    inner = [storage.filesystem(path)[1] for path in paths]
    return ds.dataset(inner, format=form, filesystem=pafs.PyFileSystem(pafs.FSSpecHandler(fs)))


def stream(
    paths: Sequence[str], columns: Any, where: Any = None, hidden: np.ndarray = NOTHING, column: str = "image_id"
) -> Iterator[pa.Table]:
    """The rows of `paths` for which `where` holds, in bounded tables. columns: names, or expressions by name.

    hidden: sorted ids of images that are not to be shown; rows whose id in `column` is among them are left out.
    """
    if not paths:
        return
    with parquet.one_named(paths):
        batches = open_parts(paths).to_batches(
            columns=columns, filter=where, batch_size=BATCH_ROWS, batch_readahead=4, fragment_readahead=2
        )
    while True:
        with parquet.one_named(paths):
            batch = next(batches, None)
        if batch is None:
            return
        if batch.num_rows:
            table = pa.Table.from_batches([batch])
            yield hide(table, hidden, column) if len(hidden) else table


def count_by(paths: Sequence[str], keys: Mapping[str, Any], where: Any = None) -> pa.Table:
    """`keys` and `images`: rows per distinct combination of the key expressions, sorted by them."""
    names = list(keys)
    if not paths:
        return pa.table({name: pa.array([], pa.string()) for name in names} | {"images": pa.array([], pa.int64())})
    from pyarrow import acero

    steps = [acero.Declaration("scan", acero.ScanNodeOptions(open_parts(paths), filter=where))]
    if where is not None:
        steps.append(acero.Declaration("filter", acero.FilterNodeOptions(where)))
    steps.append(acero.Declaration("project", acero.ProjectNodeOptions(list(keys.values()), names)))
    steps.append(
        acero.Declaration("aggregate", acero.AggregateNodeOptions([([], "hash_count_all", None, "images")], keys=names))
    )
    with parquet.one_named(paths):
        counted = acero.Declaration.from_sequence(steps).to_table()
    return counted.select([*names, "images"]).sort_by([(name, "ascending") for name in names])


def top_counts(
    groups: Sequence[tuple[Sequence[str], Any]], keys: Mapping[str, Any], limit: int
) -> tuple[pa.Table, int]:
    """The `limit` most frequent combinations of keys, most frequent first, and by how much a count may be too low.

    groups: (paths, filter) as `current_rows` gives them. Holds a bounded number of combinations: where there are more,
    the rarer half is forgotten, and the most that one of these was counted is the bound (0 if none was).
    """
    names, lost = list(keys), 0
    held: pa.Table | None = None
    fresh: list[pa.Table] = []

    def counted() -> pa.Table:
        return merge_counts([*([held] if held is not None else []), *fresh], names)

    for paths, where in groups:
        for table in stream(paths, dict(keys), where):
            some = table.group_by(names).aggregate([([], "count_all")]).rename_columns([*names, "images"])
            fresh.append(some)
            if sum(t.num_rows for t in fresh) > COUNTED_GROUPS:
                held, fresh = counted(), []
            if held is not None and held.num_rows > COUNTED_GROUPS:
                held = held.sort_by([("images", "descending"), *((n, "ascending") for n in names)])
                lost += int(held["images"][COUNTED_GROUPS // 2].as_py())
                held = held.slice(0, COUNTED_GROUPS // 2).combine_chunks()
    if held is None and not fresh:
        return count_by([], keys), 0
    order = [("images", "descending"), *((n, "ascending") for n in names)]
    return counted().sort_by(order).slice(0, limit), lost


def merge_counts(tables: Sequence[pa.Table], keys: Sequence[str], value: str = "images") -> pa.Table:
    """Counts of several tables added up, sorted by the keys."""
    merged = pa.concat_tables(tables).group_by(list(keys)).aggregate([(value, "sum")])
    merged = merged.rename_columns([*keys, value])
    return merged.sort_by([(key, "ascending") for key in keys])


def current_rows(paths: Sequence[str]) -> list[tuple[list[str], Any]]:
    """(paths, filter) groups that leave out the rows which a later retry fetched again."""
    by_retry: dict[int, list[str]] = {}
    for path in paths:
        found = RETRY.search(path)
        by_retry.setdefault(int(found[1]) if found else 0, []).append(path)
    groups: list[tuple[list[str], Any]] = []
    later: list[pa.Array] = []
    for retry in sorted(by_retry, reverse=True):
        where = ~pc.field("image_id").isin(pa.concat_arrays(later)) if later else None
        groups.append((by_retry[retry], where))
        if retry:
            later += [c for t in stream(by_retry[retry], ["image_id"]) for c in t["image_id"].chunks]
    return groups


def with_hash(table: pa.Table, seed: int, purpose: str, column: str = "image_id") -> pa.Table:
    """The table and its `hash`, the order in which samples are taken."""
    keys = hash_keys(table[column].to_numpy(), seed, purpose)
    return table.append_column("hash", pa.array(keys, pa.uint64()))


def first_rows(
    tables: Iterable[pa.Table], group: str, count: int, order: Sequence[tuple[str, str]]
) -> list[dict[str, Any]]:
    """`first_per_group` as rows of Python."""
    found = first_per_group(tables, group, count, order)
    return [] if found is None else list(found.to_pylist())


def first_per_group(
    tables: Iterable[pa.Table], group: str, count: int, order: Sequence[tuple[str, str]]
) -> pa.Table | None:
    """The first `count` rows of each group, sorted by group and `order`, holding few more than that."""
    return firsts_per_group(tables, group, [(count, order)])[0]


def firsts_per_group(
    tables: Iterable[pa.Table], group: str, plans: Sequence[tuple[int, Sequence[tuple[str, str]]]]
) -> list[pa.Table | None]:
    """`first_per_group` for several (count, order) in one scan."""
    best: list[pa.Table | None] = [None] * len(plans)
    fresh: list[pa.Table] = []

    def cut() -> None:
        for place, (count, order) in enumerate(plans):
            known = best[place]
            every = pa.concat_tables([*([known] if known is not None else []), *fresh])
            best[place] = cut_groups(every, group, count, order)
        fresh.clear()

    for table in tables:
        fresh.append(table)
        if sum(t.num_rows for t in fresh) > 4 * BATCH_ROWS:
            cut()
    if fresh:
        cut()
    return best


def cut_groups(table: pa.Table, group: str, count: int, order: Sequence[tuple[str, str]]) -> pa.Table:
    """The first `count` rows of each group of one table."""
    table = table.sort_by([(group, "ascending"), *order]).combine_chunks()
    codes = pc.dictionary_encode(table[group].combine_chunks()).indices.to_numpy()
    starts = np.flatnonzero(np.r_[True, codes[1:] != codes[:-1]]) if len(codes) else np.empty(0, np.int64)
    lengths = np.diff(np.r_[starts, len(codes)])
    position = np.arange(len(codes)) - np.repeat(starts, lengths)
    return table.filter(pa.array(position < count))


def group_sizes(paths: Sequence[str], column: str, where: Any = None) -> Iterator[pa.Table]:
    """`group`, `images` for each value of an id column, in disjoint tables.

    The values are taken in passes by their low bits, so that memory stays bounded with hundreds of millions of groups.
    """
    if not paths:
        return
    rows = open_parts(paths).count_rows(filter=where)
    passes = 1
    while passes * GROUPS_PER_PASS < rows:
        passes *= 2
    for number in range(passes):
        mine = where
        if passes > 1:
            bits = pc.bit_wise_and(pc.field(column), pa.scalar(passes - 1, pa.uint64()))
            turn = bits == pa.scalar(number, pa.uint64())
            mine = turn if where is None else turn & where
        yield count_by(paths, {"group": pc.field(column)}, mine)


def histogram(paths: Sequence[str], expression: Any, edges: np.ndarray, where: Any = None) -> np.ndarray:
    """(len(edges) - 1,) int64: values per bin; what lies outside goes into the first or last bin, null is left out."""
    counts = np.zeros(len(edges) - 1, np.int64)
    for table in stream(paths, {"value": expression}, where):
        values = pc.drop_null(table["value"]).to_numpy()
        values = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        counts += np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0]
    return counts


def id_range(file: pq.ParquetFile) -> tuple[int | None, int | None]:
    """Smallest and largest `image_id` by the footer of a Parquet file; (None, None) where it does not say."""
    metadata = file.metadata
    leaf = next((i for i in range(metadata.num_columns) if metadata.schema.column(i).path == "image_id"), None)
    low, high = None, None
    for group in range(metadata.num_row_groups):
        chunk = None if leaf is None else metadata.row_group(group).column(leaf)
        if chunk is None or not chunk.is_stats_set or not chunk.statistics.has_min_max:
            return None, None
        least, most = int(chunk.statistics.min), int(chunk.statistics.max)
        low, high = (least, most) if low is None or high is None else (min(low, least), max(high, most))
    return low, high


def cut_text(name: str) -> Any:
    """A column of images, long strings cut."""
    if name in ("url", "error", "label", "caption"):
        return pc.utf8_slice_codeunits(pc.field(name), 0, TEXT_CHARACTERS)
    return pc.field(name)
