"""Import: folders, webdataset tars and Parquet of paths become rows of the same table, without copying a byte.

Locations point at the files as they lie; tars are read by their headers and never extracted.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation import blocklist, storage
from curation.blocklist import BlockList
from curation.errors import UserError
from curation.locations import read_ranges
from curation.schemas import IMAGES, STATUSES, image_id
from pipelines import pieces, sources
from pipelines.blocking import BY_BYTES, BY_URL, Blocked, without_blocked
from pipelines.context import Context, Outcome
from pipelines.download.shard import decode_failure
from pipelines.download.url_list import valid_text
from pipelines.run_directory import PartRecord, PartWriter, Source
from pipelines.tars import TarIndex, beside, read_index

NAME = "import"
REVISION = 1
ROWS_PER_PART = 1000
BATCH_ROWS = 1 << 16
MAX_FILE_BYTES = 1 << 29
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
REMOTE = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "hdfs", "file")
"""Places a Parquet of paths may name. http and https are not among them: strangers are asked by `curate download`."""

Kind = Literal["folder", "tars", "parquet"]


@dataclass(frozen=True)
class ImportRules:
    """What all parts of a generation share."""

    run: str
    label_column: str | None
    blocked: BlockList | None = None


@dataclass(frozen=True)
class TarTask:
    """Images [first, first + count) of a tar; `row` is the source's row of the first."""

    path: str
    first: int
    count: int
    number: int
    row: int
    source: str


@dataclass
class Listing:
    """A folder or a Parquet as rows of (place, label, caption, url, error). `ignored` counts other files."""

    origin: str
    ignored: int = 0
    rows: int = 0
    digest: Any = field(default_factory=hashlib.sha256)


def execute(
    context: Context,
    *,
    kind: Kind,
    origin: str,
    role: str,
    licence: str | None = None,
    exempt: bool = False,
    label_column: str | None = None,
) -> Outcome:
    """Register a source and read its images: one generation."""
    name = sources.source_name(role, origin)
    about: dict[str, Any] = {"name": name, "licence": licence, "exempt": exempt}
    options = {"label_column": label_column, "rows_per_part": ROWS_PER_PART}
    try:
        if kind == "tars":
            return _import_tars(context, origin, about, options)
        return _import_listing(context, kind, origin, about, options)
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
        raise UserError(f"{origin}: cannot be read ({reason})") from error


def _import_listing(
    context: Context, kind: Kind, origin: str, about: dict[str, Any], options: dict[str, Any]
) -> Outcome:
    measured = Listing(origin)
    for table in _tables(kind, origin, options["label_column"], measured):
        measured.rows += table.num_rows
        for column in table.columns:
            for value in column.to_pylist():
                measured.digest.update(repr(value).encode(errors="replace") + b"\0")
    if measured.rows == 0:
        what = f"no images ({', '.join(s[1:] for s in SUFFIXES)})" if kind == "folder" else "no rows"
        raise UserError(f"{origin}: {what}, there is nothing to import")
    source = _register(context, kind, origin, measured.rows, measured.digest.hexdigest(), about)
    generation = context.begin_keyed(NAME, REVISION, options, {"source": source.number, "list": source.digest})
    if generation is None:
        return _skipped(context, source)
    blocked = blocklist.load(context.run.root)
    index = pieces.read_index(generation)
    if index is None:
        tables = _tables(kind, origin, options["label_column"], Listing(origin))
        listed = without_blocked(_with_ids(context, source, tables), Blocked(blocked), "url")
        written = pieces.write_pieces(generation, source.number, listed, ROWS_PER_PART)
        if written != source.rows:
            raise UserError(f"{origin}: changed while it was read; run the same command again", exit_code=1)
        index = [(source.number, written)]
        pieces.write_index(generation, index)
    rules = ImportRules(sources.absolute_root(context), options["label_column"], blocked)
    tasks = pieces.tasks(generation, index, ROWS_PER_PART, {source.number: source.name})
    context.map_parts(generation, tasks, import_part, shared=rules)
    return context.finish(generation, _summary(generation.parts, {"ignored_files": measured.ignored}))


def _import_tars(context: Context, origin: str, about: dict[str, Any], options: dict[str, Any]) -> Outcome:
    paths = _tar_paths(origin)
    found: dict[str, tuple[int, int, bool]] = {}
    calls = ((path, (path,)) for path in paths)
    for path, measure in context.spread(_measure_tar, calls):
        found[path] = measure
    digest = hashlib.sha256()
    for path in paths:
        digest.update(f"{path.rsplit('/', 1)[-1]}\0{found[path]}\0".encode())
    rows = sum(images for images, _, _ in found.values())
    if rows == 0:
        raise UserError(f"{origin}: no images in {len(paths)} tars, there is nothing to import")
    damaged = sum(broken for _, _, broken in found.values())
    if damaged:
        text = f"{damaged} of {len(paths)} tars of {origin} end in the middle: their whole members are taken"
        context.events.emit("warning", NAME, text=text)
    source = _register(context, "tars", origin, rows, digest.hexdigest(), about)
    generation = context.begin_keyed(NAME, REVISION, options, {"source": source.number, "list": source.digest})
    if generation is None:
        return _skipped(context, source)
    tasks: list[tuple[str, TarTask]] = []
    row = 0
    for path in paths:
        for first in range(0, found[path][0], ROWS_PER_PART):
            count = min(ROWS_PER_PART, found[path][0] - first)
            task = TarTask(path, first, count, source.number, row, source.name)
            tasks.append((pieces.part_name(source.number, len(tasks)), task))
            row += count
    blocked = blocklist.load(context.run.root)
    rules = ImportRules(sources.absolute_root(context), options["label_column"], blocked)
    context.map_parts(generation, tasks, import_tar_part, shared=rules)
    return context.finish(generation, _summary(generation.parts, {"tars": len(paths), "damaged_tars": damaged}))


def _register(context: Context, kind: str, origin: str, rows: int, digest: str, about: dict[str, Any]) -> Source:
    sources.check_unfinished(context, NAME, about["name"])
    return sources.register(context, kind=kind, origin=origin, rows=rows, digest=digest, stage=NAME, **about)


def _skipped(context: Context, source: Source) -> Outcome:
    for generation in context.run.stage(NAME).generations():
        if generation.fingerprint.inputs.get("source") == source.number:
            rows = sum(part.rows for part in generation.parts)
            return Outcome(NAME, True, rows, generation.summary, generation.directory)
    return context.skipped(NAME)


def _summary(parts: list[PartRecord], more: dict[str, int]) -> dict[str, Any]:
    totals: Counter[str] = Counter()
    for part in parts:
        totals.update({name: int(count) for name, count in part.counts.items()})
    summary: dict[str, Any] = {"rows": sum(part.rows for part in parts), **more}
    summary |= {status: totals[status] for status in STATUSES if totals[status] or status == "ok"}
    summary["bytes"] = totals["bytes"]
    summary["errors"] = {n.removeprefix("error."): totals[n] for n in sorted(totals) if n.startswith("error.")}
    return summary


# What the sources hold.


def _tables(kind: Kind, origin: str, label_column: str | None, listing: Listing) -> Iterator[pa.Table]:
    """Rows of `pieces.PIECE` without ids, in batches, in the order of the source."""
    if kind == "folder":
        if label_column is not None:
            raise UserError(f"{origin}: a folder's labels are its sub-folders; leave --label-column out")
        return _folder_tables(origin, listing)
    return _parquet_tables(origin, label_column)


def _folder_tables(origin: str, listing: Listing) -> Iterator[pa.Table]:
    if storage.is_local(origin):
        root = os.path.abspath(storage.filesystem(origin)[1])
        if not os.path.isdir(root):
            raise UserError(f"{origin}: no such folder")
        found = _walk(root, os.path.realpath(root), listing)
    else:
        fs, inner = storage.filesystem(origin)
        if not fs.isdir(inner):
            raise UserError(f"{origin}: no such folder")
        found = _walk_remote(fs, inner, listing)
    batch: list[tuple[str | None, str | None, str | None]] = []
    for place, label, error in found:
        batch.append((place, label, error))
        if len(batch) == BATCH_ROWS:
            yield _listed(batch)
            batch = []
    if batch:
        yield _listed(batch)


def _listed(batch: list[tuple[str | None, str | None, str | None]]) -> pa.Table:
    places, labels, errors = (pa.array(column, pa.string()) for column in zip(*batch, strict=True))
    nothing = pa.nulls(len(batch), pa.string())
    return pa.table({"place": places, "caption": nothing, "label": labels, "url": nothing, "error": errors})


def _walk(folder: str, root: str, listing: Listing) -> Iterator[tuple[str | None, str | None, str | None]]:
    """(path, label, error) of the images below a folder, in the order of whole names.

    Links to folders are not followed, links to files not out of `root`.
    """
    try:
        with os.scandir(folder) as entries:
            inside = sorted(entries, key=lambda e: e.name + "/" if e.is_dir(follow_symlinks=False) else e.name)
    except OSError as error:
        yield None, None, f"unreadable: a sub-folder ({error.strerror})"
        return
    label = None if os.path.realpath(folder) == root else _sayable(os.path.basename(folder))
    for entry in inside:
        if entry.is_dir(follow_symlinks=False):
            yield from _walk(entry.path, root, listing)
        elif not entry.name.lower().endswith(SUFFIXES) or entry.name.startswith("._"):
            listing.ignored += 1
        elif _sayable(entry.path) is None or "::" in entry.path or "\0" in entry.path:
            yield None, label, "unreadable: a file name that is not UTF-8 or holds `::`"
        elif entry.is_symlink() and not _within(os.path.realpath(entry.path), root):
            yield entry.path, label, "link: points out of the folder"
        elif not os.path.isfile(entry.path):
            yield entry.path, label, "unreadable: not a file"
        else:
            yield entry.path, label, None


def _walk_remote(fs: Any, inner: str, listing: Listing) -> Iterator[tuple[str | None, str | None, str | None]]:
    for path in sorted(fs.find(inner)):
        relative = str(path)[len(inner.rstrip("/")) + 1 :]
        if not relative.lower().endswith(SUFFIXES):
            listing.ignored += 1
            continue
        label = relative.rsplit("/", 2)[-2] if "/" in relative else None
        yield str(fs.unstrip_protocol(path)), label, None


def _within(path: str, root: str) -> bool:
    return os.path.commonpath([path, root]) == root


def _sayable(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return None
    return text


def _parquet_tables(origin: str, label_column: str | None) -> Iterator[pa.Table]:
    fs, inner = storage.filesystem(origin)
    if not fs.exists(inner):
        raise UserError(f"{origin}: no such file")
    files = storage.list_files(origin, ".parquet") if fs.isdir(inner) else [origin]
    if not files:
        raise UserError(f"{origin}: a folder without Parquet files")
    for path in files:
        fs, inner = storage.filesystem(path)
        base = path.rsplit("/", 1)[0] if "/" in path else "."
        if storage.is_local(path):
            base = os.path.dirname(os.path.abspath(inner))
        with fs.open(inner, "rb") as file:
            parquet = pq.ParquetFile(file)
            columns = _columns(path, list(parquet.schema_arrow.names), label_column)
            for batch in parquet.iter_batches(BATCH_ROWS, columns=list(dict.fromkeys(columns.values()))):
                texts = {name: _text(batch.column(column), column, path) for name, column in columns.items()}
                pairs = [_place(value, base) for value in texts["path"].to_pylist()]
                nothing = pa.nulls(batch.num_rows, pa.string())
                yield pa.table(
                    {
                        "place": pa.array([place for place, _ in pairs], pa.string()),
                        "caption": texts.get("caption", nothing),
                        "label": texts.get("label", nothing),
                        "url": texts.get("url", nothing),
                        "error": pa.array([error for _, error in pairs], pa.string()),
                    }
                )


def _columns(path: str, names: list[str], label_column: str | None) -> dict[str, str]:
    there = ", ".join(name[:80] for name in names[:20]) or "none"
    if "path" not in names:
        raise UserError(f"{path}: no column `path`; there are: {there}")
    if label_column is not None and label_column not in names:
        raise UserError(f"{path}: no column `{label_column}`; there are: {there}")
    found: dict[str, str] = {name: name for name in ("path", "label", "caption", "url") if name in names}
    if label_column is not None:
        found["label"] = label_column
    return found


def _text(array: pa.Array, name: str, path: str) -> pa.Array:
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        return valid_text(array.cast(pa.string()))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise UserError(f"{path}: column `{name}` holds {array.type}, where text is expected") from None


def _place(value: str | None, base: str) -> tuple[str | None, str | None]:
    if not value or "::" in value or "\0" in value:
        return None, "unreadable: no path" if not value else "unreadable: a path that cannot be addressed"
    if "://" in value:
        scheme = value.split("://", 1)[0].lower()
        if scheme not in REMOTE:
            return None, f"scheme: {re.sub('[^a-z0-9+.-]', '', scheme)[:16]}, not a place that can be imported from"
        return value, None
    if value.startswith("/"):
        return os.path.normpath(value), None
    return os.path.normpath(os.path.join(base, value)) if "://" not in base else storage.join(base, value), None


def _with_ids(context: Context, source: Source, tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    """The rows with their ids; files inside the run by their place in it, so that the run can be moved."""
    prefix = sources.absolute_root(context) + "/"
    row = 0
    for table in tables:
        first = image_id(source.number, row)
        places = [p[len(prefix) :] if p and p.startswith(prefix) else p for p in table["place"].to_pylist()]
        yield pa.Table.from_arrays(
            [
                pa.array(np.arange(first, first + table.num_rows, dtype=np.uint64)),
                pa.array(places, pa.string()),
                *[table[name] for name in ("caption", "label", "url", "error")],
                pa.nulls(table.num_rows, pa.uint64()),
            ],
            schema=pieces.PIECE,
        )
        row += table.num_rows


def _tar_paths(origin: str) -> list[str]:
    fs, inner = storage.filesystem(origin)
    if fs.isfile(inner):
        paths = [origin]
    elif fs.isdir(inner):
        paths = storage.list_files(origin, ".tar")
        packed = [] if paths else [n for s in (".tar.gz", ".tgz", ".tar.zst") for n in storage.list_files(origin, s)]
        if packed:
            raise UserError(f"{packed[0]}: a compressed tar has no ranges to read; unpack it to .tar first")
    else:
        paths = [str(fs.unstrip_protocol(n)) for n in sorted(fs.glob(inner))] if any(c in origin for c in "*?[") else []
    if not paths:
        raise UserError(f"{origin}: no tar there")
    return [os.path.abspath(storage.filesystem(p)[1]) if storage.is_local(p) else p for p in paths]


def _measure_tar(path: str, _: None) -> tuple[int, int, bool]:
    """(images, bytes, whether it ends in the middle). Runs in a Ray worker."""
    index = read_index(path)
    return len(index.images), index.size, index.damaged


# What a worker does.


def import_part(writer: PartWriter, name: str, task: pieces.PieceTask, rules: ImportRules) -> PartRecord:
    """Read the files of one part: hashes, sizes, reasons."""
    rows = []
    for listed in task.read().to_pylist():
        row: dict[str, Any] = {"image_id": listed["image_id"], "source": task.source}
        row |= {"url": listed["url"], "caption": listed["caption"], "label": listed["label"]}
        row |= _read_file(rules.run, listed["place"]) if listed["error"] is None else _failed(listed["error"])
        rows.append(row)
    return _write(writer, name, _without_forgotten(rows, rules.blocked))


def import_tar_part(writer: PartWriter, name: str, task: TarTask, rules: ImportRules) -> PartRecord:
    """Read some images of one tar by their offsets."""
    index: TarIndex = read_index(task.path)
    images = index.images[task.first : task.first + task.count]
    if len(images) != task.count:
        raise UserError(f"{task.path}: changed while it was read; run the same command again", exit_code=1)
    table = beside(task.path)
    prefix = rules.run + "/"
    shard = task.path[len(prefix) :] if task.path.startswith(prefix) else task.path
    places = [(shard, member.offset, member.size if member.size <= MAX_FILE_BYTES else 0) for member in images]
    rows = []
    for position, data in enumerate(read_ranges(rules.run, places)):
        member = images[position]
        row = {"image_id": image_id(task.number, task.row + position), "source": task.source}
        row |= index.about(member, table, rules.label_column)
        if member.size > MAX_FILE_BYTES:
            row |= _failed(f"too_large: more than {MAX_FILE_BYTES} bytes")
        elif isinstance(data, OSError):
            row |= _failed("unreadable: the tar ends before its bytes do")
        else:
            row |= _examined(data, shard, member.offset)
        rows.append(row)
    return _write(writer, name, _without_forgotten(rows, rules.blocked))


def _without_forgotten(rows: list[dict[str, Any]], known: BlockList | None) -> list[dict[str, Any]]:
    """Of forgotten images nothing but their ids: where they lie is not written down either."""
    if known is None:
        return rows
    blocked = Blocked(known)
    by_url = blocked.urls([row.get("url") for row in rows])
    found = []
    for row, listed in zip(rows, by_url, strict=True):
        error = BY_URL if listed or row.get("error") == BY_URL else None
        if error is None and row.get("sha256") is not None and blocked.bytes(row["sha256"]):
            error = BY_BYTES
        kept = {"image_id": row["image_id"], "source": row["source"], "status": "excluded", "error": error}
        found.append(row if error is None else kept)
    return found


def _read_file(run: str, place: str) -> dict[str, Any]:
    path = place if "://" in place or place.startswith("/") else storage.join(run, place)
    try:
        fs, inner = storage.filesystem(path)
        if int(fs.size(inner) or 0) > MAX_FILE_BYTES:
            return _failed(f"too_large: more than {MAX_FILE_BYTES} bytes")
        data = bytes(fs.cat_file(inner))
    except FileNotFoundError:
        return _failed("missing: no such file")
    except Exception as error:  # object stores raise what they like
        return _failed(f"unreadable: {type(error).__name__}")
    return _examined(data, place, 0)


def _examined(data: bytes, shard: str, offset: int) -> dict[str, Any]:
    from embeddings.decoding import DecodeError, worker_decoder

    place = {"shard": shard, "offset": offset, "length": len(data)}
    digest = hashlib.sha256(data).digest()
    try:
        header = worker_decoder().probe(data)
    except DecodeError as error:
        return {"sha256": digest, **place, **_failed(str(decode_failure(error.reason)))}
    return {
        "status": "ok",
        **place,
        "sha256": digest,
        "stored_sha256": digest,
        "width": header.width,
        "height": header.height,
        "original_width": header.width,
        "original_height": header.height,
    }


def _failed(error: str) -> dict[str, Any]:
    return {"status": "failed", "error": error}


def _write(writer: PartWriter, name: str, rows: list[dict[str, Any]]) -> PartRecord:
    counts: Counter[str] = Counter()
    for row in rows:
        counts[row["status"]] += 1
        if row["status"] == "ok":
            counts["bytes"] += row["length"]
        else:
            counts[f"error.{row['error'].split(':', 1)[0]}"] += 1
    return writer.write(name, pa.Table.from_pylist(rows, schema=IMAGES), counts=dict(sorted(counts.items())))
