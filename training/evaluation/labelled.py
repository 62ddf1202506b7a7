"""Images with labels: the rows of a manifest that have one, or a folder with one folder per class."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from curation.errors import UserError
from curation.order import hash_keys
from training.data.index import Index, open_index
from training.data.reading import check_locations


@dataclass(frozen=True)
class LabelledSet:
    """rows: (n,) int64 of the index; labels: (n,) int64 into classes."""

    index: Index
    rows: np.ndarray
    labels: np.ndarray
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def image_ids(self) -> np.ndarray:
        """(n,) int64."""
        return np.asarray(self.index.rows["image_id"][self.rows], np.int64)

    def subset(self, chosen: np.ndarray) -> "LabelledSet":
        """Those of a mask or of positions."""
        return LabelledSet(self.index, self.rows[chosen], self.labels[chosen], self.classes)

    def split(self, share: float, seed: int) -> tuple["LabelledSet", "LabelledSet"]:
        """(rest, held out): about `share` of each class is held out, in hash order of the ids; at least one of two."""
        keys = hash_keys(self.image_ids.astype(np.uint64), seed, "held out")
        order = np.lexsort((keys, self.labels))
        ordered = self.labels[order]
        starts = np.searchsorted(ordered, ordered, side="left")
        sizes = np.searchsorted(ordered, ordered, side="right") - starts
        held = np.zeros(len(self), bool)
        wanted = np.where(sizes > 1, np.maximum(1, np.round(sizes * share)), 0)
        held[order[np.arange(len(self)) - starts < wanted]] = True
        return self.subset(~held), self.subset(held)


def read_labelled(source: str, classes: tuple[str, ...] | None = None, index_folder: str | None = None) -> LabelledSet:
    """The labelled images of a source. classes: those of the training set, which a test set must share.

    Raises UserError for a source without labels, or with labels that `classes` does not have.
    """
    index = open_index(source, index_folder)
    check_locations(index)
    words = _folder_labels(index) if index.listing.is_tree else _manifest_labels(index)
    known = pc.is_valid(words)
    rows = np.flatnonzero(known.to_numpy(zero_copy_only=False))
    if not len(rows):
        where = "one folder per class" if index.listing.is_tree else "a column `label`"
        raise UserError(f"{source}: no image has a label; an evaluation needs {where}")
    encoded = words.filter(known).dictionary_encode()
    names = [str(name) for name in encoded.dictionary.to_pylist()]
    wanted = classes if classes is not None else tuple(sorted(names))
    number = {name: i for i, name in enumerate(wanted)}
    unknown = sorted(set(names) - set(number))
    if unknown:
        raise UserError(
            f"{source}: {len(unknown)} of its classes are not in the training set, e.g. `{unknown[0]}`; "
            "both sets need the same classes"
        )
    labels = np.array([number[name] for name in names], np.int64)[encoded.indices.to_numpy()]
    return LabelledSet(index, rows, labels, wanted)


def _manifest_labels(index: Index) -> pa.Array:
    """The column `label` of the rows that the index has, in its order."""
    found = []
    for table in index.part_tables(["image_id", "shard", "length", "label"]):
        located = pc.and_(pc.is_valid(table["shard"]), pc.is_valid(table["length"]))
        found.append(table.filter(located)["label"].combine_chunks().cast(pa.string()))
    return pa.concat_arrays(
        [chunk for part in found for chunk in ([part] if isinstance(part, pa.Array) else part.chunks)]
    )


def _folder_labels(index: Index) -> pa.Array:
    names = [index.shard(int(number)) for number in index.rows["shard"]]
    return pa.array([name.split("/", 1)[0] if "/" in name else None for name in names], pa.string())
