"""`--erase-originals`: the bytes of images whose faces were blurred, overwritten in the downloaded shards.

Only ranges that the `download` table of this run names, in files under RUN/download: imported files are the user's.
"""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace

from curation import storage
from curation.errors import UserError
from pipelines.context import Context
from pipelines.image_parts import Part, input_parts, read_images

STAGE = "score"
ERASED = "erased.json"


def erase_originals(context: Context) -> int:
    """Overwrite, in our own downloaded shards, the bytes of the images whose faces were blurred. Returns how many.

    A marker in RUN/score says which generations were done; it is written before the first byte goes, for from then on
    the pass over the pixels cannot be repeated. On a local disk the bytes are overwritten in place (what a file system
    or a flash disk keeps of them is beyond a program's reach); on an object store the shard is written anew.
    """
    done, images = _marker(context)
    erased = 0
    for generation in context.run.stage(STAGE).generations():
        if generation.number in done:
            continue
        _mark(context, done, images)
        shards: dict[str, str] = {}
        for part in input_parts(context, generation):
            if part.stage == "download":
                erased += _erase_part(context, part, generation.writer.path(part.name), shards)
        _record(context, shards)
        done = [*done, generation.number]
        _mark(context, done, images + erased)
    if erased:
        text = f"{erased:,} originals whose faces were blurred are overwritten with zeros"
        context.events.emit("message", STAGE, text=text)
    return erased


def _marker(context: Context) -> tuple[list[int], int]:
    """(generations done, images erased so far)."""
    path = context.run.path(STAGE, ERASED)
    if not storage.exists(path):
        return [], 0
    document = json.loads(storage.read_bytes(path))
    return list(document["generations"]), int(document["images"])


def _mark(context: Context, generations: Sequence[int], images: int) -> None:
    document = {"generations": list(generations), "images": images}
    storage.write_whole(context.run.path(STAGE, ERASED), (json.dumps(document) + "\n").encode())


def _record(context: Context, shards: Mapping[str, str]) -> None:
    """The shards' new checksums, so that nobody takes them for damaged. shards: sha256 by location."""
    directory = context.run.stage("download")
    for generation in directory.generations() if shards else ():
        folder = context.run.relative(generation.directory)
        parts = []
        for part in generation.parts:
            new = {name: shards[f"{folder}/{name}"] for name in part.files if f"{folder}/{name}" in shards}
            files = {**part.files, **{name: {**part.files[name], "sha256": digest} for name, digest in new.items()}}
            parts.append(replace(part, files=files))
        if parts != generation.parts:
            generation.parts = parts
            directory.save(generation)


def _erase_part(context: Context, part: Part, scored_path: str, shards: dict[str, str]) -> int:
    original = read_images(part.path, ["image_id", "shard", "offset", "length"]).to_pylist()
    scored = read_images(scored_path, ["image_id", "faces_blurred"]).to_pylist()
    ranges: dict[str, list[tuple[int, int]]] = {}
    for before, after in zip(original, scored, strict=True):
        if before["image_id"] != after["image_id"]:
            raise UserError(
                f"{scored_path}: its rows are not those of {part.path}; nothing more is erased", exit_code=1
            )
        if after["faces_blurred"] and before["shard"].startswith("download/"):
            ranges.setdefault(before["shard"], []).append((before["offset"], before["length"]))
    for shard, places in sorted(ranges.items()):
        overwrite(context.run.resolve(shard), [(offset, bytes(length)) for offset, length in places])
        shards[shard] = file_sha256(context.run.resolve(shard))
    return sum(len(places) for places in ranges.values())


def overwrite(path: str, patches: Sequence[tuple[int, bytes]]) -> None:
    """Put bytes over those of a file, which keeps its length. patches: (offset, bytes).

    In place on a local disk; on an object store the file is written anew, unless it holds them already.
    """
    if not storage.is_local(path):
        before = storage.read_bytes(path)
        data = bytearray(before)
        for offset, patch in patches:
            data[offset : offset + len(patch)] = patch
        if data != before:
            storage.write_whole(path, bytes(data))
        return
    inner = storage.filesystem(path)[1]
    try:
        with open(inner, "r+b") as file:
            for offset, patch in patches:
                file.seek(offset)
                file.write(patch)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise storage.cannot_write(path, error) from error


def file_sha256(path: str) -> str:
    """Hex digest of a file that may be large."""
    digest = hashlib.sha256()
    fs, inner = storage.filesystem(path)
    with fs.open(inner, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def refuse_erased(context: Context) -> None:
    """A second pass would find zeros where the erased originals were."""
    if context.rebuild and storage.exists(context.run.path(STAGE, ERASED)):
        raise UserError(
            f"{context.run.path(STAGE)} cannot be made again: the originals of its blurred images were erased; "
            "keep its settings, or download into a new run"
        )
