"""The rows of a source as memory-mapped files: any row in O(1), nothing of it in Python, shared by all workers.

Parquet cannot be entered at a random row for less than a row group, so the columns a trainer needs are rewritten once,
24 bytes per image (28 with weights), under a name made from the source's content; a later start only maps them.
"""

import fcntl
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import hidden, parquet, storage
from curation.errors import UserError
from training.data.sources import Listing, find, walk

REVISION = 1
ROW = np.dtype([("image_id", "<u8"), ("offset", "<u8"), ("length", "<u4"), ("shard", "<u4")])
REMEMBERED_SHARDS = 1 << 17
HIDDEN = "hidden.u64"
NOTHING_HIDDEN = np.empty(0, np.uint64)


@dataclass(frozen=True)
class Index:
    """rows: (n,) ROW. weights: (n,) float32, or None where all are equal. Both memory-mapped."""

    listing: Listing
    folder: Path
    fingerprint: str
    rows: np.ndarray
    weights: np.ndarray | None
    _names: np.ndarray
    _name_ends: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    def __reduce__(self) -> tuple[Any, ...]:
        """To another process go the names of the files, not what they hold."""
        return (_mapped, (self.listing, self.folder, self.fingerprint))

    def shard(self, number: int) -> str:
        """The location of a shard, as the manifest writes it."""
        start = int(self._name_ends[number - 1]) if number else 0
        return bytes(self._names[start : int(self._name_ends[number])]).decode()

    @property
    def shards(self) -> int:
        return len(self._name_ends)

    @property
    def hidden(self) -> np.ndarray:
        """(n,) uint64, ascending: images of the source that the index leaves out, as its run said when it was made."""
        path = self.folder / HIDDEN
        return np.fromfile(path, np.uint64) if path.exists() else NOTHING_HIDDEN

    def part_tables(self, columns: list[str]) -> Iterator[pa.Table]:
        """The rows that the index has, and those without a location, in its order; see `part_tables`."""
        out = self.hidden
        for table in part_tables(self.listing, ["image_id", *(c for c in columns if c != "image_id")]):
            yield hidden.hide(table, out)


def open_index(source: str, folder: str | None = None) -> Index:
    """The index of `source`, made where it is not yet there. Raises UserError for a source without images."""
    listing = find(source)
    base = Path(folder) if folder else _default_folder()
    with _build_lock(base):
        if listing.is_tree:
            made, fingerprint = _build_tree(listing, base)
        else:
            out = hidden.hidden_ids(listing.run) if listing.run is not None else NOTHING_HIDDEN
            fingerprint = _fingerprint(listing, out)
            made = base / fingerprint
            if not (made / "complete.json").exists():
                _publish(made, lambda aside: _build_parts(listing, aside, out))
    facts = json.loads((made / "complete.json").read_text())
    if not facts["rows"]:
        raise UserError(f"{source}: {_emptiness(listing, facts)}")
    return _mapped(listing, made, fingerprint)


def _mapped(listing: Listing, made: Path, fingerprint: str) -> Index:
    weights = made / "weights.f32"
    return Index(
        listing,
        made,
        fingerprint,
        np.memmap(made / "rows.bin", ROW, "r"),
        np.memmap(weights, np.float32, "r") if weights.exists() else None,
        np.memmap(made / "names.bin", np.uint8, "r"),
        np.memmap(made / "name_ends.u64", np.uint64, "r"),
    )


def part_tables(listing: Listing, columns: list[str]) -> Iterator[pa.Table]:
    """The row groups of a manifest's parts, with shards as dictionaries. Raises UserError for missing columns."""
    for path in listing.parts:
        with parquet.open_file(path, read_dictionary=["shard"]) as file, parquet.named(path):
            names = file.schema_arrow.names
            missing = [name for name in columns if name not in names and name != "weight"]
            if missing:
                raise UserError(
                    f"{path}: no column {', '.join(missing)}; a manifest has image_id, shard, offset and length"
                )
            for group in range(file.num_row_groups):
                yield file.read_row_group(group, [c for c in columns if c in names]).combine_chunks()


def _emptiness(listing: Listing, facts: dict[str, Any]) -> str:
    if listing.is_tree:
        return "no image files in this folder or below it; give a run directory, a manifest or a folder of images"
    if facts["unlocated"]:
        return (
            f"none of its {facts['unlocated']:,} rows has a location (shard, offset, length); was it made with images?"
        )
    return "a manifest without images; look at the counts of its data card, manifest.json"


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lvd-curate" / "index"


def _fingerprint(listing: Listing, out: np.ndarray) -> str:
    """Of the parts as they lie there: path, size and what the filesystem says of their version; and what is hidden."""
    found = []
    for path in listing.parts:
        fs, inner = storage.filesystem(path)
        about = fs.info(inner)
        version = [str(about.get(key)) for key in ("mtime", "ETag", "etag", "created", "LastModified") if key in about]
        found.append([path, about.get("size"), version])
    told = [REVISION, listing.root, found, *([hidden.digest(out)] if len(out) else [])]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:24]


@contextmanager
def _build_lock(base: Path) -> Iterator[None]:
    """One builder per folder: the processes of one machine start together."""
    try:
        base.mkdir(parents=True, exist_ok=True)
        with open(base / ".lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except OSError as error:
        raise storage.cannot_write(str(base), error) from error


def _publish(target: Path, build: Any) -> None:
    """Whole or not at all: built aside, then renamed."""
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        build(aside)
        if target.exists():
            shutil.rmtree(target)
        aside.rename(target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


class _Names:
    """Shard names, each written once as long as it was met lately."""

    def __init__(self, folder: Path) -> None:
        self._text = open(folder / "names.bin", "wb")  # noqa: SIM115
        self._ends = open(folder / "name_ends.u64", "wb")  # noqa: SIM115
        self._known: dict[str, int] = {}
        self.count = self.end = 0

    def numbers(self, names: list[str]) -> np.ndarray:
        if len(self._known) > REMEMBERED_SHARDS:
            self._known.clear()
        found = np.empty(len(names), np.uint32)
        ends = []
        for position, name in enumerate(names):
            number = self._known.get(name)
            if number is None:
                number = self._known[name] = self.count
                data = name.encode()
                self._text.write(data)
                self.end += len(data)
                ends.append(self.end)
                self.count += 1
            found[position] = number
        self._ends.write(np.array(ends, np.uint64).tobytes())
        return found

    def close(self) -> None:
        if not self.count:  # an empty file cannot be mapped
            self._text.write(b"\0")
            self._ends.write(bytes(8))
        self._text.close()
        self._ends.close()


def _build_parts(listing: Listing, aside: Path, out: np.ndarray) -> None:
    """out: (n,) uint64, ascending: images that are left out."""
    if len(out):
        out.tofile(aside / HIDDEN)
    names = _Names(aside)
    rows = unlocated = 0
    least, most = np.inf, -np.inf
    with open(aside / "rows.bin", "wb") as row_file, open(aside / "weights.f32", "wb") as weight_file:
        for whole in part_tables(listing, ["image_id", "shard", "offset", "length", "weight"]):
            table = hidden.hide(whole, out)
            located = pc.and_(pc.is_valid(table["shard"]), pc.is_valid(table["length"]))
            unlocated += table.num_rows - int(pc.sum(located).as_py() or 0)
            kept = table.filter(located).combine_chunks()
            if not kept.num_rows:
                continue
            shards = kept["shard"].chunk(0) if kept["shard"].num_chunks == 1 else kept["shard"].combine_chunks()
            if not isinstance(shards, pa.DictionaryArray):
                shards = shards.dictionary_encode()
            used, codes = np.unique(shards.indices.to_numpy(zero_copy_only=False), return_inverse=True)
            numbers = names.numbers(shards.dictionary.take(pa.array(used)).to_pylist())
            records = np.empty(kept.num_rows, ROW)
            records["image_id"] = kept["image_id"].to_numpy()
            records["offset"] = pc.fill_null(kept["offset"], 0).to_numpy()
            records["length"] = kept["length"].to_numpy()
            records["shard"] = numbers[codes]
            row_file.write(records.tobytes())
            weight = np.ones(kept.num_rows, np.float32)
            if "weight" in kept.column_names:
                weight = pc.fill_null(kept["weight"], 1.0).to_numpy().astype(np.float32)
            if not (np.isfinite(weight) & (weight >= 0)).all():
                raise UserError(f"{listing.path}: weights must be finite and not negative")
            least, most = min(least, float(weight.min())), max(most, float(weight.max()))
            weight_file.write(weight.tobytes())
            rows += kept.num_rows
    names.close()
    if least == most or not rows:
        (aside / "weights.f32").unlink()
    if rows and most <= 0:
        raise UserError(f"{listing.path}: every weight is 0; nothing would be drawn")
    _complete(aside, rows, unlocated)


def _build_tree(listing: Listing, base: Path) -> tuple[Path, str]:
    """A tree is listed at each start: nothing else tells whether files came or went."""
    digest = hashlib.sha256(json.dumps([REVISION, listing.root]).encode())
    aside = base / f".tree-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        names = _Names(aside)
        rows = 0
        with open(aside / "rows.bin", "wb") as row_file:
            for block in _blocks(walk(listing.path), 1 << 14):
                digest.update(json.dumps(block).encode())
                records = np.zeros(len(block), ROW)
                records["image_id"] = np.arange(rows, rows + len(block))
                records["length"] = [size for _, size in block]
                records["shard"] = names.numbers([name for name, _ in block])
                row_file.write(records.tobytes())
                rows += len(block)
        names.close()
        _complete(aside, rows, 0)
        fingerprint = digest.hexdigest()[:24]
        target = base / fingerprint
        if not (target / "complete.json").exists():
            aside.rename(target)
        return target, fingerprint
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _blocks(entries: Iterator[tuple[str, int]], size: int) -> Iterator[list[tuple[str, int]]]:
    block: list[tuple[str, int]] = []
    for entry in entries:
        block.append(entry)
        if len(block) == size:
            yield block
            block = []
    if block:
        yield block


def _complete(aside: Path, rows: int, unlocated: int) -> None:
    if not rows:
        (aside / "rows.bin").write_bytes(bytes(ROW.itemsize))
    (aside / "complete.json").write_text(json.dumps({"rows": rows, "unlocated": unlocated}))
