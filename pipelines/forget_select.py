"""Which images of a run are meant: those that the lists name, and the copies of them.

Parts are read one at a time, by many workers where there are many; what comes back are ids and keys of 8 bytes.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from curation import blocklist, parquet, storage
from curation.blocklist import BYTES, DOMAIN, KINDS, PIXELS, REASON, URL, keyed
from curation.hidden import is_hidden
from curation.schemas import SOURCE_SHIFT
from pipelines.blocking import domain_digest, host_of, parents, url_digest
from pipelines.context import Context
from pipelines.forget_lists import Asked
from pipelines.run_directory import Generation, RunDirectory

PARTS_PER_TASK = 32
VECTOR_PARTS = 64
"""Parts of score whose embeddings make one file of the block list."""
SERIAL_TASKS = 4
"""So few tasks are done in this process: to start Ray would take longer."""
IMAGE_STAGES = ("download", "import", "score", "filter")
OWN = ("download/", "score/")
"""Shards below these folders are the run's; any other location is the user's own file."""
PLACES_SHOWN = 20
NO_IDS = np.empty(0, np.uint64)
NO_KEYS = NO_IDS


@dataclass
class Selection:
    """What is to be forgotten."""

    ids: np.ndarray
    """(n,) uint64, ascending."""
    named: int
    """How many of them the lists name; the others are copies."""
    unmet: dict[str, np.ndarray]
    """Keys of the entries that the run does not hold, by kind of list."""
    representatives: np.ndarray
    """(n,) bool: those that stand for their component of duplicates."""
    copies_left: int
    """Images of the same components that are not among them."""
    originals: Counter[str] = field(default_factory=Counter)
    """Images whose bytes lie in the user's own files, by source."""
    places: list[str] = field(default_factory=list)
    """Some of those files."""


def select(context: Context, asked: Sequence[tuple[Asked, bool]], salt: bytes, caught: bool) -> Selection:
    """Find them. asked: the lists, and whether the copies of what they name go as well: members of the same
    self-components, and rows of equal bytes or pixels.

    caught: also images that the block list kept out of the dataset, but whose bytes came into the run.
    """
    run = context.run
    named, ids = [NO_IDS], NO_IDS
    unmet: dict[str, np.ndarray] = {}
    for one, copies in asked:
        matched, keys = _match(context, one, salt)
        unmet[one.kind] = one.keys[~is_hidden(one.keys, keys)]
        named.append(matched)
        ids = np.union1d(ids, _grown(context, matched, salt, copies))
    if caught:
        named.append(_caught(context))
        ids = np.union1d(ids, named[-1])
    representatives, left = _representatives(context, ids)
    found = Selection(ids, len(np.unique(np.concatenate(named))), unmet, representatives, left)
    for originals, places in collect(context, _originals, image_parts(run, ("download", "import")), ids):
        found.originals.update(originals)
        found.places += places
    found.places = sorted(found.places)[:PLACES_SHOWN]
    return found


def image_parts(run: RunDirectory, stages: Sequence[str] = IMAGE_STAGES) -> list[str]:
    """Paths of the parts of tables of images, of unfinished generations too."""
    return [path for stage in stages for g in run.stage(stage).all_generations() for path in part_paths(g)]


def part_paths(generation: Generation) -> list[str]:
    """The parts of a generation; of an unfinished one those that lie there."""
    if generation.complete:
        return generation.part_paths
    return sorted({*generation.part_paths, *storage.list_files(generation.directory, ".parquet")})


def collect(context: Context, function: Callable[..., Any], paths: Sequence[Any], *shared: Any) -> list[Any]:
    """function(path, *shared) of every path, in their order; paths that hold nothing of interest may give None."""
    groups = [paths[at : at + PARTS_PER_TASK] for at in range(0, len(paths), PARTS_PER_TASK)]
    calls = [(f"{number:08d}", (function, list(group))) for number, group in enumerate(groups)]
    if len(calls) <= SERIAL_TASKS:
        found = {name: each(*arguments, shared) for name, arguments in calls}
    else:
        found = dict(context.spread(each, calls, shared=shared))
    return [one for name, _ in calls for one in found[name] if one is not None]


def each(function: Callable[..., Any], paths: Sequence[Any], shared: tuple[Any, ...]) -> list[Any]:
    """What a worker does of `collect`."""
    return [function(path, *shared) for path in paths]


def read(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Those of the columns that a Parquet file has."""
    with parquet.open_file(path) as file, parquet.named(path):
        return file.read(None if columns is None else [name for name in columns if name in file.schema_arrow.names])


# ---- by the lists ---------------------------------------------------------------------------------------------------


def _match(context: Context, asked: Asked, salt: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(ids that a list names, those of its keys that were met)."""
    paths = image_parts(context.run, ("download", "import", "score"))
    found = collect(context, _match_part, paths, asked, salt)
    ids, keys = ([part[side] for part in found] for side in (0, 1))
    return np.unique(np.concatenate([NO_IDS, *ids])), np.unique(np.concatenate([NO_KEYS, *keys]))


def _match_part(path: str, asked: Asked, salt: bytes) -> tuple[np.ndarray, np.ndarray]:
    table = read(path, ["image_id", "url", "sha256", "stored_sha256"])
    ids = table["image_id"].to_numpy()
    chosen = np.zeros(len(ids), bool)
    met = NO_KEYS
    for rows, keys in _keys_asked_for(table, asked.kind, salt):
        here = is_hidden(keys, asked.keys)
        chosen[rows[here]] = True
        met = np.union1d(met, keys[here])
    return ids[chosen], met


def _keys_asked_for(table: pa.Table, kind: str, salt: bytes) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(rows, keys) pairs by which a list of this kind may name the rows of a table."""
    if kind == "domains":
        rows, digests, known = [], [], dict[str, list[bytes]]()
        for row, url in enumerate(table["url"].to_pylist()):
            host = None if url is None else host_of(url)
            if host is not None:
                if host not in known:
                    known[host] = [domain_digest(name) for name in parents(host)]
                digests += known[host]
                rows += [row] * len(known[host])
        yield np.array(rows, np.int64), keyed(salt, DOMAIN, digests)
        return
    names = ("url",) if kind == "urls" else ("sha256", "stored_sha256")
    for name in names:
        yield column_keys(table, name, salt)


KIND_OF = {"url": URL, "sha256": BYTES, "stored_sha256": BYTES, "pixel_sha256": PIXELS}
"""Columns of tables of images that identify one, and the kind of their keys."""


def column_keys(table: pa.Table, name: str, salt: bytes) -> tuple[np.ndarray, np.ndarray]:
    """(rows that have a value, their keys)."""
    if name not in table.column_names:
        return np.empty(0, np.int64), NO_KEYS
    values = table[name].to_pylist()
    rows = np.array([row for row, value in enumerate(values) if value is not None], np.int64)
    digests = (url_digest(v) if name == "url" else v for v in values if v is not None)
    return rows, keyed(salt, KIND_OF[name], digests)


def _caught(context: Context) -> np.ndarray:
    run = context.run
    dropped = collect(context, _caught_by_filter, image_parts(run, ("filter",)))
    discarded = collect(context, _caught_by_dedup, _duplicate_parts(run))
    return np.unique(np.concatenate([NO_IDS, *dropped, *discarded]))


def _caught_by_filter(path: str) -> np.ndarray:
    table = read(path, ["image_id", "error", "status"])
    mine = [
        s == "dropped" and e == REASON
        for s, e in zip(table["status"].to_pylist(), table["error"].to_pylist(), strict=True)
    ]
    return np.asarray(table["image_id"].to_numpy()[np.array(mine, bool)])


def _caught_by_dedup(path: str) -> np.ndarray:
    table = read(path, ["image_id", "reason"])
    return np.asarray(table["image_id"].to_numpy()[np.array(table["reason"].to_pylist(), object) == REASON])


# ---- the same image, and copies of it -------------------------------------------------------------------------------


def _grown(context: Context, ids: np.ndarray, salt: bytes, copies: bool) -> np.ndarray:
    """The ids with all that are the same image, and with `copies` those that are copies."""
    while len(ids):
        grown = np.union1d(ids, _equal(context, ids, salt, copies))
        if copies:
            grown = np.union1d(grown, _components(context, grown))
        if len(grown) == len(ids):
            break
        ids = grown
    return ids


def _equal(context: Context, ids: np.ndarray, salt: bytes, copies: bool) -> np.ndarray:
    """Ids of rows with the same URL; with `copies` also of those with the same bytes or pixels."""
    names = tuple(KIND_OF) if copies else ("url",)
    paths = image_parts(context.run, ("download", "import", "score"))
    keys: dict[str, list[np.ndarray]] = {kind: [NO_KEYS] for kind in KINDS}
    for found in collect(context, _keys_of_part, paths, ids, names, salt):
        for kind, values in found.items():
            keys[kind].append(values)
    known = {kind: np.unique(np.concatenate(values)) for kind, values in keys.items()}
    return np.unique(np.concatenate([NO_IDS, *collect(context, _with_keys, paths, known, names, salt)]))


def _keys_of_part(path: str, ids: np.ndarray, names: Sequence[str], salt: bytes) -> dict[str, np.ndarray] | None:
    table = read(path, ["image_id", *names])
    mine = is_hidden(table["image_id"].to_numpy(), ids)
    if not mine.any():
        return None
    table = table.filter(pa.array(mine))
    found: dict[str, np.ndarray] = {}
    for name in names:
        kind = KIND_OF[name]
        found[kind] = np.union1d(found.get(kind, NO_KEYS), column_keys(table, name, salt)[1])
    return found


def _with_keys(path: str, known: dict[str, np.ndarray], names: Sequence[str], salt: bytes) -> np.ndarray:
    table = read(path, ["image_id", *names])
    chosen = np.zeros(table.num_rows, bool)
    for name in names:
        rows, keys = column_keys(table, name, salt)
        chosen[rows[is_hidden(keys, known[KIND_OF[name]])]] = True
    return np.asarray(table["image_id"].to_numpy()[chosen])


def _duplicate_parts(run: RunDirectory) -> list[str]:
    return [path for g in run.stage("dedup").all_generations() for path in part_paths(g)]


def _components(context: Context, ids: np.ndarray) -> np.ndarray:
    """Ids of the self-components that hold one of `ids`: by the tables, and by what the forest joined them to later."""
    paths = _duplicate_parts(context.run)
    components = np.unique(np.concatenate([NO_IDS, *collect(context, _components_of_part, paths, ids)]))
    found = np.concatenate([NO_IDS, *collect(context, _members_of_part, paths, components)])
    return np.unique(np.concatenate([found, *collect(context, _neighbours, *_bridges(context.run), ids)]))


def _components_of_part(path: str, ids: np.ndarray) -> np.ndarray:
    table = read(path, ["image_id", "component_id"])
    return np.unique(table["component_id"].to_numpy()[is_hidden(table["image_id"].to_numpy(), ids)])


def _members_of_part(path: str, components: np.ndarray) -> np.ndarray:
    table = read(path, ["image_id", "component_id"])
    return np.asarray(table["image_id"].to_numpy()[is_hidden(table["component_id"].to_numpy(), components)])


def _bridges(run: RunDirectory) -> tuple[list[str], float]:
    """(files of the forest, threshold) where a later generation may have joined components of older tables."""
    generations = run.stage("dedup").generations()
    options = generations[-1].fingerprint.options if generations else {}
    guarded = options.get("split", "none") != "none" or options.get("max_component") is not None
    if len(generations) < 2 or guarded:
        return [], 1.0
    last = generations[-1]
    files = [last.file(name) for name in sorted(last.files) if name.startswith("self_forest/")]
    return files, float(options["threshold"])


def _neighbours(path: str, threshold: float, ids: np.ndarray) -> np.ndarray:
    table = read(path)
    inside = (table["low_space"].to_numpy() == 0) & (table["high_space"].to_numpy() == 0)
    inside &= table["similarity"].to_numpy() > np.float32(threshold)
    low, high = table["low"].to_numpy(), table["high"].to_numpy()
    return np.concatenate([high[inside & is_hidden(low, ids)], low[inside & is_hidden(high, ids)]])


def _representatives(context: Context, ids: np.ndarray) -> tuple[np.ndarray, int]:
    """((n,) bool which of the ids stand for their component, how many other images their components hold)."""
    paths = _duplicate_parts(context.run)
    stand = np.unique(np.concatenate([NO_IDS, *collect(context, _standing, paths, ids)]))
    components = np.unique(np.concatenate([NO_IDS, *collect(context, _components_of_part, paths, ids)]))
    members = np.unique(np.concatenate([NO_IDS, *collect(context, _members_of_part, paths, components)]))
    return is_hidden(ids, stand), int((~is_hidden(members, ids)).sum())


def _standing(path: str, ids: np.ndarray) -> np.ndarray:
    table = read(path, ["image_id", "reason"])
    mine = table["image_id"].to_numpy()
    stays = np.isin(np.array(table["reason"].to_pylist(), object).astype(str), ["kept", "reference"])
    return np.asarray(mine[stays & is_hidden(mine, ids)])


def _originals(path: str, ids: np.ndarray) -> tuple[Counter[str], list[str]] | None:
    table = read(path, ["image_id", "source", "shard"])
    table = table.filter(pa.array(is_hidden(table["image_id"].to_numpy(), ids)))
    rows = [row for row in table.to_pylist() if row["shard"] is not None and not row["shard"].startswith(OWN)]
    if not rows:
        return None
    return Counter(row["source"] for row in rows), sorted({row["shard"] for row in rows})[:PLACES_SHOWN]


# ---- what stays of them ---------------------------------------------------------------------------------------------


def first_later_id(run: RunDirectory) -> int:
    """The first id of sources that had not been filtered yet: what has been stays unless it is forgotten itself."""
    numbers = [int(p.name.split("-")[1]) for g in run.stage("filter").generations() for p in g.parts]
    return (max(numbers) + 1) << SOURCE_SHIFT if numbers else 0


def block(context: Context, name: str, ids: np.ndarray, salt: bytes) -> dict[str, int]:
    """Put what tells copies of these images on the block list; how many keys, hashes and vectors that is."""
    run, before = context.run, first_later_id(context.run)
    keys: dict[str, list[np.ndarray]] = {kind: [NO_KEYS] for kind in KINDS}
    hashes = [NO_KEYS]
    for found, pca in collect(context, _facts, image_parts(run), ids, salt):
        hashes.append(pca)
        for kind, values in found.items():
            keys[kind].append(values)
    merged = [(kind, np.unique(np.concatenate(values))) for kind, values in keys.items()]
    blocklist.put_keys(run.root, f"{name}-images", merged, before)
    blocklist.put_hashes(run.root, name, np.concatenate(hashes), before)
    files = [p.replace("/part-", "/copy_embedding/part-") for p in image_parts(run, ("score",))]
    groups = [files[at : at + VECTOR_PARTS] for at in range(0, len(files), VECTOR_PARTS)]
    vectors = sum(collect(context, _vectors, groups, ids, run.root, name, before))
    counts = {f"{kind} keys": len(values) for kind, values in merged if len(values)}
    return counts | {"PCA hashes": len(np.unique(np.concatenate(hashes))), "copy embeddings": vectors}


def _facts(path: str, ids: np.ndarray, salt: bytes) -> tuple[dict[str, np.ndarray], np.ndarray] | None:
    found = _keys_of_part(path, ids, tuple(KIND_OF), salt)
    if found is None:
        return None
    table = read(path, ["image_id", "pca_hash"])
    mine = table.filter(pa.array(is_hidden(table["image_id"].to_numpy(), ids)))["pca_hash"].drop_null()
    return found, mine.to_numpy()


def _vectors(paths: Sequence[str], ids: np.ndarray, run: str, name: str, before: int) -> int | None:
    """Copy the embeddings of some parts to the block list, under numbers in the place of ids."""
    tables = []
    for path in paths:
        if storage.exists(path):
            table = read(path)
            tables.append(table.filter(pa.array(is_hidden(table["image_id"].to_numpy(), ids))))
    rows: int = sum(table.num_rows for table in tables)
    if not rows:
        return None
    table = pa.concat_tables([table for table in tables if table.num_rows])
    table = table.set_column(0, table.schema.field("image_id"), pa.array(np.arange(rows, dtype=np.uint64)))
    generation, part = paths[0].split("/")[-3], paths[0].rsplit("/", 1)[-1].removesuffix(".parquet")
    blocklist.put_vectors(run, f"{name}-{generation}-{part}", table, before)
    return rows
