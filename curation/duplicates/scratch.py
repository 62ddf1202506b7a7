"""Scratch of a join: vectors shuffled by cell, raw and memory-mapped, and forests of finished tasks.

One folder per piece, renamed into place when whole, so that an interrupted join finds what it had done; the folder
goes when the join is over. It must be on a disk that every worker sees.
"""

import json
import os
import shutil
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from curation import storage

OPEN_ARRAYS = 256


@dataclass(frozen=True)
class Scratch:
    """A folder of arrays; small and picklable, it travels to the workers."""

    directory: str

    def prepare(self, key: Mapping[str, object]) -> None:
        """Keep what an interrupted run with the same key left here, remove anything else."""
        text = json.dumps(key, sort_keys=True, default=str)
        path = os.path.join(self.directory, "key.json")
        try:
            with open(path, encoding="utf-8") as file:
                if file.read() == text:
                    return
        except OSError:
            pass
        self.remove()
        storage.write_whole(path, text.encode())

    def remove(self) -> None:
        shutil.rmtree(self.directory, ignore_errors=True)

    def has(self, name: str) -> bool:
        """Whether a group of arrays is there, whole."""
        return os.path.isdir(os.path.join(self.directory, name))

    def put(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a group of arrays that readers see whole or not at all."""
        target = os.path.join(self.directory, name)
        if os.path.isdir(target):
            return
        aside = os.path.join(self.directory, f".{name.replace('/', '-')}.{uuid.uuid4().hex}.tmp")
        try:
            os.makedirs(aside)
            for key, array in arrays.items():
                np.save(os.path.join(aside, f"{key}.npy"), array, allow_pickle=False)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            try:
                os.rename(aside, target)
            except OSError:
                # Another attempt of the same task was first; its arrays are equal to these.
                if not os.path.isdir(target):
                    raise
        except OSError as error:
            raise storage.cannot_write(target, error) from error
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def get(self, name: str, key: str) -> np.ndarray:
        """An array, memory-mapped."""
        path = os.path.join(self.directory, name, f"{key}.npy")
        array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        return array

    def groups(self, folder: str) -> Sequence[str]:
        """Names of the groups in a folder, in order."""
        try:
            return [f"{folder}/{name}" for name in sorted(os.listdir(os.path.join(self.directory, folder)))]
        except OSError:
            return []


class Reader:
    """A scratch read by one task: an array is opened once while it is among the last OPEN_ARRAYS.

    A mapped array holds a file descriptor, and 1,024 of them is a common limit.
    """

    def __init__(self, scratch: Scratch) -> None:
        self.scratch = scratch
        self._open: dict[tuple[str, str], np.ndarray] = {}

    def get(self, name: str, key: str) -> np.ndarray:
        """An array, memory-mapped."""
        found = self._open.get((name, key))
        if found is None:
            if len(self._open) >= OPEN_ARRAYS:
                del self._open[next(iter(self._open))]
            found = self._open[name, key] = self.scratch.get(name, key)
        return found
