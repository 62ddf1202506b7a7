"""A registered list inside its generation: Parquet files whose row groups are the rows of one part each.

A part's worker reads its own row group and nothing else; the list is neither held by the driver nor sent
with tasks. `list/index.json` is written last and says that all is there.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from curation import parquet, storage
from pipelines.run_directory import Generation

PARTS_PER_PIECE = 100
PIECE = pa.schema(
    [
        pa.field("image_id", pa.uint64(), nullable=False),
        ("place", pa.string()),  # a URL, or the file of an imported image
        ("caption", pa.string()),
        ("label", pa.string()),
        ("url", pa.string()),
        ("error", pa.string()),  # known before reading: the file's name, a link out of the folder
        ("duplicate_of", pa.uint64()),
    ]
)


@dataclass(frozen=True)
class PieceTask:
    """Which rows a part is made of."""

    path: str
    row_group: int
    source: str

    def read(self) -> pa.Table:
        """Its rows, of `PIECE`."""
        with parquet.open_file(self.path) as file, parquet.named(self.path):
            return file.read_row_group(self.row_group)


def write_pieces(generation: Generation, number: int, tables: Iterable[pa.Table], rows_per_part: int) -> int:
    """Write the rows of one source; returns how many there are."""
    rows = pieces = 0
    parts: list[pa.Table] = []
    for part in _cut(tables, rows_per_part):
        parts.append(part)
        rows += part.num_rows
        if len(parts) == PARTS_PER_PIECE:
            _write(generation, number, pieces, parts)
            parts, pieces = [], pieces + 1
    if parts:
        _write(generation, number, pieces, parts)
    return rows


def write_index(generation: Generation, rows: Sequence[tuple[int, int]]) -> None:
    """Say that the pieces are whole. rows: (source number, rows) in order."""
    storage.write_whole(generation.file("list/index.json"), (json.dumps({"sources": rows}) + "\n").encode())


def read_index(generation: Generation) -> list[tuple[int, int]] | None:
    """What write_index stored, None if the pieces are not whole."""
    path = generation.file("list/index.json")
    if not storage.exists(path):
        return None
    return [(int(number), int(rows)) for number, rows in json.loads(storage.read_bytes(path))["sources"]]


def tasks(
    generation: Generation,
    index: Sequence[tuple[int, int]],
    rows_per_part: int,
    names: dict[int, str],
    suffix: str = "",
) -> list[tuple[str, PieceTask]]:
    """(part name, task) of every part, in the order of ids. names: source names by number."""
    return [
        (
            f"{part_name(number, part)}{suffix}",
            PieceTask(_path(generation, number, part // PARTS_PER_PIECE), part % PARTS_PER_PIECE, names[number]),
        )
        for number, rows in index
        for part in range(-(-rows // rows_per_part))
    ]


def part_name(number: int, index: int) -> str:
    """`part-SSS-IIIIII`."""
    return f"part-{number:03d}-{index:06d}"


def _path(generation: Generation, number: int, piece: int) -> str:
    return generation.file(f"list/{number:03d}-{piece:06d}.parquet")


def _cut(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` rows, the last one shorter."""
    held: list[pa.Table] = []
    count = 0
    for table in tables:
        held.append(table)
        count += table.num_rows
        while count >= rows:
            whole = pa.concat_tables(held)
            yield whole.slice(0, rows).combine_chunks()
            held, count = [whole.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(held).combine_chunks()


def _write(generation: Generation, number: int, piece: int, parts: Sequence[pa.Table]) -> None:
    storage.write_whole(_path(generation, number, piece), parquet.bytes_of(PIECE, parts))
