"""The block list of a run: what is left of forgotten images, so that copies of them are known and kept out.

RUN/forgotten/blocked/ holds, per request: `keys-*.parquet`, keyed hashes of URLs, domains, bytes and pixels (useless
without the run's own random salt, and not to be compared with those of other runs); `hashes-*.parquet`, PCA hashes,
and `vectors-*.parquet`, copy embeddings, as they are, for near copies are found by distance.
"""

import hashlib
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import exact, parquet, storage
from curation.errors import UserError
from curation.hidden import FORGOTTEN

FOLDER = f"{FORGOTTEN}/blocked"
SALT = "salt"
URL, DOMAIN, BYTES, PIXELS = KINDS = ("url", "domain", "bytes", "pixels")
BEFORE = b"curate.before"
"""Metadata: images with smaller ids were there when these were forgotten, and stayed: they are no later copies."""
REASON = "forgotten"
"""Of rows that the block list keeps out: `error` in tables of images, `reason` in those of duplicates."""

KEYS = pa.schema([pa.field("kind", pa.string(), nullable=False), pa.field("key", pa.uint64(), nullable=False)])
HASHES = pa.schema([pa.field("pca_hash", pa.uint64(), nullable=False)])


@dataclass(frozen=True)
class BlockList:
    """What is asked of images; small enough to travel: 8 bytes per key, 8 per hash. Vectors stay on disk."""

    salt: bytes
    keys: dict[str, np.ndarray] = field(default_factory=dict)
    """Per kind (n,) uint64, sorted."""
    hashes: tuple[tuple[int, np.ndarray], ...] = ()
    """(first id that these apply to, (n,) uint64 PCA hashes)."""
    pixels: tuple[tuple[int, np.ndarray], ...] = ()
    """(first id that these apply to, (n,) uint64 keys of pixels, sorted)."""

    def holds(self, kind: str, values: Sequence[bytes | None]) -> np.ndarray:
        """(n,) bool: which of these (a URL's or a file's digest, a domain's name) are on the list; None never is."""
        known = self.keys.get(kind, np.empty(0, np.uint64))
        found = np.zeros(len(values), bool)
        if not len(known):
            return found
        rows = [row for row, value in enumerate(values) if value is not None]
        found[rows] = _among(known, keyed(self.salt, kind, (v for v in values if v is not None)))
        return found

    def same_pixels(self, ids: np.ndarray, digests: Sequence[bytes | None]) -> np.ndarray:
        """(n,) bool: images that came later and have the pixels of a forgotten one. ids: (n,) uint64."""
        found = np.zeros(len(ids), bool)
        rows = [row for row, value in enumerate(digests) if value is not None]
        if not rows or not self.pixels:
            return found
        keys = keyed(self.salt, PIXELS, (value for value in digests if value is not None))
        for before, known in self.pixels:
            found[rows] |= _among(known, keys) & (ids[rows] >= np.uint64(before))
        return found

    def near_hashes(self, ids: np.ndarray, hashes: Sequence[int | None], distance: int) -> np.ndarray:
        """(n,) bool: images that came later and whose PCA hash is within `distance` bits of a forgotten one's."""
        found = np.zeros(len(ids), bool)
        rows = np.array([row for row, value in enumerate(hashes) if value is not None], np.int64)
        if not len(rows) or distance < 0:
            return found
        values = np.array([value for value in hashes if value is not None], np.uint64)
        for before, known in self.hashes:
            found[rows] |= near(values, known, distance) & (ids[rows] >= np.uint64(before))
        return found


def load(run: str) -> BlockList | None:
    """The block list of a run; None where nothing was ever forgotten. Raises UserError for a damaged one."""
    folder = storage.join(run, FOLDER)
    paths = storage.list_files(folder, ".parquet")
    if not paths:
        return None
    keys: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    pixels: list[tuple[int, np.ndarray]] = []
    hashes: list[tuple[int, np.ndarray]] = []
    for path in paths:
        name = path.rsplit("/", 1)[-1]
        if name.startswith("keys-"):
            table, before = _read(path, KEYS)
            for kind in KINDS:
                keys[kind].append(_of_kind(table, kind))
            pixels.append((before, _of_kind(table, PIXELS)))
        elif name.startswith("hashes-"):
            table, before = _read(path, HASHES)
            hashes.append((before, table["pca_hash"].to_numpy()))
    merged = {kind: distinct(np.concatenate([np.empty(0, np.uint64), *found])) for kind, found in keys.items()}
    return BlockList(_salt(run), merged, _by_beginning(hashes), _by_beginning(pixels))


def vector_files(run: str) -> list[tuple[int, str]]:
    """(first id that they apply to, path) of the files of copy embeddings on the block list."""
    found = []
    for path in storage.list_files(storage.join(run, FOLDER), ".parquet"):
        if path.rsplit("/", 1)[-1].startswith("vectors-"):
            metadata = parquet.schema(path).metadata or {}
            found.append((int(metadata.get(BEFORE, b"0")), path))
    return found


def make_salt(run: str) -> bytes:
    """The run's salt, drawn now if it has none."""
    path = storage.join(run, FOLDER, SALT)
    if not storage.exists(path):
        storage.write_whole(path, (secrets.token_hex(32) + "\n").encode())
    return _salt(run)


def salt_of(run: str) -> bytes | None:
    """The run's salt; None before the first request."""
    return _salt(run) if storage.exists(storage.join(run, FOLDER, SALT)) else None


def keys_of(run: str, name: str) -> dict[str, np.ndarray]:
    """The keys that `put_keys` wrote under a name, by kind: (n,) uint64, ascending; {} where there are none."""
    path = storage.join(run, FOLDER, f"keys-{name}.parquet")
    if not storage.exists(path):
        return {}
    table, _ = _read(path, KEYS)
    return {kind: values for kind in KINDS if len(values := distinct(_of_kind(table, kind)))}


def keyed(salt: bytes, kind: str, values: Iterable[bytes]) -> np.ndarray:
    """(n,) uint64: the first 8 bytes of each value's blake2b under the salt.

    Of 1.2 billion other URLs and ten million blocked ones, 0.0007 are expected to share a key.
    """
    start = hashlib.blake2b(digest_size=8, key=salt, person=kind.encode())
    digests = []
    for value in values:
        made = start.copy()
        made.update(value)
        digests.append(made.digest())
    return np.frombuffer(b"".join(digests), "<u8")


def put_keys(run: str, name: str, keys: Sequence[tuple[str, np.ndarray]], before: int) -> None:
    """Write `keys-NAME.parquet`: sorted, each once, so that it does not tell in which order they were asked for."""
    unique = [(kind, distinct(values)) for kind, values in keys]
    kinds = [pa.repeat(pa.scalar(kind, pa.string()), len(values)) for kind, values in unique]
    columns = [pa.concat_arrays(kinds), pa.array(np.concatenate([values for _, values in unique]))]
    _write(run, f"keys-{name}", pa.Table.from_arrays(columns, schema=KEYS), before)


def put_hashes(run: str, name: str, hashes: np.ndarray, before: int) -> None:
    """Write `hashes-NAME.parquet`. hashes: (n,) uint64."""
    _write(run, f"hashes-{name}", pa.table([pa.array(np.unique(hashes))], schema=HASHES), before)


def put_vectors(run: str, name: str, table: pa.Table, before: int) -> None:
    """Write `vectors-NAME.parquet`: a table of embeddings with the model in its metadata."""
    _write(run, f"vectors-{name}", table, before)


def near(values: np.ndarray, known: np.ndarray, distance: int) -> np.ndarray:
    """(n,) bool: which of `values` (n,) uint64 lie within `distance` bits of one of `known` (m,) uint64.

    Two that do agree in one of distance + 1 bands (pigeonhole): only those are compared.
    """
    found = np.zeros(len(values), bool)
    for first, bits in exact.bands(distance):
        mask = np.uint64(((1 << bits) - 1) << first)
        order = np.argsort(known & mask, kind="stable")
        words = (known & mask)[order]
        low = np.searchsorted(words, values & mask, "left")
        high = np.searchsorted(words, values & mask, "right")
        rows = np.flatnonzero((low < high) & ~found)
        at = low[rows]
        while len(rows):
            close = np.bitwise_count(values[rows] ^ known[order[at]]) <= distance
            found[rows[close]] = True
            left = ~close & (at + 1 < high[rows])
            rows, at = rows[left], at[left] + 1
    return found


def distinct(keys: np.ndarray) -> np.ndarray:
    """(m,) the different ones of (n,) keys, ascending; by sorting, for np.unique takes several times the memory."""
    ordered = np.sort(keys)
    return ordered[np.append(True, ordered[1:] != ordered[:-1])] if len(ordered) else ordered


def _of_kind(table: pa.Table, kind: str) -> np.ndarray:
    return np.asarray(table.filter(pc.equal(table["kind"], kind))["key"].to_numpy())


def _among(known: np.ndarray, values: np.ndarray) -> np.ndarray:
    if not len(known):
        return np.zeros(len(values), bool)
    return np.asarray(known[np.minimum(np.searchsorted(known, values), len(known) - 1)] == values)


def _by_beginning(found: Sequence[tuple[int, np.ndarray]]) -> tuple[tuple[int, np.ndarray], ...]:
    """One array for each first id."""
    grouped: dict[int, list[np.ndarray]] = {}
    for before, values in found:
        if len(values):
            grouped.setdefault(before, []).append(values)
    return tuple((before, distinct(np.concatenate(values))) for before, values in sorted(grouped.items()))


def _write(run: str, name: str, table: pa.Table, before: int) -> None:
    path = storage.join(run, FOLDER, f"{name}.parquet")
    storage.write_whole(path, storage.table_bytes(table, {BEFORE.decode(): str(before)}))


def _read(path: str, schema: pa.Schema) -> tuple[pa.Table, int]:
    try:
        table = parquet.open_bytes(storage.read_bytes(path)).read(schema.names)
        return table.cast(schema), int((table.schema.metadata or {}).get(BEFORE, b"0"))
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a part of a block list ({error}); restore it", exit_code=1) from error


def _salt(run: str) -> bytes:
    path = storage.join(run, FOLDER, SALT)
    try:
        return bytes.fromhex(storage.read_bytes(path).decode().strip())
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the salt of the block list cannot be read ({error}); restore it", exit_code=1
        ) from error
