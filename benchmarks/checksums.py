"""What the checksum of every page costs a reader and a writer: the same tables with and without.

`python -m benchmarks.checksums` writes benchmarks/results/checksums.json: CPU seconds per GB on one thread, the best of
five rounds taken in turns, of a part of embeddings (512 float16 a row, plain) and of one of an images table (zstd);
beside them sha256 of the same bytes, which `curate status --verify` and the reader of an image take.
"""

import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine

machine.one_thread()

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from curation import storage  # noqa: E402
from curation.vectors import embeddings_table  # noqa: E402

RESULT = Path(__file__).parent / "results" / "checksums.json"
ROWS, ROUNDS = 50_000, 5


def tables() -> dict[str, pa.Table]:
    """A part of each kind."""
    random = np.random.default_rng(0)
    ids = np.arange(ROWS, dtype=np.uint64)
    digests = [hashlib.sha256(number.tobytes()).digest() for number in ids]
    images = {
        "image_id": ids,
        "url": [f"https://example.org/{number}/{number * 7919 % 1_000_003}.jpg" for number in range(ROWS)],
        "sha256": pa.array(digests, pa.binary(32)),
        "width": random.integers(64, 4000, ROWS),
        "score": random.random(ROWS),
    }
    return {
        "embeddings": embeddings_table(ids, random.normal(size=(ROWS, 512)).astype(np.float32)),
        "images": pa.table(images),
    }


def cpu_s(call: Callable[[], object]) -> float:
    """CPU seconds of this process for one call."""
    began = time.process_time()
    call()
    return time.process_time() - began


def read(data: bytes, checked: bool) -> pa.Table:
    return pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=checked).read(use_threads=False)


def measured(table: pa.Table) -> dict[str, Any]:
    """Seconds per GB of the file."""
    data = storage.table_bytes(table)
    rounds: dict[str, list[float]] = {"read": [], "read_checked": [], "sha256": [], "write_checked": []}
    for _ in range(ROUNDS):
        rounds["read"].append(cpu_s(lambda: read(data, False)))
        rounds["read_checked"].append(cpu_s(lambda: read(data, True)))
        rounds["sha256"].append(cpu_s(lambda: hashlib.sha256(data).hexdigest()))
        rounds["write_checked"].append(cpu_s(lambda: storage.table_bytes(table)))
    per_gb = {name: round(min(seconds) / len(data) * 1e9, 3) for name, seconds in rounds.items()}
    return {"bytes": len(data), "rows": table.num_rows, "cpu_seconds_per_gb": per_gb}


def main() -> None:
    document = {
        "command": "python -m benchmarks.checksums",
        "machine": machine.facts(),
        "versions": machine.versions(["pyarrow", "numpy"]),
        "parts": {name: measured(table) for name, table in tables().items()},
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
