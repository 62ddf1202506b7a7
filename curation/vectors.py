"""Embeddings on disk: folders of Parquet with `image_id` and `embedding`, ours or from elsewhere.

A reader refuses to mix two models or two dimensions, and takes float16 or float32. The similarity of a
pair is *defined* as the float64 dot product of the two stored vectors, rounded to float32.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import parquet, storage
from curation.errors import UserError
from curation.halves import squared_lengths
from curation.schemas import embeddings_schema

MODEL_KEY = b"curate.model"
NORM_TOLERANCE = 2e-3
"""A stored vector whose length is further from 1 is normalised when read (float16 rounding stays below)."""


@dataclass(frozen=True)
class Partition:
    """One Parquet file of vectors."""

    path: str
    rows: int
    first_row: int
    """Dense row number of its first vector: partitions in order, a prefix sum of their counts."""


@dataclass(frozen=True)
class VectorSet:
    """Embeddings of one model over ordered partitions; opening reads footers only."""

    partitions: tuple[Partition, ...]
    dimension: int
    dtype: str
    model: str | None
    """The model's identity as JSON, None in files from elsewhere."""

    @property
    def rows(self) -> int:
        return sum(p.rows for p in self.partitions)

    def read(self, partition: Partition) -> tuple[np.ndarray, np.ndarray]:
        """(ids (n,) uint64, vectors (n, d) of the stored type) of a partition.

        Raises UserError for null, NaN, infinite or zero vectors. Rows further than NORM_TOLERANCE from unit
        length are normalised (float64, rounded to the stored type).
        """
        return read_vectors(partition.path, self.dimension)

    def blocks(self) -> Iterator[tuple[Partition, np.ndarray, np.ndarray]]:
        """(partition, ids, vectors) in order."""
        for partition in self.partitions:
            ids, vectors = self.read(partition)
            yield partition, ids, vectors

    def all_ids(self) -> np.ndarray:
        """(rows,) uint64, in dense row order."""
        parts = [_ids(parquet.read_table(p.path, ["image_id"]), p.path) for p in self.partitions]
        return np.concatenate(parts) if parts else np.empty(0, np.uint64)


def open_folder(folder: str) -> VectorSet:
    """The embeddings in `folder`/*.parquet. Raises UserError if there are none, or they do not fit together."""
    paths = storage.list_files(folder, ".parquet")
    if not paths:
        where = "is empty of *.parquet files" if storage.exists(folder) else "does not exist"
        raise UserError(f"{folder}: {where}; embeddings are Parquet files with columns image_id and embedding")
    try:
        return open_files(paths)
    except parquet.DamagedError as error:  # a folder that was asked for, not a part that a run wrote
        raise UserError(str(error).partition(";")[0]) from error


def open_files(paths: Sequence[str]) -> VectorSet:
    """The embeddings in these files, in this order. Files without rows are passed over."""
    if not paths:
        raise UserError("no embeddings to read: run `curate embed` or `curate filter` first")
    partitions: list[Partition] = []
    first: tuple[str, int, str, str | None] | None = None
    row = 0
    for path in paths:
        rows, dimension, dtype, model = _describe(path)
        mine = (path, dimension, dtype, model)
        if first is None:
            first = mine
        elif dimension != first[1]:
            raise UserError(
                f"{path}: vectors of {dimension} dimensions beside {first[1]} in {first[0]}; one folder holds one model"
            )
        elif model != first[3]:
            raise UserError(
                f"{path}: made by {_name(model)}, but {first[0]} by {_name(first[3])}; "
                "embeddings of two models cannot be compared"
            )
        elif dtype != first[2]:
            raise UserError(f"{path}: {dtype} vectors beside {first[2]} in {first[0]}; one folder holds one type")
        if rows:
            partitions.append(Partition(path, rows, row))
            row += rows
    assert first is not None
    return VectorSet(tuple(partitions), first[1], first[2], first[3])


def refuse_other_model(one: VectorSet, other: VectorSet, what: str, other_what: str) -> None:
    """Raises UserError if two sets cannot be compared: other dimension, or both models known and different."""
    if one.dimension != other.dimension:
        raise UserError(
            f"{other_what} has vectors of {other.dimension} dimensions, {what} of {one.dimension}: "
            "embed both with one model"
        )
    if one.model is not None and other.model is not None and one.model != other.model:
        raise UserError(
            f"{other_what} was embedded by {_name(other.model)}, {what} by {_name(one.model)}: "
            "embed both with one model"
        )


def refuse_repeated_ids(ids: np.ndarray, where: str) -> None:
    """Raises UserError if an id occurs twice. ids: (n,) uint64."""
    ordered = np.sort(ids)
    repeated = np.flatnonzero(ordered[1:] == ordered[:-1])
    if len(repeated):
        raise UserError(
            f"{where}: image_id {ordered[repeated[0]]} occurs more than once ({len(repeated):,} repeats); "
            "ids must be unique"
        )


def read_vectors(
    path: str, dimension: int, row_groups: Sequence[int] | None = None, first: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, vectors) of one file, or of some of its row groups: see VectorSet.read. first: only so many rows of it."""
    with parquet.named(path):
        columns = ["image_id", "embedding"]
        # Not `read_table`: its threads and buffers cost as much again as the decoding.
        file = parquet.open_file(path)
        groups = range(file.num_row_groups) if row_groups is None else row_groups
        if first is None:
            table = file.read_row_groups(list(groups), columns=columns, use_threads=False)
        else:
            batches = file.iter_batches(first, row_groups=list(groups), columns=columns, use_threads=False)
            table = pa.Table.from_batches(list(itertools.islice(batches, 1)), file.schema_arrow).select(columns)
    column = table["embedding"].combine_chunks()
    if isinstance(column, pa.ChunkedArray):
        column = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    if column.null_count:
        raise UserError(f"{path}: {column.null_count} null embeddings; leave such rows out")
    flat = column.values.slice(column.offset * dimension, len(column) * dimension)
    if flat.null_count:
        raise UserError(f"{path}: null values inside embeddings; leave such rows out")
    vectors = _numbers(flat).reshape(-1, dimension)
    ids = _ids(table, path)
    return ids, _checked(vectors, ids, path)


def embeddings_table(ids: np.ndarray, vectors: np.ndarray) -> pa.Table:
    """A table of the `embeddings` schema. ids: (n,) uint64; vectors: (n, d), made unit length, stored float16."""
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1, keepdims=True)
    unit = (vectors / np.where(lengths > 0, lengths, 1)).astype(np.float16)
    values = pa.array(np.ascontiguousarray(unit).reshape(-1), pa.float16())
    column = pa.FixedSizeListArray.from_arrays(values, vectors.shape[1])
    schema = embeddings_schema(vectors.shape[1])
    return pa.Table.from_arrays(
        [pa.array(ids.astype(np.uint64), pa.uint64()), column.cast(schema.field(1).type)], schema=schema
    )


def similarity(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The definition: (n, d), (n, d) stored vectors -> (n,) float32, row by row in float64."""
    products: np.ndarray = np.einsum("nd,nd->n", left.astype(np.float64), right.astype(np.float64))
    return products.astype(np.float32)


def _checked(vectors: np.ndarray, ids: np.ndarray, path: str) -> np.ndarray:
    squares = squared_lengths(vectors)
    bad = ~np.isfinite(squares) | (squares == 0)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        kind = "a zero vector" if squares[row] == 0 else "NaN or infinite values"
        raise UserError(f"{path}: image_id {ids[row]} has {kind} ({int(bad.sum())} such rows); leave them out")
    off = np.abs(np.sqrt(squares) - 1) > NORM_TOLERANCE
    if not off.any():
        return vectors
    vectors = vectors.copy()
    long = vectors[off].astype(np.float64)
    vectors[off] = (long / np.linalg.norm(long, axis=1, keepdims=True)).astype(vectors.dtype)
    return vectors


def _ids(table: pa.Table, path: str) -> np.ndarray:
    column = table["image_id"]
    if column.null_count:
        raise UserError(f"{path}: {column.null_count} null image_id values; every row needs an id")
    return np.concatenate([np.empty(0, np.uint64), *(_numbers(chunk).astype(np.uint64) for chunk in column.chunks)])


def _numbers(array: pa.Array) -> np.ndarray:
    """An array without nulls, mapped. Not by `to_numpy`: that imports pandas, a quarter of a second of each worker."""
    kind = np.dtype(array.type.to_pandas_dtype())
    if not len(array):
        return np.empty(0, kind)
    return np.frombuffer(array.buffers()[1], kind, len(array), array.offset * kind.itemsize)


def _describe(path: str) -> tuple[int, int, str, str | None]:
    file = parquet.open_file(path)
    schema = file.schema_arrow
    for name in ("image_id", "embedding"):
        if name not in schema.names:
            raise UserError(
                f"{path}: no column `{name}` (it has {', '.join(schema.names) or 'none'}); "
                "embeddings need image_id and embedding"
            )
    kind = schema.field("embedding").type
    if schema.field("image_id").type != pa.uint64():
        raise UserError(f"{path}: image_id is {schema.field('image_id').type}, expected uint64")
    if not pa.types.is_fixed_size_list(kind) or kind.value_type not in (pa.float16(), pa.float32()):
        raise UserError(f"{path}: embedding is {kind}, expected a fixed-size list of float16 or float32")
    model = (schema.metadata or {}).get(MODEL_KEY)
    return file.metadata.num_rows, kind.list_size, str(kind.value_type), model.decode() if model else None


def _name(model: str | None) -> str:
    if model is None:
        return "an unnamed model"
    try:
        return str(json.loads(model).get("name", model))
    except (ValueError, AttributeError):
        return model
