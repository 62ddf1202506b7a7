"""An image's bytes by its location: (shard, offset, length), one range read, never a member name."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

from curation import storage
from curation.errors import UserError

GAP_BYTES = 1 << 18
RANGE_BYTES = 1 << 24
"""On an object store neighbours in a shard are fetched as one range, over gaps of so many bytes, up to this size."""

Place = tuple[str, int, int]


def resolve(root: str, shard: str) -> str:
    """A location of a table as a whole path: relative ones lie in the run `root`."""
    return shard if "://" in shard or shard.startswith("/") else storage.join(root, shard)


def read_ranges(
    root: str, places: Sequence[Place], digests: Sequence[bytes | None] | None = None
) -> Iterator[bytes | OSError]:
    """The bytes of each (shard, offset, length), in order; an OSError in the place of what cannot be read.

    Neighbouring places of one shard share an open file, on an object store a request. digests: `stored_sha256` of
    each, None where unknown. A shard of the run that does not hold what was written stops the reader (UserError, exit
    code 1): that is damage, not a bad image. A file of the user's that has changed is an OSError.
    """
    pieces = _ranges(root, places)
    for index, data in enumerate(pieces):
        digest = digests[index] if digests is not None else None
        if digest is None or isinstance(data, OSError) or hashlib.sha256(data).digest() == digest:
            yield data
            continue
        shard, offset, _ = places[index]
        path = resolve(root, shard)
        if path == shard:
            yield OSError(f"{path} has changed since it was imported")
            continue
        raise UserError(
            f"{path}: damaged (the image at byte {offset:,} is not what was written); `curate status RUN --verify` "
            "names all that is damaged, and --repair lets the next `curate run` make it again",
            exit_code=1,
        )


def _ranges(root: str, places: Sequence[Place]) -> Iterator[bytes | OSError]:
    local: Any = None
    opened: str | None = None
    first = 0
    try:
        while first < len(places):
            path = resolve(root, places[first][0])
            if not storage.is_local(path):
                last = _together(places, first)
                yield from _fetched(path, places[first:last])
                first = last
                continue
            try:
                if opened != path:
                    if local is not None:
                        local.close()
                    opened = None
                    fs, inner = storage.filesystem(path)
                    local, opened = fs.open(inner, "rb"), path
                yield _whole(path, places[first], local)
            except OSError as error:
                yield error
            first += 1
    finally:
        if local is not None:
            local.close()


def _whole(path: str, place: Place, file: Any) -> bytes:
    _, offset, length = place
    file.seek(offset)
    data = bytes(file.read(length))
    if len(data) != length:
        raise OSError(f"{path} ends before byte {offset + length}")
    return data


def _together(places: Sequence[Place], first: int) -> int:
    """The end of the run of places from `first` on that one request fetches."""
    shard, begin, length = places[first]
    end, last = begin + length, first + 1
    while last < len(places):
        following, offset, length = places[last]
        if following != shard or not end <= offset <= end + GAP_BYTES or offset + length - begin > RANGE_BYTES:
            break
        end, last = offset + length, last + 1
    return last


def _fetched(path: str, places: Sequence[Place]) -> Iterator[bytes | OSError]:
    begin, end = places[0][1], places[-1][1] + places[-1][2]
    try:
        data = storage.read_bytes(path, begin, end - begin) if end > begin else b""
    except OSError as error:
        yield from (error for _ in places)
        return
    for _, offset, length in places:
        piece = data[offset - begin : offset - begin + length]
        yield piece if len(piece) == length else OSError(f"{path} ends before byte {offset + length}")
