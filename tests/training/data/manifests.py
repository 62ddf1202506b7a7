"""Small manifests with their images in shards, on disk or in memory, and a configuration for them."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from curation.schemas import MANIFEST
from training.data import DataConfig


def picture(seed: int, width: int = 48, height: int = 40, format: str = "PNG") -> bytes:
    """Blobs of colour, different for every seed."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC).save(sink, format)
    return sink.getvalue()


def write_manifest(
    root: str | Path, images: Sequence[bytes], *, per_shard: int = 8, per_part: int = 10, **columns: Sequence[Any]
) -> str:
    """A folder with shards and `part-*.parquet`; image i has image_id 100 + i. Returns the folder."""
    fs, inner = fsspec.core.url_to_fs(str(root))
    fs.makedirs(inner, exist_ok=True)
    rows: list[Mapping[str, Any]] = []
    for at in range(0, len(images), per_shard):
        shard, offset = f"shard-{at // per_shard}.tar", 512
        chunk = images[at : at + per_shard]
        fs.pipe_file(f"{inner}/{shard}", bytes(512) + b"".join(chunk))
        for i, data in enumerate(chunk, start=at):
            own = {name: values[i] for name, values in columns.items()}
            row = dict.fromkeys(MANIFEST.names) | {"image_id": 100 + i, "source": "pool:a", "sources": ["balance"]}
            rows.append(row | {"weight": 1.0, "shard": shard, "offset": offset, "length": len(data)} | own)
            offset += len(data)
    for number, at in enumerate(range(0, len(rows), per_part)):
        table = pa.Table.from_pylist(list(rows[at : at + per_part]), schema=MANIFEST)
        with fs.open(f"{inner}/part-{number:06d}.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=4)
    return str(root)


def small(source: str, folder: Path, **options: Any) -> DataConfig:
    """Crops of 28 and 14 pixels."""
    own = {"global_size": 28, "local_size": 14, "local_crops": 2, "index_folder": str(folder / "index")}
    return DataConfig(source=source, **(own | options))
