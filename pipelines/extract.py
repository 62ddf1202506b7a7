"""Extract: the `<img>` tags of Common Crawl files as a list of URLs (DINOv2, section 3: where the pool begins).

WARC files hold pages, WAT files the links that Common Crawl found on them; both give the same columns.
"""

import contextlib
import json
import os
import re
import tempfile
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.errors import UserError
from pipelines import cluster
from pipelines.context import Resources
from pipelines.events import Events

NAME = "extract"
URLS = pa.schema(
    [
        pa.field("url", pa.string(), nullable=False, metadata={"meaning": "of the image, absolute"}),
        pa.field("alt", pa.string(), metadata={"meaning": "its alt text, null without one"}),
        pa.field("page_url", pa.string(), nullable=False, metadata={"meaning": "of the page that shows it"}),
    ]
)
BATCH_ROWS = 1 << 16
MAX_PAGE_BYTES = 8 << 20
MAX_URL_CHARACTERS = 4096
MAX_ALT_CHARACTERS = 4096
MAX_IMAGES_PER_PAGE = 5000
TINY_PIXELS = 2
"""Images declared this small in width or height only count visitors or fill space."""

LAZY_SOURCES = ("data-src", "data-original", "data-lazy-src", "data-lazy", "data-url")
_SPACE = re.compile(r"\s+")
_NUMBER = re.compile(r"\s*(\d{1,6})(?:\.\d+)?\s*(?:px)?\s*")
_TRACKERS = re.compile(
    r"""^https?://(?:[^/]*\.)?(?:
        facebook\.com/tr\b | google-analytics\.com/ | googletagmanager\.com/ | doubleclick\.net/
        | googleadservices\.com/ | scorecardresearch\.com/ | quantserve\.com/ | (?:pixel|stats)\.wp\.com/
        | mc\.yandex\.(?:ru|com)/ | counter\.yadro\.ru/ | bat\.bing\.com/ | px\.ads\.linkedin\.com/
        | top-fwz1\.mail\.ru/ | (?:analytics|hits?|counter|track(?:ing)?|pixel|beacon)\.[^/]+/
    )
    | /(?:pixel|spacer|blank|transparent|clear|1x1|1px|tracking|beacon|counter|shim|empty)[^/.]{0,4}
      \.(?:gif|png|php|aspx?)(?:[?]|$)
    """,
    re.VERBOSE | re.IGNORECASE,
)


@dataclass
class Extracted:
    """What came out: the file, its rows, and what was dropped or could not be read, by reason."""

    out: str
    rows: int
    counts: dict[str, int]


def execute(paths: list[str], out: str, resources: Resources, events: Events) -> Extracted:
    """Read crawl files, in Ray tasks of one file each, and write one Parquet in the order of the files."""
    _check(paths, out)
    events.emit("stage_start", NAME, resumed=False)
    cluster.start(resources.ray_address, resources.workers)
    counts: Counter[str] = Counter()
    rows = 0
    with _scratch(out) as scratch:
        if resources.ray_address is not None:
            cluster.require_seen(scratch, "--out")
        pieces = [storage.join(scratch, f"{number:06d}.parquet") for number in range(len(paths))]
        calls = ((str(n), (path, piece)) for n, (path, piece) in enumerate(zip(paths, pieces, strict=True)))
        events.emit("parts", NAME, total=len(paths), done=0)
        for done, (_, found) in enumerate(cluster.spread(extract_file, calls), 1):
            counts.update(found)
            events.emit("part", NAME, part="", rows=found["images"], done=done, total=len(paths))
        rows = _join(pieces, out)
    events.emit("stage_end", NAME, rows=rows, seconds=0.0, summary=dict(counts))
    return Extracted(out, rows, {name: counts[name] for name in sorted(counts)})


@contextlib.contextmanager
def _scratch(out: str) -> Iterator[str]:
    """A folder beside the result, for the lists of single files: any machine of a cluster can write there."""
    local = storage.is_local(out)
    parent = os.path.dirname(os.path.abspath(storage.filesystem(out)[1])) if local else out.rpartition("/")[0]
    folder = storage.join(parent, f".extract-{uuid.uuid4().hex}")
    if local:
        os.makedirs(folder)
    try:
        yield folder
    finally:
        storage.remove_folder(folder)


@contextlib.contextmanager
def _written(path: str) -> Iterator[str]:
    """A local file to write, which is then at `path`, wherever that is."""
    if storage.is_local(path):
        inner = storage.filesystem(path)[1]
        aside = f"{inner}.{uuid.uuid4().hex}.tmp"
        try:
            yield aside
            os.replace(aside, inner)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(aside)
        return
    with tempfile.TemporaryDirectory(prefix="curate-extract-") as folder:
        yield os.path.join(folder, "list")
        fs, inner = storage.filesystem(path)
        fs.put_file(os.path.join(folder, "list"), inner)


def _check(paths: list[str], out: str) -> None:
    if not out.lower().endswith(".parquet"):
        raise UserError(f"--out {out}: the list is written as Parquet; give a name that ends in .parquet")
    for path in paths:
        fs, inner = storage.filesystem(path)
        if not fs.isfile(inner):
            raise UserError(f"{path}: no such WARC or WAT file")
        if storage.is_local(path) and not os.access(inner, os.R_OK):
            raise UserError(f"{path}: cannot be read; mend its rights")
    if storage.is_local(out):
        try:
            os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
        except OSError as error:
            raise storage.cannot_write(out, error) from error
        if not os.access(os.path.dirname(os.path.abspath(out)), os.W_OK):
            raise UserError(f"{out}: cannot be written; choose another folder or its rights", exit_code=1)


def _join(pieces: list[str], out: str) -> int:
    """Put the files' lists one behind the other; the result appears whole."""
    rows = 0
    try:
        with _written(out) as whole, pq.ParquetWriter(whole, URLS, compression="zstd") as writer:
            for piece in pieces:
                fs, inner = storage.filesystem(piece)
                with fs.open(inner, "rb") as file:
                    for batch in pq.ParquetFile(file).iter_batches(BATCH_ROWS):
                        writer.write_batch(batch, row_group_size=BATCH_ROWS)
                        rows += batch.num_rows
                storage.remove(piece)
    except OSError as error:
        raise storage.cannot_write(out, error) from error
    return rows


def extract_file(path: str, piece: str, _: None = None) -> dict[str, int]:
    """Write the list of one crawl file; returns counts. Runs in a Ray worker."""
    counts: Counter[str] = Counter()
    pending: list[tuple[str, str | None, str]] = []
    with _written(piece) as file, pq.ParquetWriter(file, URLS, compression="zstd") as writer:
        for row in images_of(path, counts):
            pending.append(row)
            if len(pending) == BATCH_ROWS:
                writer.write_table(_table(pending))
                pending = []
        if pending:
            writer.write_table(_table(pending))
    return dict(counts)


def _table(rows: list[tuple[str, str | None, str]]) -> pa.Table:
    return pa.Table.from_arrays([pa.array(c, pa.string()) for c in zip(*rows, strict=True)], schema=URLS)


def images_of(path: str, counts: Counter[str]) -> Iterator[tuple[str, str | None, str]]:
    """(url, alt, page URL) of a WARC or WAT file, gzip or not. A record that cannot be read is counted, not raised.

    Raises UserError for a file that holds no record at all.
    """
    from fastwarc.warc import ArchiveIterator, WarcRecordType

    fs, inner = storage.filesystem(path)
    wanted = WarcRecordType.response | WarcRecordType.metadata
    with fs.open(inner, "rb", block_size=1 << 22) as file:
        if not file.read(2):
            raise UserError(f"{path}: an empty file")
        file.seek(0)
        try:
            for record in ArchiveIterator(file, parse_http=False):
                counts["records"] += 1
                if not record.record_type & wanted:
                    continue
                try:
                    found = list(_images_of_record(record, counts))
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError, LookupError):
                    counts["bad_records"] += 1
                    continue
                counts["images"] += len(found)
                yield from found
        except Exception as error:  # a damaged stream ends the file, with what came before it kept
            if counts["records"] == 0:
                raise UserError(f"{path}: not a WARC or WAT file ({type(error).__name__})") from None
            counts["damaged_files"] += 1
    if counts["records"] == 0:
        raise UserError(f"{path}: not a WARC or WAT file (no record in it)")


def _images_of_record(record: Any, counts: Counter[str]) -> Iterator[tuple[str, str | None, str]]:
    if str(record.record_type) == "metadata":
        kind = record.headers.get("Content-Type") or ""
        if kind.startswith("application/json"):
            yield from images_of_wat(json.loads(record.reader.read()), counts)
        return
    page_url = record.headers.get("WARC-Target-URI") or ""
    record.parse_http()
    kind = (record.http_content_type or "").lower()
    if not record.is_http or kind not in ("text/html", "application/xhtml+xml"):
        return
    counts["pages"] += 1
    yield from images_of_page(record.reader.read(MAX_PAGE_BYTES), record.http_charset, page_url, counts)


def images_of_page(
    body: bytes, charset: str | None, page_url: str, counts: Counter[str]
) -> Iterator[tuple[str, str | None, str]]:
    """The images that the `<img>` tags of an HTML page show."""
    from resiliparse.parse.encoding import bytes_to_str, detect_encoding
    from resiliparse.parse.html import HTMLTree

    encoding = charset or detect_encoding(body, from_html_meta=True) or "utf-8"
    try:
        text = bytes_to_str(body, encoding, "replace")
    except LookupError:
        text = body.decode(errors="replace")
    document = HTMLTree.parse(text).document
    if document is None:
        return
    base = page_url
    for element in document.get_elements_by_tag_name("base")[:1]:
        with contextlib.suppress(ValueError):
            base = urljoin(page_url, (element.getattr("href") or "").strip())
    tags = document.get_elements_by_tag_name("img")
    yield from _kept((_Image.of_tag(element) for element in tags), base, page_url, counts)


def images_of_wat(document: dict[str, Any], counts: Counter[str]) -> Iterator[tuple[str, str | None, str]]:
    """The images among the links of a WAT record."""
    envelope = document["Envelope"]
    response = envelope.get("Payload-Metadata", {}).get("HTTP-Response-Metadata")
    if not response or "HTML-Metadata" not in response:
        return
    counts["pages"] += 1
    page_url = str(envelope["WARC-Header-Metadata"]["WARC-Target-URI"])
    html = response["HTML-Metadata"]
    base = page_url
    with contextlib.suppress(ValueError):
        base = urljoin(page_url, str(html.get("Head", {}).get("Base") or ""))
    links = (link for link in html.get("Links", []) if str(link.get("path", "")).upper().startswith("IMG@/"))
    yield from _kept((_Image.of_link(link) for link in links), base, page_url, counts)


@dataclass(frozen=True)
class _Image:
    source: str
    alt: str | None
    width: str | None
    height: str | None

    @staticmethod
    def of_tag(element: Any) -> "_Image":
        """What a tag shows: src, or for a placeholder a lazy loader's attribute or the largest of srcset."""
        source = (element.getattr("src") or "").strip()
        if not source or source.lower().startswith(("data:", "about:", "javascript:", "#")):
            lazy = ((element.getattr(name) or "").strip() for name in LAZY_SOURCES)
            sets = ((element.getattr(name) or "") for name in ("srcset", "data-srcset"))
            instead = next((s for s in lazy if s), "") or next((s for s in map(largest_of_srcset, sets) if s), "")
            source = instead or source
        return _Image(source, element.getattr("alt"), element.getattr("width"), element.getattr("height"))

    @staticmethod
    def of_link(link: dict[str, Any]) -> "_Image":
        """A link of a WAT record, from its `url`; Common Crawl lists src and lazy attributes one by one."""
        size = (link.get("width"), link.get("height"))
        source = str(link.get("url") or "").strip()
        if str(link.get("path", "")).lower().endswith("srcset"):
            source = largest_of_srcset(source)
        alt = link.get("alt")
        return _Image(source, str(alt) if alt is not None else None, *(str(s) if s is not None else None for s in size))


def largest_of_srcset(value: str) -> str:
    """The candidate with the greatest width or density of a srcset attribute, "" for none."""
    best, best_size = "", -1.0
    for candidate in re.split(r",\s+|,(?=https?://)", value.strip().rstrip(",")):
        words = candidate.split()
        if not words:
            continue
        size = 1.0
        if len(words) > 1 and words[-1][-1:] in ("w", "x"):
            with contextlib.suppress(ValueError):
                size = float(words[-1][:-1])
        if size > best_size:
            best, best_size = words[0], size
    return best


def _kept(
    images: Iterable[_Image], base: str, page_url: str, counts: Counter[str]
) -> Iterator[tuple[str, str | None, str]]:
    """Absolute, once per page, without data: URLs and tracking pixels."""
    seen: set[str] = set()
    for number, image in enumerate(images):
        if number == MAX_IMAGES_PER_PAGE:
            return
        reason = None
        url = ""
        if not image.source:
            reason = "dropped_no_source"
        elif image.source.lower().startswith("data:"):
            reason = "dropped_data_url"
        elif (found := _absolute(image.source, base)) is None:
            reason = "dropped_not_http"
        else:
            url = found
            if _is_tiny(image.width) or _is_tiny(image.height) or _TRACKERS.search(url):
                reason = "dropped_tracking_pixel"
            elif url in seen:
                reason = "dropped_repeated_on_page"
        if reason is not None:
            counts[reason] += 1
            continue
        seen.add(url)
        alt = _SPACE.sub(" ", (image.alt or "").replace("\0", "")).strip()[:MAX_ALT_CHARACTERS]
        yield url, _clean(alt) or None, _clean(page_url)


def _absolute(source: str, base: str) -> str | None:
    text = re.sub(r"[\t\r\n]", "", source)
    try:
        url = urljoin(base, text)
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return None
    if parts.scheme not in ("http", "https") or not host or "@" in parts.netloc or len(url) > MAX_URL_CHARACTERS:
        return None
    return _clean(url.split("#", 1)[0].replace(" ", "%20").replace("\0", ""))


def _is_tiny(value: str | None) -> bool:
    found = _NUMBER.fullmatch(value) if value else None
    return found is not None and int(found.group(1)) <= TINY_PIXELS


def _clean(text: str) -> str:
    """Without lone surrogates, which JSON may hold and Parquet cannot."""
    return text.encode(errors="replace").decode()
