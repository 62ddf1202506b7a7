"""What speaks of forgotten images outside the tables: events, texts, the report, the server's index, leftovers.

Texts are read line by line; what looks like a URL or a sha256 and is on the list becomes `(forgotten)`.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import parquet, storage
from curation.blocklist import BYTES, PIXELS, URL, keyed
from curation.hidden import FORGOTTEN, is_hidden
from pipelines.blocking import url_digest
from pipelines.download.url_list import open_list, open_text, read_csv
from pipelines.run_directory import Source

TEXTS = (".json", ".jsonl", ".yaml", ".yml", ".txt", ".csv", ".tsv", ".log", ".md", ".html")
LEFT_ALONE = ("run.yaml", "sources.json")
"""What the run is made of: files that name lists, not images."""
SCRATCH = ("scratch", "_scratch", "scratch-forgotten")
WORD = "(forgotten)"
TOKEN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://[^\s\"'<>`]+|(?<![0-9A-Za-z])[0-9a-fA-F]{64}(?![0-9A-Za-z])")
SHA256 = re.compile(r"[0-9a-fA-F]{64}")
ENDING = ".,;:!?)]}\\"
BATCH_LINES = 1 << 14


class Texts:
    """Knows the URLs and hashes of forgotten images by their keys. keys: per kind (n,) uint64, ascending."""

    def __init__(self, salt: bytes, keys: Mapping[str, np.ndarray]) -> None:
        self.salt = salt
        self.keys = dict(keys)

    def forgets(self, token: str) -> bool:
        """Whether a URL or a hexadecimal sha256 is that of a forgotten image."""
        if "://" in token:
            return self._holds(URL, url_digest(token))
        if not SHA256.fullmatch(token):
            return False
        return any(self._holds(kind, bytes.fromhex(token)) for kind in (BYTES, PIXELS))

    def scrub(self, text: str) -> str:
        """The text with forgotten URLs and hashes replaced."""
        return TOKEN.sub(self._replaced, text)

    def _replaced(self, found: re.Match[str]) -> str:
        token = found.group()
        for end in range(len(token), len(token.rstrip(ENDING)) - 1, -1):
            if self.forgets(_unescaped(token[:end])):
                return WORD + token[end:]
        return token

    def _holds(self, kind: str, digest: bytes) -> bool:
        known = self.keys.get(kind)
        return known is not None and bool(is_hidden(keyed(self.salt, kind, [digest]), known)[0])


def _unescaped(token: str) -> str:
    """A token of a JSON file as it reads."""
    if "\\" not in token:
        return token
    try:
        return str(json.loads(f'"{token}"'))
    except ValueError:
        return token


def scrub_texts(root: str, texts: Texts) -> int:
    """Go through the texts of a run; how many files were written anew."""
    found = 0
    for path in _files(root):
        name = path.rsplit("/", 1)[-1]
        if name.endswith(TEXTS) and name not in LEFT_ALONE:
            found += _scrub_file(path, texts)
    return found


def _files(root: str) -> Iterator[str]:
    """Whole paths of the files of a run, but those of RUN/forgotten."""
    fs, inner = storage.filesystem(root)
    base = inner.rstrip("/")
    for path in sorted(fs.find(base)):
        relative = str(path)[len(base) :].lstrip("/")
        if not relative.startswith(f"{FORGOTTEN}/"):
            yield storage.join(root, relative)


def _scrub_file(path: str, texts: Texts) -> bool:
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as file:
        if not any(texts.scrub(line) != line for line in _lines(file)):
            return False
    with fs.open(inner, "rb") as file:
        data = "".join(map(texts.scrub, _lines(file))).encode(errors="surrogateescape")
    storage.write_whole(path, data)
    return True


def _lines(file: Any) -> Iterator[str]:
    for line in file:
        yield line.decode(errors="surrogateescape")


def scrub_notes(path: str, texts: Texts) -> None:
    """What an auditor wrote on other images, or on a host, may name a forgotten one."""
    table = parquet.read_table(path)
    for name in ("note", "target"):
        at = table.column_names.index(name)
        values = table[name].to_pylist()
        clean = [None if value is None else texts.scrub(value) for value in values]
        if clean != values:
            table = table.set_column(at, table.schema.field(at), pa.array(clean, pa.string()))
            storage.write_whole(path, storage.table_bytes(table))


def remove_leftovers(root: str, stages: list[str]) -> None:
    """What killed writers left aside, and scratch: both may hold what is to go."""
    for path in _files(root):
        name = path.rsplit("/", 1)[-1]
        if name.startswith(".") and name.endswith(".tmp"):
            storage.remove(path)
    for stage in stages:
        for generation in storage.list_folders(storage.join(root, stage)):
            for name in SCRATCH if generation.startswith("gen-") else ():
                storage.remove_folder(storage.join(root, stage, generation, name))


def remove_folder(root: str, name: str) -> bool:
    """Remove RUN/NAME; whether it was there."""
    path = storage.join(root, name)
    fs, inner = storage.filesystem(path)
    if not fs.exists(inner):
        return False
    storage.remove_folder(path)
    return True


def rewrite_own_list(source: Source, texts: Texts) -> tuple[int, str] | None:
    """A URL list that lies in the run: its forgotten URLs are replaced, its rows stay. (rows changed, new digest)."""
    listed = open_list(source.origin)
    changed = 0
    for path in listed.files:
        if listed.kind == "parquet":
            changed += _rewrite_parquet(path, str(listed.columns[0]), texts)
        else:
            place = 0
            if listed.kind != "text":
                with open_text(path) as text:
                    place = next(read_csv(text, listed.kind)).index(str(listed.columns[0]))
            changed += _rewrite_text(path, listed.kind, place, texts)
    return (changed, listed.measure()[1]) if changed else None


def _rewrite_parquet(path: str, column: str, texts: Texts) -> int:
    table = pq.read_table(pa.BufferReader(storage.read_bytes(path)))
    urls = table[column].to_pylist()
    gone = np.array([url is not None and texts.forgets(str(url)) for url in urls], bool)
    if not gone.any():
        return 0
    for at, field in enumerate(table.schema):
        if field.name == column:
            values = [WORD if out else url for out, url in zip(gone, urls, strict=True)]
            table = table.set_column(at, field, pa.array(values, field.type))
        elif pa.types.is_string(field.type) or pa.types.is_large_string(field.type):
            kept = [None if out else value for out, value in zip(gone, table[field.name].to_pylist(), strict=True)]
            table = table.set_column(at, field.with_nullable(True), pa.array(kept, field.type))
    sink = io.BytesIO()
    pq.write_table(table, sink)
    storage.write_whole(path, sink.getvalue())
    return int(gone.sum())


def _rewrite_text(path: str, kind: str, place: int, texts: Texts) -> int:
    changed, sink = 0, io.StringIO(newline="")
    with open_text(path) as text:
        if kind == "text":
            for line in text:
                gone = bool(line.strip()) and texts.forgets(line.strip())
                changed += gone
                sink.write(WORD + line[len(line.rstrip("\r\n")) :] if gone else line)
        else:
            writer = csv.writer(sink, delimiter="\t" if kind == "tsv" else ",", lineterminator="\n")
            for row in read_csv(text, kind):
                gone = place < len(row) and texts.forgets(row[place]) if row else False
                changed += gone
                writer.writerow([WORD if at == place else "" for at in range(len(row))] if gone else row)
    if changed:
        storage.write_whole(path, sink.getvalue().encode())
    return changed
