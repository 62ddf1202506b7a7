"""What dedup works on: the copy embeddings of a run, or folders of Parquet from elsewhere.

Per image: its id (8 B), its place in its file (4 B) and one number to choose representatives by (8 B), in columns that
the kernel may page out (`pipelines/columns.py`).
"""

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from curation import parquet, vectors
from curation.duplicates.members import Members, Piece, bundled, file_pieces, rank
from curation.errors import UserError
from curation.vectors import VectorSet
from pipelines import embedded
from pipelines.columns import Empty
from pipelines.context import Context
from pipelines.image_parts import read_images, role
from pipelines.run_directory import Generation

COPY_EMBEDDING = "copy_embedding"
MAX_REFERENCE_SETS = 254
COPY_REASONS = {"duplicate_bytes": "exact", "duplicate_pixels": "exact", "duplicate_pca_hash": "hash"}


@dataclass(frozen=True)
class InputPart:
    """One file of copy embeddings, the table its rows are described in, and the name that output rows keep."""

    name: str
    vectors: str | None
    images: str | None
    """Part of the filter table; None for Parquet from elsewhere."""
    fresh: bool
    """Belongs to the generation of dedup that is being made."""
    generation: int = 0
    """The generation of filter that wrote it."""


class Rows:
    """Some rows of some parts: ids, places in the parts' files. At most `room` of them."""

    def __init__(self, room: int, empty: Empty) -> None:
        self.parts: list[int] = []
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.count = 0
        self._ids, self._positions = empty(room, "<u8"), empty(room, "<u4")

    def add(self, part: int, ids: np.ndarray, positions: np.ndarray) -> None:
        if len(ids):
            span = slice(self.count, self.count + len(ids))
            self._ids[span], self._positions[span] = ids, positions
            self.parts.append(part)
            self.ids.append(self._ids[span])
            self.positions.append(self._positions[span])
            self.count = span.stop

    def all_ids(self) -> np.ndarray:
        """(n,) uint64, in the order they were added."""
        return self._ids[: self.count]

    def where(self, mask: np.ndarray, empty: Empty) -> "Rows":
        """The rows at which `mask` (n,) bool is true."""
        found, begin = Rows(int(mask.sum()), empty), 0
        for part, ids, positions in zip(self.parts, self.ids, self.positions, strict=True):
            mine = mask[begin : begin + len(ids)]
            found.add(part, ids[mine], positions[mine])
            begin += len(ids)
        return found


def merged(one: Rows, other: Rows, empty: Empty) -> Rows:
    """Rows of both, part by part, in the order of their places."""
    if not other.count:
        return one
    found = Rows(one.count + other.count, empty)
    owners: dict[int, list[tuple[Rows, int]]] = {}
    for rows in (one, other):
        for k, part in enumerate(rows.parts):
            owners.setdefault(part, []).append((rows, k))
    for part in sorted(owners):
        ids = np.concatenate([rows.ids[k] for rows, k in owners[part]])
        positions = np.concatenate([rows.positions[k] for rows, k in owners[part]])
        order = np.argsort(positions, kind="stable")
        found.add(part, ids[order], positions[order])
    return found


@dataclass
class Inputs:
    """Everything dedup reads, by role."""

    parts: list[InputPart]
    dimension: int
    half: bool
    pool: Rows
    seeds: Rows
    references: list[Rows]
    """One per reference set; their `parts` index `reference_files`."""
    reference_names: list[str]
    reference_files: list[InputPart]
    value: np.ndarray | None = None
    """(pool rows,) what the representative is chosen by, largest first; None: the smallest id."""
    note: str | None = None
    """What had to be done otherwise than asked."""
    copies: tuple[np.ndarray, np.ndarray] = (np.empty(0, np.uint64), np.empty(0, np.uint64))
    """Ids that filter dropped as copies (ascending), and the original of each."""
    exempt: Rows | None = None
    """Seeds of exempt sets, which are held to the block list alone."""

    def members(
        self,
        rows: Rows,
        places: np.ndarray | None,
        offset: int,
        count: int,
        max_rows: int,
        fresh: Collection[int] | None = None,
    ) -> Members:
        """Rows as members of a join: row k is node places[k] + offset (None: k + offset).

        fresh: the generations of filter to be compared; None: those of the generation that is being made.
        """
        files = _told(self.parts, fresh)
        return Members(
            bundled(self._pieces(rows, files, places, offset, max_rows), max_rows),
            self.dimension,
            self.half,
            count,
        )

    def reference_members(
        self,
        ranked: Sequence[np.ndarray | None],
        offsets: np.ndarray,
        max_rows: int,
        fresh: Collection[int] | None = None,
    ) -> Members:
        """All reference images, set after set. offsets: (spaces + 1,) first node of each space. fresh: as `members`."""
        files = _told(self.reference_files, fresh)
        pieces: list[Piece] = []
        for number, rows in enumerate(self.references):
            pieces += self._pieces(rows, files, ranked[number], int(offsets[number + 1]), max_rows)
        return Members(bundled(pieces, max_rows), self.dimension, self.half, int(offsets[-1]))

    @property
    def generations(self) -> frozenset[int]:
        """The generations of filter that the parts come from."""
        return frozenset(part.generation for part in [*self.parts, *self.reference_files])

    def fresh(self, rows: Rows) -> np.ndarray:
        """(n,) bool: rows of the generation that is being made, in the order of `rows`."""
        parts = [np.full(len(i), self.parts[p].fresh) for p, i in zip(rows.parts, rows.ids, strict=True)]
        return np.concatenate([np.empty(0, bool), *parts])

    def _pieces(
        self, rows: Rows, files: Sequence[InputPart], places: np.ndarray | None, offset: int, max_rows: int
    ) -> list[Piece]:
        pieces: list[Piece] = []
        begin = 0
        for part, positions in zip(rows.parts, rows.positions, strict=True):
            span = slice(begin, begin + len(positions))
            nodes = np.arange(span.start, span.stop) if places is None else places[span].astype(np.int64)
            begin = span.stop
            path = files[part].vectors
            assert path is not None
            file = files[part]
            numbers = (nodes + offset).astype(np.uint32)
            pieces += file_pieces(path, numbers, positions, file.fresh, max_rows, file.generation)
        return pieces


def _told(parts: Sequence[InputPart], fresh: Collection[int] | None) -> Sequence[InputPart]:
    return parts if fresh is None else [replace(part, fresh=part.generation in fresh) for part in parts]


def from_folders(folder: str, against: Sequence[str], representative: str, empty: Empty) -> Inputs:
    """Plain Parquet: every row of `folder` is pool, every folder of `against` ([NAME=]DIR) a reference set."""
    opened, named = embedded.folder_parts(folder)
    parts = [InputPart(part.name, part.path, None, True) for part in named if part.rows]
    pool = _all_rows(opened, empty)
    if not ascending(pool.all_ids()):
        vectors.refuse_repeated_ids(pool.all_ids(), folder)
    found = Inputs(parts, opened.dimension, opened.dtype == "halffloat", pool, Rows(0, empty), [], [], [])
    for entry in against:
        name, path = reference_name(entry)
        if name in found.reference_names:
            raise UserError(f"--against: {name} is given twice; name the sets apart with NAME=DIR")
        other = vectors.open_folder(path)
        vectors.refuse_other_model(opened, other, folder, path)
        rows = _all_rows(other, empty, len(found.reference_files))
        vectors.refuse_repeated_ids(rows.all_ids(), path)
        if other.dtype != opened.dtype:
            raise UserError(f"{path} holds {other.dtype} vectors, {folder} {opened.dtype}: store both in one type")
        found.references.append(rows)
        found.reference_names.append(name)
        found.reference_files += [InputPart("", p.path, None, True) for p in other.partitions]
    _refuse_too_many(found.reference_names)
    _plain_value(found, representative, folder, empty)
    return found


def reference_name(entry: str) -> tuple[str, str]:
    """`NAME=DIR` or `DIR` (its last folder is the name)."""
    name, separator, path = entry.partition("=")
    if separator and "/" not in name:
        return name, path
    return entry.rstrip("/").rsplit("/", 1)[-1], entry


def from_run(context: Context, generation: Generation, representative: str, empty: Empty) -> Inputs:
    """The images that filter left, with the copy embeddings that score made, of all generations up to this one."""
    sources = {s.name: s for s in context.run.sources()}
    earlier = [g for g in context.stage(generation.fingerprint.stage).generations() if g.number < generation.number]
    fresh = set(generation.consumed["filter"])
    seen = fresh.union(*(g.consumed["filter"] for g in earlier))
    scored = {
        record.name: g.file(f"{COPY_EMBEDDING}/{record.name}.parquet")
        for g in context.run.stage("score").generations()
        for record in g.parts
        if f"{COPY_EMBEDDING}/{record.name}.parquet" in record.files
    }
    parts = [
        InputPart(record.name, scored.get(record.name), g.writer.path(record.name), g.number in fresh, g.number)
        for g in context.run.stage("filter").generations()
        if g.number in seen
        for record in g.parts
    ]
    parts.sort(key=lambda part: part.name)
    files = [part.vectors for part in parts if part.vectors is not None]
    if not files:
        raise UserError(
            f"{context.run.path('score')} holds no copy embeddings: run `curate filter` with a copy model first"
        )
    opened = vectors.open_files(files)
    names = [s.label for s in sources.values() if s.role == "reference"]
    _refuse_too_many(names)
    room: Counter[str] = Counter()
    numbered = {s.number: s.name for s in sources.values()}
    for file in opened.partitions:
        number = embedded.source_number(file.path.rsplit("/", 1)[-1])
        name = numbered.get(-1 if number is None else number, "pool")
        room[name] += file.rows
        room[role(name)] += file.rows if ":" in name else 0
    found = Inputs(
        parts,
        opened.dimension,
        opened.dtype == "halffloat",
        Rows(room["pool"], empty),
        Rows(room["seed"], empty),
        [Rows(room[f"reference:{name}"], empty) for name in names],
        names,
        parts,
        exempt=Rows(sum(room[s.name] for s in sources.values() if s.exempt), empty),
    )
    column = representative.removeprefix("column:") if representative.startswith("column:") else None
    wanted = ["width", "height"] if representative == "resolution" else [column] if column else []
    values = empty(room["pool"] if wanted else 0, "<f8")
    copies: list[tuple[np.ndarray, np.ndarray]] = []
    for index, part in enumerate(parts):
        assert part.images is not None
        names_read = ["image_id", "source", "status", "error", "duplicate_of"]
        table = read_images(part.images, list(dict.fromkeys([*names_read, *_known_columns(part.images, wanted)])))
        copies.append(_copies(table))
        if part.vectors is None:
            continue
        ids = table["image_id"].to_numpy()
        usable = _strings(table["status"]) == "ok"
        embedded_ids = _column(part.vectors, "image_id").to_numpy()
        place = _positions(embedded_ids, ids)
        lost = usable & (place < 0)
        if lost.any():
            raise UserError(
                f"{part.vectors}: no copy embedding of image {ids[lost][0]} ({int(lost.sum())} such images); "
                "run `curate filter --rebuild`",
                exit_code=1,
            )
        names_of_rows = _strings(table["source"])
        for name in dict.fromkeys(names_of_rows.tolist()):
            mine = usable & (names_of_rows == name)
            if role(name) == "pool":
                begin = found.pool.count
                found.pool.add(index, ids[mine], place[mine])
                if wanted:
                    values[begin : found.pool.count] = _value(table, wanted)[mine]
            elif role(name) == "seed":
                rows = found.exempt if found.exempt is not None and sources[name].exempt else found.seeds
                rows.add(index, ids[mine], place[mine])
            elif role(name) == "reference":
                found.references[names.index(name.split(":", 1)[1])].add(index, ids[mine], place[mine])
    found.value = values[: found.pool.count] if wanted else None
    found.copies = _roots(copies)
    return found


def _all_rows(opened: VectorSet, empty: Empty, first_part: int = 0) -> Rows:
    rows = Rows(opened.rows, empty)
    for index, part in enumerate(opened.partitions):
        ids = replace(opened, partitions=(part,)).all_ids()
        rows.add(first_part + index, ids, np.arange(part.rows))
    return rows


def _refuse_too_many(names: Sequence[str]) -> None:
    if len(names) > MAX_REFERENCE_SETS:
        raise UserError(f"{len(names)} reference sets; at most {MAX_REFERENCE_SETS} fit, merge some of them")


def _plain_value(found: Inputs, representative: str, folder: str, empty: Empty) -> None:
    paths = [part.vectors for part in found.parts if part.vectors is not None]
    if representative == "resolution":
        wanted = ["width", "height"]
        if not all(set(wanted) <= set(parquet.schema(p).names) for p in paths):
            found.note = (
                f"{folder} has no columns width and height: the earliest image of a component stays, not the largest"
            )
            return
    elif representative.startswith("column:"):
        wanted = [representative.removeprefix("column:")]
    else:
        return
    found.value = empty(found.pool.count, "<f8")
    begin = 0
    for path in paths:
        columns = [_numbers(_column(path, name), name, path) for name in wanted]
        end = begin + len(columns[0])
        found.value[begin:end] = columns[0] if len(columns) == 1 else columns[0] * columns[1]
        begin = end


def _column(path: str, name: str) -> pa.ChunkedArray:
    names = parquet.schema(path).names
    if name not in names:
        raise UserError(f"representative: {path} has no column `{name}` (it has {', '.join(names)})")
    return parquet.read_table(path, [name])[name]


def _known_columns(path: str, wanted: Sequence[str]) -> list[str]:
    for name in wanted:
        names = parquet.schema(path).names
        if name not in names:
            raise UserError(f"representative: the images table has no column `{name}` (it has {', '.join(names)})")
    return list(wanted)


def _numbers(column: pa.ChunkedArray, name: str, where: str) -> np.ndarray:
    kind = column.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"representative: column `{name}` of {where} is {kind}, not a number")
    return np.asarray(column.cast(pa.float64()).to_numpy(), dtype=np.float64)


def _value(table: pa.Table, wanted: Sequence[str]) -> np.ndarray:
    columns = [_numbers(table[name], name, "the images table") for name in wanted]
    return columns[0] if len(columns) == 1 else np.asarray(columns[0] * columns[1])


def _strings(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(zero_copy_only=False), dtype=object)


def _positions(known: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """(n,) int64 place of each id in `known`, -1 for none."""
    if not len(known):
        return np.full(len(ids), -1, np.int64)
    order = np.argsort(known, kind="stable")
    place = np.minimum(np.searchsorted(known, ids, sorter=order), len(known) - 1)
    return np.where(known[order[place]] == ids, order[place], -1)


def copy_reason(error: str | None) -> str | None:
    """exact or hash, of the `error` of a row that filter dropped; None for other reasons."""
    return COPY_REASONS.get((error or "").split(":", 1)[0].strip())


def _copies(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    errors = table["error"].to_pylist()
    mask = np.array([copy_reason(e) is not None for e in errors], bool)
    known = table["duplicate_of"].is_valid().to_numpy(zero_copy_only=False)
    mask = mask & (_strings(table["status"]) == "dropped") & known
    originals = table["duplicate_of"].fill_null(0).to_numpy()
    return table["image_id"].to_numpy()[mask], originals[mask]


def _roots(copies: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Copies of copies lead to what they are copies of in the end."""
    ids = np.concatenate([np.empty(0, np.uint64), *(c for c, _ in copies)])
    originals = np.concatenate([np.empty(0, np.uint64), *(o for _, o in copies)])
    order = np.argsort(ids, kind="stable")
    ids, originals = ids[order], originals[order]
    for _ in range(64):
        place = _positions(ids, originals)
        again = place >= 0
        if not again.any():
            break
        originals = np.where(again, originals[place], originals)
    return ids, originals


def ascending(ids: np.ndarray) -> bool:
    """Whether each id is larger than the one before; in pieces, so that no mask over all of them is made."""
    step = 1 << 20
    return all(
        bool((ids[k + 1 : k + step + 1] > ids[k : k + step][: len(ids) - 1 - k]).all())
        for k in range(0, len(ids), step)
    )


def ranked(rows: Rows) -> tuple[np.ndarray, np.ndarray | None]:
    """(ids ascending, place of each row in that order or None): node numbers of one space."""
    return (rows.all_ids(), None) if ascending(rows.all_ids()) else rank(rows.all_ids())
