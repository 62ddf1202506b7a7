"""What a join assigned, kept for later generations: a file per bundle, about 100 bytes per image.

Cells and rule stay those of the first generation, so nothing of an older image's assignment changes but its node. A
file belongs to the cells and to the vectors it was made of (`key`): where a bundle now reads other ones, because images
went or are read in other bundles, it counts as not there.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from curation import storage
from curation.duplicates.members import Bundle, Members, Piece
from curation.duplicates.scratch import Scratch

SUFFIX = ".npz"
RECORD = "record"


@dataclass(frozen=True)
class Kept:
    """Where a join leaves the assignments it makes, and finds those of earlier generations."""

    folder: str
    """Path or URL."""
    earlier: Mapping[str, str] = field(default_factory=dict)
    """Paths of files by the name of their bundle."""

    def places(self, piece: Piece | Bundle) -> tuple[str | None, str | None]:
        """(where the assignment of a piece may lie, where a new one is left); None: nowhere."""
        if piece.name is None:
            return None, None
        return self.earlier.get(piece.name), storage.join(self.folder, piece.name + SUFFIX)


def key(cells: str, contents: np.ndarray) -> str:
    """Of the assignment of rows. cells: digest of the cells; contents: as `stored.store_piece` keeps it."""
    return storage.sha256(cells.encode() + contents.tobytes())


def digest(data: bytes) -> np.ndarray:
    """(32,) uint8."""
    return np.frombuffer(hashlib.sha256(data).digest(), np.uint8)


def write(path: str, made_of: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Write a file that is there whole or not at all; its bytes and sha256."""
    file = io.BytesIO()
    np.savez(file, key=np.frombuffer(made_of.encode(), np.uint8), **arrays)  # type: ignore[arg-type]
    data = file.getvalue()
    storage.write_whole(path, data)
    return {"bytes": len(data), "sha256": storage.sha256(data)}


def read(path: str | None, made_of: str) -> dict[str, np.ndarray] | None:
    """The arrays of a file; None where it is not there, is damaged or was made of something else."""
    if path is None:
        return None
    try:
        with np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False) as file:
            if file["key"].tobytes().decode(errors="replace") != made_of:
                return None
            return {name: file[name] for name in file.files if name != "key"}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile):
        return None


def records(members: Members, scratch: Scratch, groups: list[str]) -> dict[str, dict[str, Any]]:
    """Bytes and sha256 of the files that a join wrote, by their names in the folder. groups: of the pieces."""
    found = {}
    for piece, group in zip(members.pieces, groups, strict=True):
        record = json.loads(scratch.get(group, RECORD).tobytes())
        if record and piece.name is not None:
            found[piece.name + SUFFIX] = record
    return found
