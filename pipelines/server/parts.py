"""The tables of a run as one stream of images in the order of their ids, with what every stage says of each."""

import re
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import parquet
from curation.audit.scans import id_range
from curation.errors import UserError
from pipelines.description import current_parts, stage_names
from pipelines.run_directory import RunDirectory

CUT = {"url": 2_000, "caption": 2_000, "label": 200, "error": 500}
"""Characters kept of strings from outside; look-ups by URL and words see them whole, up to TEXT."""
TEXT = 20_000
BLOCK_ROWS = 1 << 16
RETRY = re.compile(r"-r(\d+)$")


@dataclass(frozen=True)
class RunParts:
    """Paths of the parts that count, empty where the run has no such stage."""

    images: tuple[str, ...]
    duplicates: tuple[str, ...]
    clusters: tuple[str, ...]
    retrieval: tuple[str, ...]
    mix: tuple[str, ...]
    embeddings: dict[str, tuple[str, ...]]


def run_parts(run: RunDirectory) -> RunParts:
    """What a run has now. images: the newest table of them, the filter's, else the scores', else what was fetched."""
    images: list[str] = []
    for stages in (("filter",), ("score",), ("download", "import")):
        images = [path for stage in stages for path in current_parts(run, stage)]
        if images:
            break
    models = {name: tuple(current_parts(run, name)) for name in stage_names(run) if name.startswith("embed/")}
    spaces = {name.removeprefix("embed/"): paths for name, paths in models.items() if paths}
    copies = [
        generation.file(file)
        for generation in run.stage("score").generations()
        for part in generation.parts
        for file in part.files
        if file.startswith("copy_embedding/")
    ]
    if copies:
        spaces["copies"] = tuple(copies)
    return RunParts(
        tuple(images),
        tuple(current_parts(run, "dedup")),
        tuple(current_parts(run, "cluster")),
        tuple(current_parts(run, "retrieve")),
        tuple(current_parts(run, "mix")),
        spaces,
    )


def levels_of(parts: RunParts) -> int:
    """Levels of the hierarchy of clusters, 0 without one."""
    if not parts.clusters:
        return 0
    names = parquet.open_file(parts.clusters[0]).schema_arrow.names
    return sum(re.fullmatch(r"cluster_\d+", name) is not None for name in names)


def images(parts: RunParts) -> Iterator[pa.Table]:
    """All images in blocks by ascending id: the columns of IMAGES, `host`, and those of `beside`.

    Of several rows of one id the usable one counts, else the last. Raises UserError for ids out of order.
    """
    others = [Beside(paths) for paths in (parts.duplicates, parts.clusters, parts.mix)]
    last = -1
    for group in _by_part(parts.images):
        for table in _blocks(group):
            joined = _once(table)
            ids = joined["image_id"].to_numpy()
            if not len(ids):
                continue
            if int(ids[0]) <= last:
                raise UserError(f"{group[0]}: ids out of order; tables of a run are sorted by image_id", exit_code=1)
            last = int(ids[-1])
            for other in others:
                joined = other.joined(joined, ids)
            yield joined


def _by_part(paths: Sequence[str]) -> Iterator[list[str]]:
    """Parts that hold rows of the same images, a part and its retries, in the order of ids."""
    found: dict[str, list[tuple[int, str]]] = {}
    for path in paths:
        stem = path.rsplit("/", 1)[-1].removesuffix(".parquet")
        retry = RETRY.search(stem)
        base = stem[: retry.start()] if retry else stem
        found.setdefault(base, []).append((int(retry[1]) if retry else 0, path))
    for base in sorted(found):
        yield [path for _, path in sorted(found[base])]


def _blocks(group: Sequence[str]) -> Iterator[pa.Table]:
    if len(group) > 1:
        yield pa.concat_tables([pa.concat_tables(list(_read(path))) for path in group])
        return
    yield from _read(group[0])


def _read(path: str) -> Iterator[pa.Table]:
    with parquet.open_file(path) as file, parquet.named(path):
        for batch in file.iter_batches(BLOCK_ROWS, use_threads=False):
            yield prepared(pa.Table.from_batches([batch]))


def prepared(table: pa.Table) -> pa.Table:
    """A block of IMAGES with its `host`, `full_url` and `text`, and its strings cut."""
    block = pa.table(table.columns, names=table.schema.names)
    if "url" in block.schema.names:
        block = block.append_column("host", hosts(block["url"]))
        block = block.append_column("full_url", block["url"])
        block = block.append_column("text", pc.utf8_slice_codeunits(block["caption"], 0, TEXT))
    for name, limit in CUT.items():
        at = block.schema.get_field_index(name)
        if at >= 0:
            block = block.set_column(at, name, pc.utf8_slice_codeunits(block[name], 0, limit))
    return block


def hosts(urls: Any) -> Any:
    """The host of each URL in lower case, with its port; as `curation.audit.scans.host`, but null without a URL."""
    return pc.utf8_lower(
        pc.replace_substring_regex(
            pc.utf8_slice_codeunits(urls, 0, 400),
            pattern=r"(?s)^[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@?#]*@)?([^/?#]*).*$",
            replacement=r"\1",
        )
    )


def _once(table: pa.Table) -> pa.Table:
    ids = table["image_id"].to_numpy()
    if (ids[1:] > ids[:-1]).all():
        return table
    usable = pc.equal(table["status"], "ok").to_numpy(zero_copy_only=False)
    order = np.lexsort((np.arange(len(ids)), usable, ids))
    last = np.append(ids[order][1:] != ids[order][:-1], True)
    return table.take(pa.array(order[last]))


class Beside:
    """A table sorted by `image_id` over its parts, joined to blocks of images in ascending order."""

    KEPT = 4

    def __init__(self, paths: Sequence[str]) -> None:
        ranges: list[tuple[int, int, str]] = []
        for path in paths:
            file = parquet.open_file(path)
            if file.metadata.num_rows:
                low, high = id_range(file)
                ranges.append((low or 0, (1 << 64) - 1 if high is None else high, path))
        self.ranges = sorted(ranges)
        self.schema = parquet.open_file(paths[0]).schema_arrow if paths else None
        self._read: OrderedDict[str, pa.Table] = OrderedDict()

    def joined(self, table: pa.Table, ids: np.ndarray) -> pa.Table:
        """The block with the columns of this table, null where it has no row. ids: (n,) uint64 of the block."""
        if self.schema is None:
            return table
        low, high = int(ids[0]), int(ids[-1])
        found = [self._part(path) for least, most, path in self.ranges if least <= high and most >= low]
        names = [name for name in self.schema.names if name != "image_id"]
        if not found:
            for name in names:
                table = table.append_column(name, pa.nulls(len(ids), self.schema.field(name).type))
            return table
        other = pa.concat_tables(found)
        other_ids = other["image_id"].to_numpy()
        order = np.argsort(other_ids, kind="stable")
        at = np.minimum(np.searchsorted(other_ids, ids, side="right", sorter=order) - 1, len(order) - 1)
        rows = order[np.maximum(at, 0)]
        missing = (at < 0) | (other_ids[rows] != ids)
        indices = pa.array(rows, pa.int64(), mask=missing)
        for name in names:
            table = table.append_column(name, other[name].take(indices))
        return table

    def _part(self, path: str) -> pa.Table:
        if path not in self._read:
            self._read[path] = parquet.read_table(path).replace_schema_metadata(None)
            while len(self._read) > self.KEPT:
                self._read.popitem(last=False)
        return self._read[path]


def stream(paths: Sequence[str], columns: Sequence[str]) -> Iterator[Any]:
    """Record batches of some columns of parts."""
    for path in paths:
        with parquet.open_file(path) as file, parquet.named(path):
            yield from file.iter_batches(BLOCK_ROWS, columns=list(columns), use_threads=False)
