"""Small runs for tests of the stages that read pixels: tables and shards as `download` and `import` leave them."""

import hashlib
import io
import pickle
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from curation.schemas import IMAGES, image_id
from pipelines.context import Context
from pipelines.run_directory import Generation, PartRecord, RunDirectory, Source


def picture(seed: int, width: int = 96, height: int = 80, format: str = "PNG", **options: Any) -> bytes:
    """A file with blobs of colour of three sizes, as photographs have, different for every seed."""
    random = np.random.default_rng(seed)
    mixed = np.zeros((height, width, 3), np.uint16)
    for cells, share in ((4, 5), (10, 2), (24, 1)):
        blobs = Image.fromarray(random.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        mixed += share * np.asarray(blobs.resize((width, height), Image.Resampling.BICUBIC), np.uint16)
    return encoded(Image.fromarray((mixed // 8).astype(np.uint8)), format, **options)


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, format, **options)
    return sink.getvalue()


def row(number: int, index: int, source: str, data: bytes | None, place: tuple[str, int] | None) -> dict[str, Any]:
    """A row of IMAGES; without data the row of a URL that failed."""
    found: dict[str, Any] = dict.fromkeys(IMAGES.names)
    found |= {"image_id": image_id(number, index), "source": source, "url": f"http://example.org/{number}/{index}"}
    if data is None or place is None:
        return found | {"status": "failed", "error": "http: 404"}
    digest = hashlib.sha256(data).digest()
    found |= {"status": "ok", "sha256": digest, "stored_sha256": digest}
    return found | {"shard": place[0], "offset": place[1], "length": len(data)}


def bring(
    root: Path,
    name: str,
    images: Sequence[bytes | None],
    *,
    stage: str = "download",
    rows_per_part: int = 4,
    exempt: bool = False,
    first_row: int = 0,
    suffix: str = "",
) -> None:
    """Register a source and write its generation. A downloaded one has tar shards, an imported one plain files."""
    context = Context(RunDirectory(str(root)))
    known = {source.name: source.number for source in context.run.sources()}
    number = known.get(name, len(known))
    if name not in known:
        context.run.register(Source(number, name, "urls", "list", len(images), "digest", stage, 0, exempt=exempt))
    generation = context.begin_keyed(stage, 1, {}, {"source": number, "retry": suffix or None})
    assert generation is not None
    for at in range(0, len(images), rows_per_part):
        part = f"part-{number:03d}-{(first_row + at) // rows_per_part:06d}{suffix}"
        chunk = images[at : at + rows_per_part]
        tar, offsets = shard(chunk)
        rows, files = [], {}
        for index, data in enumerate(chunk):
            place: tuple[str, int] | None = None
            if data is not None and stage == "download":
                place = (f"download/gen-{generation.number:04d}/shards/{part}.tar", offsets[index])
            elif data is not None:
                path = root.parent / f"{root.name}-own" / f"{number}-{at + index}.bin"
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(data)
                place = (str(path), 0)
            rows.append(row(number, first_row + at + index, name, data, place))
        if stage == "download":
            files[f"shards/{part}.tar"] = tar
        table = pa.Table.from_pylist(rows, schema=IMAGES)
        generation.parts.append(generation.writer.write(part, table, files=files))
    context.finish(generation, {})


def shard(images: Sequence[bytes | None]) -> tuple[bytes, Mapping[int, int]]:
    """A tar of the images that are there, and where each one's bytes begin."""
    sink, offsets = io.BytesIO(), {}
    with tarfile.open(fileobj=sink, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for index, data in enumerate(images):
            if data is not None:
                member = tarfile.TarInfo(f"{index:09d}")
                member.size = len(data)
                offsets[index] = sink.tell() + 512
                tar.addfile(member, io.BytesIO(data))
    return sink.getvalue(), offsets


def as_from_ray(decoded: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its copy, as Ray hands it on: arrays are read in place and cannot be written."""
    buffers: list[pickle.PickleBuffer] = []
    head = pickle.dumps(decoded, protocol=5, buffer_callback=buffers.append)
    copied: Mapping[str, Any] = pickle.loads(head, buffers=[bytes(buffer.raw()) for buffer in buffers])
    return copied


def pass_in_this_process(
    context: Context,
    generation: Generation | Sequence[Generation],
    tasks: Sequence[tuple[str, Any]],
    *,
    decode: Any,
    model: Any,
    model_arguments: Mapping[str, Any],
    shared: Any,
    **_: Any,
) -> None:
    """What `image_pass` promises, one part after the other and without Ray; arrays cannot be written, as there."""
    several = [generation] if isinstance(generation, Generation) else list(generation)
    maker = model(**model_arguments)
    for name, task in tasks:
        found = [one.writer.find(name) for one in several]
        if None in found:
            made = maker(name, as_from_ray(decode(task, shared)))
            found = [made] if isinstance(made, PartRecord) else list(made)
        for one, record in zip(several, found, strict=True):
            one.parts.append(record)
