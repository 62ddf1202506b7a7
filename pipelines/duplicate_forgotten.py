"""What dedup does about forgotten images: they stay in the forests as anonymous joints, and later copies are kept out.

A joint is an id without a row or a vector. Without it a component would fall apart where an image was forgotten, and
copies that were dropped before would enter again with the next generation.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from curation import blocklist, hidden, parquet, vectors
from curation.duplicates.members import Members, whole_set
from curation.duplicates.relative import join_references
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions, Spread
from curation.duplicates.tiles import store, tiles
from curation.errors import UserError
from pipelines.columns import Empty
from pipelines.run_directory import Generation

if TYPE_CHECKING:
    from pipelines.duplicate_inputs import Inputs, Rows


@dataclass(frozen=True)
class Joints:
    """Forgotten images of a forest. ids: per space (n,) uint64, ascending."""

    ids: dict[int, np.ndarray]

    def of(self, space: int) -> np.ndarray:
        return self.ids.get(space, np.empty(0, np.uint64))

    def among(self, ids: np.ndarray, space: int = 0) -> np.ndarray:
        """(n,) bool: which of these ids are joints."""
        return hidden.is_hidden(ids, self.of(space))


def joints_of(run: str, paths: Sequence[str]) -> Joints:
    """The forgotten images that occur in a forest. paths: EDGES files, read one after the other."""
    forgotten = hidden.forgotten_ids(run)
    found: dict[int, list[np.ndarray]] = {}
    for path in paths if len(forgotten) else ():
        table = parquet.read_table(path)
        for end in ("low", "high"):
            ids, spaces = table[end].to_numpy(), table[f"{end}_space"].to_numpy()
            gone = hidden.is_hidden(ids, forgotten)
            for space in np.unique(spaces[gone]).tolist():
                found.setdefault(space, []).append(np.unique(ids[gone & (spaces == space)]))
    return Joints({space: np.unique(np.concatenate(ids)) for space, ids in found.items()})


def with_joints(ids: np.ndarray, places: np.ndarray | None, joints: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Node numbers of one space with its joints among them: (ids ascending, place of each row or None), as `ranked`."""
    if not len(joints):
        return ids, places
    merged = np.union1d(ids, joints)
    rows = ids if places is None else ids[places]
    return merged, np.searchsorted(merged, rows).astype(np.uint32)


def apart(labels: np.ndarray, joint: np.ndarray) -> np.ndarray:
    """Labels with every joint of a component without images on its own. joint: (n,) bool."""
    if not joint.any():
        return labels
    has = np.zeros(len(labels), bool)
    has[labels[~joint]] = True
    lonely = np.flatnonzero(joint & ~has[labels])
    labels = labels.copy()
    labels[lonely] = lonely
    return labels


def without_copies(
    run: str,
    inputs: "Inputs",
    earlier: Sequence[Generation],
    options: JoinOptions,
    scratch: Scratch,
    spread: Spread,
    most: int,
    empty: Empty,
) -> tuple["Inputs", np.ndarray]:
    """(what is left to deduplicate, (n,) uint64 the images that are kept out, ascending).

    Kept out are images of this generation above the threshold to a forgotten one that left before they came, and those
    that an earlier generation kept out.
    """
    out = [np.empty(0, np.uint64), *_kept_out(earlier)]
    for before, paths in _blocked(run).items():
        known = vectors.open_files(paths)
        if not known.rows:
            continue
        _refuse_other_model(known, inputs, paths[0])
        for role, rows in (("pool", inputs.pool), ("seeds", inputs.seeds), ("exempt", inputs.exempt)):
            if rows is None:
                continue
            late = rows.where(inputs.fresh(rows) & (rows.all_ids() >= np.uint64(before)), empty)
            images = inputs.members(late, None, 0, late.count, most)
            inside = Scratch(f"{scratch.directory}/{before}-{role}")
            out.append(late.all_ids()[_hits(images, known, options, inside, spread, most)])
    ids = np.unique(np.concatenate(out))
    if not len(ids):
        return inputs, ids
    return _left(inputs, ids, empty), ids


def _kept_out(earlier: Sequence[Generation]) -> list[np.ndarray]:
    found = []
    for path in (
        path for generation in earlier if generation.total(blocklist.REASON) for path in generation.part_paths
    ):
        table = parquet.read_table(path, ["image_id", "reason"])
        mine = table["reason"].to_numpy(zero_copy_only=False) == blocklist.REASON
        found.append(table["image_id"].to_numpy()[mine])
    return found


def _blocked(run: str) -> dict[int, list[str]]:
    found: dict[int, list[str]] = {}
    for before, path in blocklist.vector_files(run):
        found.setdefault(before, []).append(path)
    return found


def _refuse_other_model(known: vectors.VectorSet, inputs: "Inputs", path: str) -> None:
    """Vectors of another copy model say nothing of these: better to stop than to let copies of forgotten images in."""
    files = [part.vectors for part in inputs.parts if part.vectors is not None]
    mine = vectors.open_files(files[:1])
    try:
        vectors.refuse_other_model(mine, known, files[0], path)
    except UserError as error:
        raise UserError(
            f"{error}; copies of forgotten images could not be told: keep the copy model with which they were "
            "forgotten, or remove the vectors-*.parquet there and give up looking for near copies of them",
            exit_code=1,
        ) from error


def _hits(
    images: Members, known: vectors.VectorSet, options: JoinOptions, scratch: Scratch, spread: Spread, most: int
) -> np.ndarray:
    """Nodes of the images above the threshold to one of `known`: (n,) int64, ascending."""
    if not images.rows:
        return np.empty(0, np.int64)
    count = images.count + known.rows
    blocked = Members(tuple(whole_set(known, most, images.count)), images.dimension, images.half, count)
    store(blocked, scratch, spread)
    cut, offsets = tiles(blocked), np.array([0, images.count, count])
    names = [f"cross/{number:05d}" for number in range(len(images.pieces))]
    calls: list[tuple[str, tuple[Any, ...]]] = [
        (name, (scratch, name, piece, images.dimension, cut, images.half, offsets, options))
        for name, piece in zip(names, images.pieces, strict=True)
        if not scratch.has(name)
    ]
    for _ in spread(join_references, calls):
        pass
    nodes = [np.array(scratch.get(name, "hits"))["node"] for name in names]
    return np.unique(np.concatenate([np.empty(0, np.uint32), *nodes])).astype(np.int64)


def _left(inputs: "Inputs", out: np.ndarray, empty: Empty) -> "Inputs":
    stays = ~hidden.is_hidden(inputs.pool.all_ids(), out)
    value = None if inputs.value is None else inputs.value[stays]
    seeds: Rows = inputs.seeds.where(~hidden.is_hidden(inputs.seeds.all_ids(), out), empty)
    return replace(inputs, pool=inputs.pool.where(stays, empty), seeds=seeds, value=value)
