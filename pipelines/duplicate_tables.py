"""Rows of the duplicates table, part by part, from the decisions that the driver left in scratch."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from curation import parquet
from curation.blocklist import REASON
from curation.duplicates.forest import NOBODY
from curation.duplicates.scratch import Reader, Scratch
from curation.hidden import is_hidden
from curation.schemas import DUPLICATES
from pipelines.duplicate_inputs import InputPart, copy_reason
from pipelines.image_parts import read_images, role
from pipelines.run_directory import PartRecord, PartWriter

DIRECT_HITS = 8
REASONS = ("kept", "self", "reference", "exact", "hash")


@dataclass(frozen=True)
class Decisions:
    """Where the decisions lie (arrays over ids, memory-mapped), and the names of what they speak of."""

    scratch: Scratch
    reference_names: tuple[str, ...]
    exempt: frozenset[str]
    """Seed sources without rows."""
    decontaminated: bool


def write_part(writer: PartWriter, name: str, part: InputPart, decisions: Decisions) -> PartRecord:
    """The rows of one part: its pool images that are ok or copies, and its seeds.

    Of exempt sets only those have a row that are kept out as copies of forgotten images.
    """
    ids, kinds = _rows(part, decisions.exempt, Reader(decisions.scratch).get("decisions", "forgotten"))
    table, reasons = _table(ids, kinds, Reader(decisions.scratch), decisions)
    counts = {reason: int((reasons == reason).sum()) for reason in REASONS}
    kept_out = int((reasons == REASON).sum())
    if kept_out:
        counts[REASON] = kept_out
    return writer.write(name, table, counts=counts)


def _rows(part: InputPart, exempt: frozenset[str], forgotten: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """((n,) ids, (n,) kind: pool, seed, exact or hash)."""
    if part.images is None:
        assert part.vectors is not None
        ids = parquet.read_table(part.vectors, ["image_id"])["image_id"].to_numpy()
        return ids, np.full(len(ids), "pool", object)
    table = read_images(part.images, ["image_id", "source", "status", "error", "duplicate_of"])
    kinds: list[str | None] = []
    kept_out = is_hidden(table["image_id"].to_numpy(), forgotten).tolist()
    columns = (table[name].to_pylist() for name in ("source", "status", "error", "duplicate_of"))
    for source, status, error, original, out in zip(*columns, kept_out, strict=True):
        mine = role(source)
        if mine == "reference" or (source in exempt and not out):
            kinds.append(None)
        elif status == "ok":
            kinds.append(mine)
        else:
            kinds.append(copy_reason(error) if status == "dropped" and original is not None else None)
    kind = np.array(kinds, object)
    present = np.array([k is not None for k in kinds], bool)
    return table["image_id"].to_numpy()[present], kind[present]


def _table(ids: np.ndarray, kinds: np.ndarray, reader: Reader, decisions: Decisions) -> tuple[pa.Table, np.ndarray]:
    def get(key: str) -> np.ndarray:
        return reader.get("decisions", key)

    pool_ids, labels = get("ids"), get("labels")
    component = ids.copy()
    reason = np.array(["kept"] * len(ids), object)
    forgotten = is_hidden(ids, get("forgotten")) & ((kinds == "pool") | (kinds == "seed"))
    kinds = np.where(forgotten, REASON, kinds)
    reason[forgotten] = REASON
    nearest_id = np.zeros(len(ids), np.uint64)
    similarity = np.full(len(ids), np.nan, np.float32)

    pool = np.flatnonzero(kinds == "pool")
    node = np.searchsorted(pool_ids, ids[pool])
    component[pool] = pool_ids[labels[node]]
    reason[pool[~get("stays")[node]]] = "self"
    neighbour = get("nearest")[node]
    has = neighbour != NOBODY
    nearest_id[pool[has]] = pool_ids[neighbour[has]]
    similarity[pool[has]] = get("similarity")[node[has]]

    copies = np.flatnonzero((kinds == "exact") | (kinds == "hash"))
    reason[copies] = kinds[copies]
    component[copies] = _components_of(get("copy_originals")[np.searchsorted(get("copy_ids"), ids[copies])], get)

    relative_component: list[int | None] = [None] * len(ids)
    references: list[list[dict[str, object]]] = [[] for _ in range(len(ids))]
    relative = np.flatnonzero((reason == "kept") & ((kinds == "pool") | (kinds == "seed")))
    if decisions.decontaminated and len(relative):
        relative_ids = get("relative_ids")
        at = np.searchsorted(relative_ids, ids[relative])
        reason[relative[get("dropped")[at]]] = "reference"
        smallest = relative_ids[get("relative_labels")[at]].tolist()
        for row, value in zip(relative.tolist(), smallest, strict=True):
            relative_component[row] = value
        hit_nodes = get("hit_nodes")
        low, high = np.searchsorted(hit_nodes, at), np.searchsorted(hit_nodes, at, side="right")
        for row, first, end in zip(relative.tolist(), low.tolist(), high.tolist(), strict=True):
            if end > first:
                references[row] = _direct(reader, first, end, decisions.reference_names)
    columns = [
        pa.array(ids),
        pa.array(component),
        pa.array(reason == "kept"),
        pa.array(reason.tolist(), pa.string()),
        pa.array(nearest_id, mask=np.isnan(similarity)),
        pa.array(similarity, mask=np.isnan(similarity)),
        pa.array(relative_component, pa.uint64()),
        pa.array(references, DUPLICATES.field("references").type),
    ]
    return pa.Table.from_arrays(columns, schema=DUPLICATES), reason


def _components_of(originals: np.ndarray, get: Callable[[str], np.ndarray]) -> np.ndarray:
    """(n,) uint64 component of the image that each copy repeats; that image's id where it is not in the graph."""
    pool_ids, labels = get("ids"), get("labels")
    if not len(pool_ids):
        return originals
    place = np.minimum(np.searchsorted(pool_ids, originals), len(pool_ids) - 1)
    return np.where(pool_ids[place] == originals, pool_ids[labels[place]], originals)


def _direct(reader: Reader, first: int, end: int, names: tuple[str, ...]) -> list[dict[str, object]]:
    """The best direct hits of one image, best first. Hits of a node lie together, ordered by similarity."""
    spaces, reference, value = (
        np.array(reader.get("decisions", key)[first : min(end, first + DIRECT_HITS)])
        for key in ("hit_spaces", "hit_ids", "hit_similarity")
    )
    return [
        {"reference_set": names[space - 1], "reference_id": image, "similarity": cosine}
        for space, image, cosine in zip(spaces.tolist(), reference.tolist(), value.tolist(), strict=True)
    ]
