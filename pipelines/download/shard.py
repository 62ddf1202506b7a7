"""One shard of a URL list: img2dataset's Downloader with our opener, resizer and sample writer; a row for every URL."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import mmap
import os
import sys
import tempfile
import types
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pyarrow as pa

from curation import secrets
from curation.blocklist import BlockList
from curation.errors import UserError
from curation.schemas import IMAGES, SOURCE_SHIFT
from pipelines.blocking import BY_BYTES, Blocked
from pipelines.download import addresses, errors
from pipelines.download.errors import FetchError
from pipelines.download.opener import FetchRules, Opener, worker_opener
from pipelines.download.politeness import HostGate, machine_folder
from pipelines.download.shard_writer import SUFFIXES, Collector, ShardTar
from pipelines.download.url_keys import url_keys
from pipelines.pieces import PieceTask
from pipelines.run_directory import PartRecord, PartWriter

TRIES_OF_A_ROW = 3
"""How often rows that img2dataset lost (it prints and goes on) are asked for before they count as failed."""


@dataclass(frozen=True)
class ShardRules:
    """What all shards of a generation share."""

    fetch: FetchRules
    token: str
    threads: int
    requests_per_host: int
    seconds_between_requests: float
    host_wait_s: float
    max_side: int | None
    folder: str
    opted_out: np.ndarray
    """(n,) uint64, sorted: the first halves of the keys of opted-out URLs."""
    blocked: BlockList | None = None


def download_part(writer: PartWriter, name: str, task: PieceTask, rules: ShardRules) -> PartRecord:
    """Fetch the URLs of one part and write its tar and its table."""
    piece = task.read()
    collected, refused = fetch(piece, rules)
    relative = f"shards/{name}.tar"
    rows, tar = assemble(piece, collected, refused, task.source, f"{rules.folder}/{relative}", Blocked(rules.blocked))
    if [row["image_id"] for row in rows] != piece["image_id"].to_pylist():
        raise RuntimeError(f"{name}: {piece.num_rows} URLs gave {len(rows)} rows")
    table = pa.Table.from_pylist(rows, schema=IMAGES)
    files = {relative: cast(bytes, tar)} if tar is not None else None  # mapped: the writer only reads it
    return writer.write(name, table, files=files, counts=dict(sorted(_counts(rows).items())))


def fetch(piece: pa.Table, rules: ShardRules) -> tuple[Collector, dict[int, FetchError]]:
    """Fetch the rows of a piece that are no duplicates: (what came, what was refused unasked by row)."""
    refused: dict[int, FetchError] = {}
    wanted: dict[int, addresses.Target] = {}
    repeats = piece["duplicate_of"].is_valid().to_pylist()
    urls = piece["place"].to_pylist()
    # Whoever made the list may not have known: it was forgotten meanwhile.
    blocked = Blocked(rules.blocked).urls(urls) | piece["error"].is_valid().to_numpy(zero_copy_only=False)
    for row, url in enumerate(urls):
        if blocked[row]:
            refused[row] = FetchError("forgotten", "by its URL")
            continue
        if repeats[row]:
            continue
        try:
            wanted[row] = addresses.parse(url or "")
        except FetchError as error:
            refused[row] = error
    collected = Collector()
    for _ in range(TRIES_OF_A_ROW):
        missing = [row for row in wanted if row not in collected.rows]
        if not missing:
            break
        _download(take_turns({row: wanted[row] for row in missing}), rules, collected)
    for row in wanted:
        if row not in collected.rows:
            refused[row] = FetchError("internal", "img2dataset lost this row")
    return collected, refused


def take_turns(targets: dict[int, addresses.Target]) -> list[tuple[int, str]]:
    """(row, URL) with the hosts taking turns, so that one slow host does not hold all threads."""
    turn: Counter[str] = Counter()
    order = []
    for row, target in targets.items():
        order.append((turn[target.host], row, target.url))
        turn[target.host] += 1
    return [(row, url) for _, row, url in sorted(order)]


def _download(order: Sequence[tuple[int, str]], rules: ShardRules, collector: Collector) -> None:
    opener = worker_opener(rules.token, lambda: _make_opener(rules))
    # img2dataset prints what fails: that is not for anybody's screen.
    with (
        opener.installed(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        tempfile.TemporaryDirectory(prefix="curate-shard-") as scratch,
    ):
        path = os.path.join(scratch, "urls.feather")
        table = pa.table({"url": [url for _, url in order], "row": pa.array([row for row, _ in order], pa.int64())})
        with pa.OSFile(path, "wb") as file, pa.ipc.new_file(file, table.schema) as stream:
            stream.write_table(table)
        downloader = downloader_class()(
            sample_writer_class=collector.writer_class(),
            resizer=Sizer(rules.max_side),
            thread_count=min(rules.threads, len(order)),
            save_caption=False,
            extract_exif=False,
            output_folder=scratch,
            column_list=["url", "row"],
            timeout=rules.fetch.timeout_s,
            number_sample_per_shard=len(order),
            oom_shard_count=1,
            compute_hash="sha256",
            verify_hash_type=None,
            encode_format="jpg",
            retries=0,  # the opener tries again, and only where that may help
            user_agent_token=rules.fetch.user_agent_token,
            disallowed_header_directives=None,  # the opener looks, before the body is read
        )
        downloader((0, path))


@functools.cache
def downloader_class() -> Any:
    """img2dataset's Downloader, without what its package imports beside it.

    `import img2dataset` brings torch, albumentations, pandas and wandb: 6 CPU seconds and half a gigabyte per
    worker, none of which downloader.py uses. So its file is imported from a package without `__init__`,
    and the one name it takes from wandb (a module) is an empty module meanwhile.
    """
    spec = importlib.util.find_spec("img2dataset")
    if spec is None or spec.submodule_search_locations is None:
        raise UserError("img2dataset is not installed: `pip install lvd-curate` brings it", exit_code=1)
    before = {name: sys.modules[name] for name in list(sys.modules) if name.split(".")[0] in ("img2dataset", "wandb")}
    bare = types.ModuleType("img2dataset")
    bare.__path__ = list(spec.submodule_search_locations)
    for name in before:
        del sys.modules[name]
    sys.modules |= {"img2dataset": bare, "wandb": types.ModuleType("wandb")}
    try:
        return importlib.import_module("img2dataset.downloader").Downloader
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] in ("img2dataset", "wandb")]:
            del sys.modules[name]
        sys.modules.update(before)


def _make_opener(rules: ShardRules) -> Opener:
    gate = HostGate(
        machine_folder(rules.token), rules.requests_per_host, rules.seconds_between_requests, rules.host_wait_s
    )
    listed, blocked = rules.opted_out, Blocked(rules.blocked)

    def opted_out(url: str) -> bool:
        key = url_keys([url])[0, 0]
        place = int(np.searchsorted(listed, key))
        return (place < len(listed) and bool(listed[place] == key)) or bool(blocked.urls([url])[0])

    if not len(listed) and rules.blocked is None:
        return Opener(rules.fetch, gate)
    return Opener(rules.fetch, gate, opted_out)


class Sizer:
    """img2dataset's resizer: bytes stay as served, sizes come from the header; larger than max_side is shrunk once."""

    def __init__(self, max_side: int | None) -> None:
        self.max_side = max_side

    def __call__(self, img_stream: io.BytesIO, blurring_bbox_list: object = None) -> tuple[Any, ...]:
        """(bytes, width, height, original width, original height, error)."""
        from embeddings.decoding import DecodeError, worker_decoder

        data = img_stream.read()
        try:
            header = worker_decoder().probe(data)
            if self.max_side is None or max(header.width, header.height) <= self.max_side:
                return data, header.width, header.height, header.width, header.height, None
            stored, width, height = shrink(data, header.format, self.max_side)
            return stored, width, height, header.width, header.height, None
        except DecodeError as error:
            return None, None, None, None, None, str(decode_failure(error.reason))


def decode_failure(reason: str) -> FetchError:
    """The class of a row whose bytes came and are no image that can be used."""
    if reason in ("not_an_image", "empty"):
        return FetchError("not_an_image", "an empty body" if reason == "empty" else "by its first bytes")
    if reason in ("unsupported_format", "too_many_pixels"):
        return FetchError(reason)
    return FetchError("damaged", reason)


def shrink(data: bytes, kind: str, max_side: int) -> tuple[bytes, int, int]:
    """Re-encode with the longer side at `max_side`: (file, width, height). Raises DecodeError.

    Decoding runs in a process of its own. JPEG of quality 95 for lossy formats, PNG for the others.
    """
    from PIL import Image

    from embeddings.decoding import worker_decoder
    from embeddings.faces import encode

    pixels = worker_decoder().decode(data)
    height, width = pixels.shape[:2]
    scale = max_side / max(height, width)
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    small = Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)
    return encode(np.asarray(small), kind)[0], size[0], size[1]


def assemble(
    piece: pa.Table,
    collected: Collector,
    refused: dict[int, FetchError],
    source: str,
    shard: str,
    blocked: Blocked | None = None,
) -> tuple[list[dict[str, Any]], mmap.mmap | None]:
    """One row of IMAGES per row of the piece, in order, and the tar they point into (None without images)."""
    from embeddings.decoding import sniff

    tar = ShardTar()
    rows = []
    for number, listed in enumerate(piece.to_pylist()):
        row: dict[str, Any] = {
            "image_id": listed["image_id"],
            "source": source,
            "url": secrets.without_credentials(listed["place"]) if listed["place"] is not None else None,
            "caption": listed["caption"],
            "label": listed["label"],
            "status": "ok",
        }
        rows.append(row)
        if number in refused and refused[number].name == "forgotten":
            row |= {"status": "excluded", "error": str(refused[number]), "url": None, "caption": None, "label": None}
            continue
        if listed["duplicate_of"] is not None:
            row |= {"status": "duplicate_url", "duplicate_of": listed["duplicate_of"]}
            continue
        sample = collected.rows.get(number)
        if sample is None or sample.place is None:
            message = str(refused[number]) if sample is None else str(sample.meta["error_message"])
            name, error = _classified(message)
            row |= {"status": errors.status_of(name), "error": error}
            continue
        meta, data = sample.meta, collected.read(sample.place)
        if blocked is not None and blocked.bytes(bytes.fromhex(meta["sha256"])):
            row |= {"status": "excluded", "error": BY_BYTES}
            continue
        row |= {name: meta[name] for name in ("width", "height", "original_width", "original_height")}
        row |= {
            "sha256": bytes.fromhex(meta["sha256"]),
            "stored_sha256": hashlib.sha256(data).digest(),
            "shard": shard,
            "length": len(data),
        }
        about = {name: row[name] for name in ("image_id", "source", "url", "caption", "label", "width", "height")}
        about["sha256"] = meta["sha256"]
        key = f"{listed['image_id'] >> SOURCE_SHIFT:03d}-{listed['image_id'] & (1 << SOURCE_SHIFT) - 1:012d}"
        row["offset"] = tar.add_sample(key, SUFFIXES[sniff(data) or "JPEG"], data, about)
    return rows, tar.close() if any(row["status"] == "ok" for row in rows) else None


def _classified(message: str) -> tuple[str, str]:
    """(class, error) of what came back through img2dataset; a message that is not ours says nothing but `internal`."""
    name = message.split(":", 1)[0]
    return (name, message) if errors.known(name) else ("internal", "internal: img2dataset refused this row")


def _counts(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    counts: dict[str, float] = defaultdict(float)
    for row in rows:
        counts[row["status"]] += 1
        counts["stored_bytes"] += row.get("length", 0)
        if "error" in row:
            counts[f"error.{row['error'].split(':', 1)[0]}"] += 1
    return counts
