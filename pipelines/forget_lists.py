"""What is to be forgotten, as people list it: URLs, sha256 of files, domains; text, CSV or Parquet, read in batches.

An entry is kept as its key under the salt of the run's block list: 8 bytes, whatever the list's length. A line that
cannot be what it should be stops everything before anything is changed.
"""

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.blocklist import BYTES, DOMAIN, URL, keyed
from curation.errors import UserError
from pipelines.blocking import domain_digest, url_digest
from pipelines.download import addresses
from pipelines.download.errors import FetchError
from pipelines.download.url_list import BATCH_ROWS, MAX_LINE_CHARACTERS, open_list, open_text, read_csv

Kind = Literal["urls", "sha256", "domains"]
KEYS_OF = {"urls": URL, "sha256": BYTES, "domains": DOMAIN}
_COLUMNS = {"urls": None, "sha256": "sha256", "domains": "domain"}
_URL = re.compile(r"(?:https?|ftp|s3|gs)://[^/?#\s]+(?:[/?#]\S.*)?/?", re.IGNORECASE)
_SHA256 = re.compile(r"([0-9a-fA-F]{64})(?:[ \t]+\*?.*)?")


@dataclass(frozen=True)
class Asked:
    """A list that was read. keys: (n,) uint64, ascending, each once."""

    kind: Kind
    entries: int
    keys: np.ndarray

    @property
    def key_kind(self) -> str:
        """The kind of its keys in the block list."""
        return KEYS_OF[self.kind]


def read_list(kind: Kind, path: str, salt: bytes) -> Asked:
    """Read a list. Raises UserError that names the line of what is no URL, sha256 or domain, and for an empty list."""
    found = bytearray()
    entries = 0
    for numbers, values in _batches(kind, path):
        digests = []
        for line, value in zip(numbers, values, strict=True):
            digest = None if value is None else _digest(kind, value.strip(), f"{path} line {line}")
            if digest is not None:
                digests.append(digest)
        entries += len(digests)
        found += keyed(salt, KEYS_OF[kind], digests).tobytes()
    if not entries:
        raise UserError(f"--{kind} {path}: an empty list, there is nothing to forget")
    keys = np.frombuffer(found, "<u8")
    keys.sort()  # in place: np.unique takes several times the memory
    return Asked(kind, entries, keys[np.append(True, keys[1:] != keys[:-1])])


def _digest(kind: Kind, text: str, where: str) -> bytes | None:
    """What stands for an entry; None for an empty line or a comment."""
    if not text or (kind == "domains" and text.startswith("#")):
        return None
    if kind == "urls":
        if not _URL.fullmatch(text):
            raise UserError(f"{where}: `{_shown(text)}` is not a URL; nothing was changed")
        return url_digest(text)
    if kind == "sha256":
        found = _SHA256.fullmatch(text)
        if found is None:
            raise UserError(f"{where}: `{_shown(text)}` is not a sha256 (64 hexadecimal digits); nothing was changed")
        return bytes.fromhex(found.group(1))
    return domain_digest(domain(text, where))


def domain(text: str, where: str) -> str:
    """A domain in lower-case ASCII; `*.example.org` is `example.org`. Raises UserError for what is none."""
    name = text.split("#", 1)[0].strip().removeprefix("*").strip(".")
    try:
        if not name or any(sign in name for sign in "/:@"):
            raise FetchError("bad_url")
        return addresses.parse(f"http://{name}/").host
    except FetchError:
        raise UserError(f"{where}: `{_shown(text)}` is not a domain; nothing was changed") from None


def _shown(text: str) -> str:
    return text if len(text) <= 80 else text[:80] + "…"


Batch = tuple[Sequence[int], list[str | None]]
"""(numbers of the lines, of the rows of Parquet from 1; their values)."""


def _batches(kind: Kind, path: str) -> Iterator[Batch]:
    listed = open_list(path, _column(kind, path))
    for file in listed.files:
        if listed.kind == "parquet":
            yield from _parquet(file, str(listed.columns[0]))
        elif listed.kind == "text":
            yield from _lines(file)
        else:
            yield from _csv(file, str(listed.columns[0]), listed.kind)


def _column(kind: Kind, path: str) -> str | None:
    """The column to read; text lists have none."""
    name = path.lower()
    for suffix in (".gz", ".bz2", ".xz", ".zst"):
        name = name.removesuffix(suffix)
    return _COLUMNS[kind] if name.endswith((".parquet", ".pq", ".csv", ".tsv")) else None


def _lines(path: str) -> Iterator[Batch]:
    with open_text(path) as text:
        number, pending = 1, list[str | None]()
        while line := text.readline(MAX_LINE_CHARACTERS):
            pending.append(line)
            if len(pending) == BATCH_ROWS:
                yield range(number, number + len(pending)), pending
                number, pending = number + len(pending), []
        yield range(number, number + len(pending)), pending


def _csv(path: str, column: str, kind: str) -> Iterator[Batch]:
    with open_text(path) as text:
        rows = read_csv(text, kind)
        try:
            place = next(rows).index(column)
            numbers, pending = list[int](), list[str | None]()
            for row in rows:
                numbers.append(rows.line_num)
                pending.append(row[place] if place < len(row) else None)
                if len(pending) == BATCH_ROWS:
                    yield numbers, pending
                    numbers, pending = [], []
            yield numbers, pending
        except csv.Error as error:
            raise UserError(f"{path}: cannot be read as a list ({error})") from error


def _parquet(path: str, column: str) -> Iterator[Batch]:
    fs, inner = storage.filesystem(path)
    number = 1
    with fs.open(inner, "rb") as file:
        for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS, columns=[column]):
            values = batch.column(0).to_pylist()
            if pa.types.is_binary(batch.column(0).type) or pa.types.is_fixed_size_binary(batch.column(0).type):
                values = [None if value is None else value.hex() for value in values]
            yield range(number, number + len(values)), [None if value is None else str(value) for value in values]
            number += len(values)
