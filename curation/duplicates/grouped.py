"""Members shuffled by component to scratch: what needs the vectors of whole components reads them a range at a time.

Only components of several images are stored. A task takes a range of components that fits into its memory, or one
component that does not and is read block by block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from curation.duplicates.components import component_sizes
from curation.duplicates.members import Bundle, Members, Piece
from curation.duplicates.scratch import Reader, Scratch
from curation.duplicates.tasks import Spread

LABELS = "component labels"


@dataclass(frozen=True)
class Grouped:
    """The vectors of components of several images, by component. Small and picklable."""

    scratch: Scratch
    groups: tuple[str, ...]
    """One per piece of the members; rows ascending by (label, node)."""
    dimension: int

    def slices(self, reader: Reader, low: int, high: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """((n,) uint32 labels, (n,) uint32 nodes, (n, d) vectors as stored) of labels low .. high - 1, group by group.

        The vectors are mapped, not read.
        """
        for group in self.groups:
            labels = reader.get(group, "labels")
            span = slice(*np.searchsorted(labels, np.array([low, high], np.int64)))
            if span.stop > span.start:
                yield (
                    np.array(labels[span]),
                    np.array(reader.get(group, "nodes")[span]),
                    reader.get(group, "vectors")[span],
                )


def shuffle(members: Members, labels: np.ndarray, wanted: np.ndarray, scratch: Scratch, spread: Spread) -> Grouped:
    """Store the members of some components by component.

    labels: (count,) uint32. wanted: (count,) bool, the nodes to store. Pieces that an interrupted attempt has stored
    are kept, so `scratch` belongs to these labels alone.
    """
    scratch.put(LABELS, {"labels": labels, "wanted": wanted})
    calls = [
        (name, (scratch, name, piece, members.dimension))
        for number, piece in enumerate(members.pieces)
        if not scratch.has(name := f"by component/{number:05d}")
    ]
    for _ in spread(_store, calls):
        pass
    names = tuple(f"by component/{number:05d}" for number in range(len(members.pieces)))
    return Grouped(scratch, names, members.dimension)


def ranges(labels: np.ndarray, wanted: np.ndarray, rows: int) -> list[tuple[int, int]]:
    """Ranges of labels [low, high) of the wanted nodes, at most `rows` of them in each unless it is one label."""
    sizes = component_sizes(labels)
    found = np.flatnonzero((sizes > 0) & wanted)
    cuts: list[tuple[int, int]] = []
    first, filled = 0, 0
    sized = sizes[found]
    for begin in range(0, len(found), 1 << 16):
        for label, size in zip(
            found[begin : begin + (1 << 16)].tolist(), sized[begin : begin + (1 << 16)].tolist(), strict=True
        ):
            if filled and filled + size > rows:
                cuts.append((first, label))
                first, filled = label, 0
            elif not filled:
                first = label
            filled += size
    if filled:
        cuts.append((first, int(found[-1]) + 1))
    return cuts


def _store(scratch: Scratch, name: str, piece: Piece | Bundle, dimension: int, _: object) -> None:
    numbers = piece.numbers()
    wanted = np.flatnonzero(scratch.get(LABELS, "wanted")[numbers])
    if not len(wanted):
        empty = np.empty(0, np.uint32)
        scratch.put(name, {"labels": empty, "nodes": empty, "vectors": np.empty((0, dimension), np.float16)})
        return
    labels = np.array(scratch.get(LABELS, "labels")[numbers[wanted]])
    order = wanted[np.lexsort((numbers[wanted], labels))]
    nodes, vectors = piece.read(dimension)
    scratch.put(
        name,
        {"labels": scratch.get(LABELS, "labels")[nodes[order]], "nodes": nodes[order], "vectors": vectors[order]},
    )
