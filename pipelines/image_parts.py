"""Parts of `IMAGES` tables: which ones a generation takes, and how they are read."""

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from curation import parquet
from curation.schemas import IMAGES
from pipelines.context import Context
from pipelines.run_directory import Generation


@dataclass(frozen=True)
class Part:
    """A part of an input stage: which images, and where the table lies."""

    name: str
    path: str
    stage: str
    rows: int


def input_parts(context: Context, generation: Generation) -> list[Part]:
    """The parts of the input generations that a generation of score takes, in the order of image ids."""
    found = [
        Part(record.name, taken.writer.path(record.name), stage, record.rows)
        for stage, numbers in generation.consumed.items()
        for taken in context.run.stage(stage).generations()
        if taken.number in numbers
        for record in taken.parts
    ]
    return sorted(found, key=lambda part: part.name)


def read_images(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """A part of an `IMAGES` table, its columns of the types of the schema."""
    names = list(columns) if columns is not None else IMAGES.names
    table = parquet.read_table(path, names)
    return table.cast(pa.schema([IMAGES.field(name) for name in names]))


def role(source: str) -> str:
    """pool, seed or reference, of a value of the column `source`."""
    return source.split(":", 1)[0]
