"""Taking images out of what a run wrote: bytes of shards, rows of parts and their side files. Runs in workers.

A part is done in this order: bytes in its shards, its side files, the part itself; each file is written whole, and its
footer says under which certificate how much went. So a part that was interrupted is done again to the same end, and
one that was finished tells what it lost.
"""

import json
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import parquet, storage
from curation.hidden import is_hidden
from pipelines.blocking import emptied
from pipelines.erasure import file_sha256, overwrite
from pipelines.run_directory import FILES_KEY

REMOVED_KEY = b"curate.forgotten"
"""Parquet metadata: per certificate what went out of the file."""
BLOCK = tarfile.BLOCKSIZE
NESTED = {"retrieved_by": "seed_id", "references": "reference_id"}
"""Lists of structs, and which of their fields names an image."""


@dataclass(frozen=True)
class Removal:
    """What all tasks share. ids: (n,) uint64, ascending. root: of the run."""

    root: str
    certificate: str
    ids: np.ndarray


@dataclass
class Done:
    """What was done to a part or another file."""

    path: str
    rows: int
    bytes: int
    sha256: str
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Of a part: its side files as they are now."""
    removed: Counter[str] = field(default_factory=Counter)


def take_out_of_part(task: tuple[str, str], removal: Removal) -> Done | None:
    """Rewrite a part and its side files, if images are to go out of them. task: (folder of the generation, name)."""
    folder, name = task
    path = storage.join(folder, f"{name}.parquet")
    with _opened(path) as file:
        metadata = dict(file.schema_arrow.metadata or {})
        rows = file.metadata.num_rows
        files: dict[str, dict[str, Any]] = json.loads(metadata.get(FILES_KEY, b"{}"))
        known = _removed(metadata, removal)
        tables = [storage.join(folder, relative) for relative in sorted(files) if relative.endswith(".parquet")]
        if known is None and not _speaks_of(file, removal.ids) and not any(_is_touched(t, removal) for t in tables):
            return None
    data = storage.read_bytes(path)
    if known is not None:
        return Done(path, rows, len(data), storage.sha256(data), files, known)
    table = _table(path, data)
    counts: Counter[str] = Counter()
    shards = _erase_bytes(table, folder, removal, counts)
    for relative in sorted(files):
        if relative.endswith(".parquet"):
            done = take_out_of_table(storage.join(folder, relative), removal)
            if done is not None:
                files[relative] = {"bytes": done.bytes, "sha256": done.sha256}
                kind = relative.split("/", 1)[0].replace("_", " ")
                counts.update({f"{what} of {kind}": count for what, count in done.removed.items()})
        elif relative in shards:
            files[relative] |= {"sha256": shards[relative]}
    left, mine = without(table, removal.ids)
    counts += mine
    metadata[FILES_KEY] = json.dumps(files, sort_keys=True).encode()
    done = _write(path, left, metadata, removal, counts)
    done.files = files
    return done


@contextmanager
def _opened(path: str) -> Iterator[pq.ParquetFile]:
    """A Parquet file of which only what is asked for is read."""
    with parquet.open_file(path) as file, parquet.named(path):
        yield file


def _table(path: str, data: bytes) -> pa.Table:
    """What is written anew gets new checksums: the old ones are looked at first."""
    with parquet.named(path):
        return parquet.open_bytes(data).read()


def _is_touched(path: str, removal: Removal) -> bool:
    with _opened(path) as file:
        return _removed(file.schema_arrow.metadata or {}, removal) is not None or _speaks_of(file, removal.ids)


def _speaks_of(file: pq.ParquetFile, ids: np.ndarray) -> bool:
    """Whether a table has anything that `without` takes out; reads its columns of ids only."""
    names = [name for name in ("image_id", "seed_id", "nearest_id", *NESTED) if name in file.schema_arrow.names]
    return bool(names) and bool(without(file.read(names), ids)[1])


def take_out_of_table(path: str, removal: Removal) -> Done | None:
    """Rewrite a Parquet file that is not a part, if images are to go out of it."""
    if not _is_touched(path, removal):
        return None
    data = storage.read_bytes(path)
    table = _table(path, data)
    metadata = dict(table.schema.metadata or {})
    known = _removed(metadata, removal)
    if known is not None:
        return Done(path, table.num_rows, len(data), storage.sha256(data), {}, known)
    left, counts = without(table, removal.ids)
    return _write(path, left, metadata, removal, counts)


def take_out_of_keys(path: str, removal: Removal) -> Done | None:
    """Hashes of listed URLs (`pipelines/download/url_keys.py`): those of the images go."""
    data = storage.read_bytes(path)
    with parquet.named(path):
        file = parquet.open_bytes(data)
    metadata = dict(file.schema_arrow.metadata or {})
    known = _removed(metadata, removal)
    if known is not None:
        return Done(path, file.metadata.num_rows, len(data), "", {}, known)
    with parquet.named(path):
        table = file.read()
    gone = is_hidden(table["id"].to_numpy(), removal.ids)
    if not gone.any():
        return None
    counts = Counter({"hashes of listed URLs": int(gone.sum())})
    return _write(path, table.filter(pa.array(~gone)), metadata, removal, counts)


def take_out_of_piece(path: str, removal: Removal) -> Done | None:
    """A registered list (`pipelines/pieces.py`): its rows stay, for they are counted by; what they say goes."""
    with parquet.named(path):
        file = parquet.open_bytes(storage.read_bytes(path))
        groups = [file.read_row_group(group) for group in range(file.num_row_groups)]
    masks = [is_hidden(group["image_id"].to_numpy(), removal.ids) for group in groups]
    metadata = dict(file.schema_arrow.metadata or {})
    known = _removed(metadata, removal)
    rows = int(sum(mask.sum() for mask in masks))
    if known is not None or not rows:
        return None if known is None else Done(path, 0, 0, "", {}, known)
    counts = Counter({"rows of the list emptied": rows})
    schema = file.schema_arrow.with_metadata(_noted(metadata, removal, counts))
    data = parquet.bytes_of(
        schema, (emptied(group, mask).cast(schema) for group, mask in zip(groups, masks, strict=True))
    )
    storage.write_whole(path, data)
    return Done(path, 0, len(data), storage.sha256(data), {}, counts)


def without(table: pa.Table, ids: np.ndarray) -> tuple[pa.Table, Counter[str]]:
    """A table without the rows of these images, and without what other rows say of them; and how much went.

    Rows that a forgotten seed drew go as well. Edges of a forest stay: their ends are anonymous.
    """
    counts: Counter[str] = Counter()
    names = table.column_names
    if "low_space" in names:
        return table, counts
    gone = np.zeros(table.num_rows, bool)
    for name in ("image_id", "seed_id"):
        if name in names:
            gone |= _is_among(table[name], ids)
    if gone.any():
        counts["rows"] = int(gone.sum())
        table = table.filter(pa.array(~gone))
    for name, inner in NESTED.items():
        if name in names:
            table, entries = _without_entries(table, name, inner, ids)
            counts.update({f"entries of {name}": entries} if entries else {})
    if "nearest_id" in names:
        near = _is_among(table["nearest_id"], ids)
        if near.any():
            counts["nearest neighbours"] = int(near.sum())
            for name in ("nearest_id", "similarity"):
                if name not in names:
                    continue
                at, kind = names.index(name), table.schema.field(name)
                values = table[name].to_numpy(zero_copy_only=False)
                null = near | table[name].is_null().to_numpy(zero_copy_only=False)
                kept = np.where(null, 0, values).astype(kind.type.to_pandas_dtype())
                table = table.set_column(at, kind, pa.array(kept, kind.type, mask=null))
    return table, counts


def _is_among(column: pa.ChunkedArray, ids: np.ndarray) -> np.ndarray:
    values = np.asarray(column.fill_null(0).to_numpy(), np.uint64)
    return np.asarray(is_hidden(values, ids) & column.is_valid().to_numpy(zero_copy_only=False))


def _without_entries(table: pa.Table, name: str, inner: str, ids: np.ndarray) -> tuple[pa.Table, int]:
    column = pa.concat_arrays(table[name].chunks) if table[name].num_chunks else pa.array([], table[name].type)
    values = column.flatten()
    stays = ~_is_among(pa.chunked_array([values.field(inner)], pa.uint64()), ids)
    if stays.all():
        return table, 0
    lengths = np.asarray(column.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    owner = np.repeat(np.arange(len(lengths)), lengths)
    kept = np.bincount(owner[stays], minlength=len(lengths))
    offsets = pa.array(np.r_[0, np.cumsum(kept)].astype(np.int32))
    made = pa.ListArray.from_arrays(offsets, values.filter(pa.array(stays)), type=column.type, mask=column.is_null())
    at = table.column_names.index(name)
    return table.set_column(at, table.schema.field(name), made), int((~stays).sum())


def _erase_bytes(table: pa.Table, folder: str, removal: Removal, counts: Counter[str]) -> dict[str, str]:
    """Overwrite the bytes of images in the tars beside a part; the new sha256 of each tar that was touched."""
    if "shard" not in table.column_names:
        return {}
    rows = table.select(["image_id", "shard", "offset", "length"])
    rows = rows.filter(pa.array(_is_among(rows["image_id"], removal.ids))).to_pylist()
    inside = folder.removeprefix(removal.root.rstrip("/") + "/")
    found: dict[str, str] = {}
    for shard in sorted({row["shard"] for row in rows if (row["shard"] or "").startswith(f"{inside}/")}):
        places = [(row["offset"], row["length"]) for row in rows if row["shard"] == shard]
        path = storage.join(removal.root, shard)
        erase(path, places)
        relative = shard.removeprefix(f"{inside}/")
        found[relative] = file_sha256(path)
        kind = "blurred copies" if relative.startswith("faces/") else "images in shards"
        counts.update({kind: len(places), f"bytes of {kind}": sum(length for _, length in places)})
    return found


def erase(path: str, places: Sequence[tuple[int, int]]) -> None:
    """Overwrite images in a tar with zeros, and the JSON that follows each with {}. places: (offset, length)."""
    patches = [(offset, bytes(length)) for offset, length in places]
    for offset, length in places:
        beside = _sidecar(path, offset, length)
        if beside is not None:
            patches.append((beside[0], b"{}".ljust(beside[1])[: beside[1]]))
    overwrite(path, sorted(patches))


def _sidecar(path: str, offset: int, length: int) -> tuple[int, int] | None:
    """(offset, length) of the JSON that belongs to the image at a place of a tar; None where none follows it."""
    header = offset + -(-length // BLOCK) * BLOCK
    try:
        image = tarfile.TarInfo.frombuf(storage.read_bytes(path, offset - BLOCK, BLOCK), "utf-8", "replace")
        other = tarfile.TarInfo.frombuf(storage.read_bytes(path, header, BLOCK), "utf-8", "replace")
    except (tarfile.HeaderError, ValueError, OSError):
        return None
    same = image.name.rsplit(".", 1)[0] == other.name.removesuffix(".json") and other.name.endswith(".json")
    return (header + BLOCK, other.size) if same else None


def _removed(metadata: Mapping[bytes, bytes], removal: Removal) -> Counter[str] | None:
    """What went out of a file under this certificate; None if it was not done yet."""
    found = json.loads(metadata.get(REMOVED_KEY, b"{}")).get(removal.certificate)
    return None if found is None else Counter(found)


def _noted(metadata: Mapping[bytes, bytes], removal: Removal, counts: Counter[str]) -> dict[bytes, bytes]:
    told = json.loads(metadata.get(REMOVED_KEY, b"{}")) | {removal.certificate: dict(counts)}
    return {**metadata, REMOVED_KEY: json.dumps(told, sort_keys=True).encode()}


def _write(path: str, table: pa.Table, metadata: dict[bytes, bytes], removal: Removal, counts: Counter[str]) -> Done:
    data = storage.table_bytes(table.replace_schema_metadata(_noted(metadata, removal, counts)))
    storage.write_whole(path, data)
    return Done(path, table.num_rows, len(data), storage.sha256(data), {}, counts)
