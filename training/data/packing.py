"""`curate pack`: the images of a manifest, in the order of one epoch, rewritten once into large shards.

Each shard is a tar with a Parquet of its rows beside it, which is written last: the folder is a manifest, an
interrupted pack goes on behind its last whole shard, and equal inputs give equal bytes.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation import parquet, storage
from curation.errors import UserError
from curation.schemas import MANIFEST
from embeddings.decoding import sniff
from training.data.config import DataConfig
from training.data.index import Index, open_index
from training.data.reading import Reader, check_locations
from training.data.sampling import Order, order_of
from training.data.sources import PACKED

REVISION = 1
FINGERPRINT = b"curate.fingerprint"
LEFT_OUT = b"curate.left_out"
COLUMNS = ("image_id", "shard", "offset", "length", "sources", "weight")
SUFFIXES = {"JPEG": "jpg", "TIFF": "tif"}
ROWS_AT_ONCE = 4096
NOTED = "packed.json"
"""In the run: where its images were packed."""


@dataclass(frozen=True)
class PackConfig:
    """sampling: `uniform`, each image once; `weight`, as often as one epoch draws it."""

    source: str
    out: str
    shard_bytes: int = 1_000_000_000
    sampling: str = "uniform"
    reads_in_flight: int = 64
    seed: int = 0
    index_folder: str | None = None


def pack(config: PackConfig) -> dict[str, Any]:
    """Write what is missing of the shards. Raises UserError for a source that cannot be read or a foreign folder."""
    index = open_index(config.source, config.index_folder)
    check_locations(index)
    data = DataConfig.model_validate({"source": config.source, "sampling": config.sampling})
    order = order_of(data, index, config.seed)
    mean = float(np.mean(index.rows["length"], dtype=np.float64))
    per_shard = max(1, round(config.shard_bytes / max(mean, 1.0)))
    options = [REVISION, index.fingerprint, config.sampling, config.seed, per_shard]
    fingerprint = hashlib.sha256(json.dumps(options).encode()).hexdigest()
    shards = -(-order.epoch // per_shard)
    reader = Reader(index, config.reads_in_flight)
    written = {"images": 0, "left_out": 0, "bytes": 0, "shards": shards}
    try:
        for number in range(shards):
            counts = _finished(config.out, number, fingerprint)
            if counts is None:
                draws = range(number * per_shard, min((number + 1) * per_shard, order.epoch))
                counts = _write_shard(config, number, draws, index, order, reader, fingerprint)
            for name, count in counts.items():
                written[name] += count
    finally:
        reader.close()
    if not written["images"]:
        raise UserError(f"{config.source}: none of its {order.epoch:,} images could be read; were they moved?", 1)
    card = {"fingerprint": fingerprint, "sampling": config.sampling, "seed": config.seed, **written}
    if index.listing.run is not None:
        card["run"] = _whole(index.listing.run)
        _note(index.listing.run, config.out)
    storage.write_whole(storage.join(config.out, PACKED), (json.dumps(card, indent=1) + "\n").encode())
    return {"out": config.out, **written}


def _note(run: str, out: str) -> None:
    """Leave word in the run of where its images were packed: `curate forget` names it."""
    path = storage.join(run, NOTED)
    known = json.loads(storage.read_bytes(path))["packed"] if storage.exists(path) else []
    if _whole(out) in known:
        return
    with contextlib.suppress(UserError):  # a run that cannot be written to can still be read
        storage.write_whole(path, (json.dumps({"packed": sorted({*known, _whole(out)})}, indent=1) + "\n").encode())


def _whole(path: str) -> str:
    return os.path.abspath(path) if storage.is_local(path) and "://" not in path else path


def _part(out: str, number: int) -> str:
    return storage.join(out, f"part-{number:06d}.parquet")


def _finished(out: str, number: int, fingerprint: str) -> dict[str, int] | None:
    path = _part(out, number)
    if not storage.exists(path):
        return None
    try:
        file = parquet.open_bytes(storage.read_bytes(path))
        metadata = file.schema_arrow.metadata or {}
        found = metadata.get(FINGERPRINT, b"").decode()
        length = int(pc.sum(file.read(["length"])["length"]).as_py() or 0)
    except (OSError, pa.ArrowInvalid, ValueError) as error:
        raise UserError(f"{path}: damaged ({error}); delete it and run the same command again") from error
    if found != fingerprint:
        raise UserError(f"{out}: holds shards of another source, seed or size; choose another folder for --out")
    return {"images": file.metadata.num_rows, "left_out": int(metadata[LEFT_OUT]), "bytes": length}


def _write_shard(
    config: PackConfig, number: int, draws: range, index: Index, order: Order, reader: Reader, fingerprint: str
) -> dict[str, int]:
    sink = io.BytesIO()
    rows: list[dict[str, Any]] = []
    left_out = 0
    name = f"shard-{number:06d}.tar"
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for draw, row, data in _images(draws, order, reader, 2 * config.reads_in_flight):
            if data is None:
                left_out += 1
                continue
            kind = sniff(data) or "bin"
            member = tarfile.TarInfo(f"{draw:012d}.{SUFFIXES.get(kind, kind.lower())}")
            member.size = len(data)
            rows.append(
                {
                    "image_id": int(index.rows[row]["image_id"]),
                    "shard": name,
                    "offset": sink.tell() + tarfile.BLOCKSIZE,
                    "length": len(data),
                    "sources": [],
                    "weight": 1.0,
                }
            )
            tar.addfile(member, io.BytesIO(data))
    storage.write_whole(storage.join(config.out, name), sink.getvalue())
    schema = pa.schema([MANIFEST.field(column) for column in COLUMNS])
    told = {FINGERPRINT.decode(): fingerprint, LEFT_OUT.decode(): str(left_out)}
    table = storage.table_bytes(pa.Table.from_pylist(rows, schema=schema), told)
    storage.write_whole(_part(config.out, number), table)
    return {"images": len(rows), "left_out": left_out, "bytes": sum(row["length"] for row in rows)}


def _images(draws: range, order: Order, reader: Reader, ahead: int) -> Iterator[tuple[int, int, bytes | None]]:
    """(draw, row, bytes), None for what cannot be read; `ahead` reads are under way or done and waiting."""
    waiting: deque[tuple[int, int, Future[bytes]]] = deque()

    def oldest() -> tuple[int, int, bytes | None]:
        draw, row, read = waiting.popleft()
        try:
            return draw, row, read.result()
        except OSError:
            return draw, row, None

    for start in range(draws.start, draws.stop, ROWS_AT_ONCE):
        numbers = range(start, min(start + ROWS_AT_ONCE, draws.stop))
        for draw, row in zip(numbers, order.rows(np.array(numbers, np.int64)).tolist(), strict=True):
            waiting.append((draw, row, *reader.submit([row])))
            if len(waiting) >= ahead:
                yield oldest()
    while waiting:
        yield oldest()
