"""An image's bytes by its location: (shard, offset, length), one range read, never a member name."""

from collections.abc import Iterator, Sequence

from curation import storage


def resolve(root: str, shard: str) -> str:
    """A location of a table as a whole path: relative ones lie in the run `root`."""
    return shard if "://" in shard or shard.startswith("/") else storage.join(root, shard)


def read_ranges(root: str, places: Sequence[tuple[str, int, int]]) -> Iterator[bytes | OSError]:
    """The bytes of each (shard, offset, length), in order; an OSError in the place of what cannot be read.

    Neighbouring places of one shard share an open file.
    """
    current: tuple[str, object] | None = None
    try:
        for shard, offset, length in places:
            path = resolve(root, shard)
            try:
                if current is None or current[0] != path:
                    if current is not None:
                        current[1].close()  # type: ignore[attr-defined]
                    current = None
                    fs, inner = storage.filesystem(path)
                    current = (path, fs.open(inner, "rb", block_size=1 << 20))
                file = current[1]
                file.seek(offset)  # type: ignore[attr-defined]
                data = bytes(file.read(length))  # type: ignore[attr-defined]
                if len(data) != length:
                    raise OSError(f"{path} ends before byte {offset + length}")
                yield data
            except OSError as error:
                yield error
    finally:
        if current is not None:
            current[1].close()  # type: ignore[attr-defined]
