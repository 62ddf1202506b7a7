"""What a run will cost before it is started: rows, bytes, FLOP, memory and hours of every stage.

Arithmetic on the configuration, on the counts of the sources (their metadata, or `images:` where there is no data
yet) and on the assumptions of `pipelines/hardware.py`. Each line of the arithmetic can be printed.
"""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from curation import storage
from curation.duplicates.cells import CELLS_PER_ROOT
from curation.duplicates.tasks import EXACT_MULTIPLY_ADDS
from curation.duplicates.tiles import TILE_ROWS
from curation.errors import UserError
from pipelines import run as driver
from pipelines.configuration import RunConfig, SourceConfig
from pipelines.hardware import ASSUMPTIONS, Assumption, Hardware, model_cost
from pipelines.stages.retrieve import SAMPLE_ABOVE, SeedSetConfig

KNOWN = {assumption.name: assumption.value for assumption in ASSUMPTIONS}
COPY_MODEL = "sscd"
PART_ROWS = 1000
BLOCK_ROWS = 65_536
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


@dataclass
class StagePlan:
    """One stage. rows_out: rows that go on to the next stage. bound: what its hours are spent on."""

    stage: str
    rows_in: int
    rows_out: int
    bytes_read: float = 0
    bytes_written: float = 0
    flop: float = 0
    memory_per_worker: float = 0
    hours: float = 0
    bound: str = ""
    arithmetic: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class SeedSetPlan:
    """What a seed set is expected to bring. basis: how `retrieved` was arrived at."""

    name: str
    seeds: int
    as_is: int
    mode: str
    retrieved: int
    basis: str


@dataclass
class Plan:
    """A whole run on some hardware."""

    run: str
    hardware: Hardware
    stages: list[StagePlan]
    seed_sets: list[SeedSetPlan]
    nominal: dict[str, int]
    notes: list[str]
    assumptions: tuple[Assumption, ...] = ASSUMPTIONS

    @property
    def hours(self) -> float:
        return sum(stage.hours for stage in self.stages)

    @property
    def bytes_written(self) -> float:
        return sum(stage.bytes_written for stage in self.stages)

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self) | {"hours": self.hours, "bytes_written": self.bytes_written}


@dataclass(frozen=True)
class Counts:
    """Rows at the points of a run where their number changes."""

    listed: int
    imported: int
    pool: int
    seeds: dict[str, int]
    references: int
    exempt: int = 0
    """Of the seeds: images of sets that are exempt from decontamination."""

    @property
    def images(self) -> int:
        return self.listed + self.imported

    @property
    def filtered(self) -> int:
        """Pool images that the filter keeps."""
        return round(self.pool * KNOWN["filter_share"])

    @property
    def distinct(self) -> int:
        """Pool images that self-dedup keeps."""
        return round(self.filtered * KNOWN["self_share"])

    @property
    def kept(self) -> int:
        """Pool images that are left for the semantic embedding."""
        return round(self.distinct * KNOWN["reference_share"]) if self.references else self.distinct


def plan(config: RunConfig, hardware: Hardware, *, first: str | None = None, last: str | None = None) -> Plan:
    """Plan the stages that would run. Raises UserError where a source cannot be counted."""
    notes: list[str] = []
    counts = count_sources(config.sources, notes)
    seed_sets = plan_seed_sets(config, counts)
    balanced = balance_target(config, counts)
    nominal = nominal_counts(seed_sets, balanced)
    stages = []
    for stage in driver.selected(config, first, last):
        if stage.name == "download":
            stages += _ingest(config, counts)
        else:
            stages.append(PLANNERS[stage.name](config, counts, seed_sets, nominal))
    for planned in stages:
        _time(planned, hardware)
    notes += _warnings(config, hardware, stages)
    return Plan(config.run, hardware, stages, seed_sets, nominal, notes)


def count_sources(sources: Iterable[SourceConfig], notes: list[str]) -> Counts:
    """Rows per role: `images:` where it is given, else counted from files."""
    listed = imported = pool = references = exempt = 0
    seeds: dict[str, int] = {}
    for number, source in enumerate(sources):
        rows = source.images if source.images is not None else count_rows(f"sources.{number}", source, notes)
        role, _, name = source.role.partition(":")
        if source.urls is not None:
            listed += rows
        else:
            imported += rows
        if role == "pool":
            pool += rows
        elif role == "seed":
            seeds[name] = rows
            exempt += rows if source.exempt else 0
        else:
            references += rows
    return Counts(listed, imported, pool, seeds, references, exempt)


def count_rows(key: str, source: SourceConfig, notes: list[str]) -> int:
    """Rows of a source from the metadata of its files, nothing decoded. Tars without Parquet are estimated by size."""
    kind, origin = source.origin
    fs, inner = storage.filesystem(origin)
    paths = _files(fs, inner)
    if not paths:
        raise UserError(f"{key}.{kind}: {origin} is not there, and no `images:` says how many to expect")
    if kind == "folder":
        return sum(path.lower().endswith(IMAGE_SUFFIXES) for path in paths)
    tables = [path for path in paths if path.endswith((".parquet", ".pq"))]
    if tables:
        return sum(_parquet_rows(fs, path) for path in tables)
    if kind == "tars":
        held = sum(int(fs.size(path)) for path in paths if path.endswith(".tar"))
        notes.append(f"{key}.tars: {origin} has no Parquet beside its tars; rows are estimated from their bytes")
        return round(held / KNOWN["image_bytes"])
    return sum(_lines(fs, path) - path.endswith((".csv", ".tsv")) for path in paths)


def _files(fs: Any, inner: str) -> list[str]:
    if any(sign in inner for sign in "*?[") and not fs.exists(inner):
        return sorted(fs.glob(inner))
    if not fs.exists(inner):
        return []
    return sorted(fs.find(inner)) if fs.isdir(inner) else [inner]


def _parquet_rows(fs: Any, path: str) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with fs.open(path, "rb") as file:
            return int(pq.read_metadata(file).num_rows)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from error


def _lines(fs: Any, path: str) -> int:
    count, last = 0, b"\n"
    with fs.open(path, "rb", compression="infer") as file:
        while chunk := file.read(1 << 22):
            count += chunk.count(b"\n")
            last = chunk[-1:]
    return count + (last != b"\n")


def plan_seed_sets(config: RunConfig, counts: Counts) -> list[SeedSetPlan]:
    """What each seed set brings, as it is and by retrieval: as `retrieves:` says, else at most what its mode allows."""
    expected = {s.role.split(":", 1)[1]: s.retrieves for s in config.sources if s.role.startswith("seed:")}
    planned = []
    for name, seeds in counts.seeds.items():
        as_is = seeds if "all" in config.mix.as_is or name in config.mix.as_is else 0
        mode, retrieved, basis = _retrieved(config, name, seeds, counts.kept)
        if expected[name] is not None and mode != "none":
            retrieved, basis = expected[name] or 0, "as the configuration expects"
        planned.append(SeedSetPlan(name, seeds, as_is, mode, retrieved, basis))
    return planned


def _retrieved(config: RunConfig, name: str, seeds: int, pool: int) -> tuple[str, int, str]:
    """(mode, images drawn at most, why) of one seed set."""
    if config.retrieve is None:
        return "none", 0, "nothing is retrieved"
    own = config.retrieve.seed_sets.get(name, SeedSetConfig())
    mode = own.mode or config.retrieve.mode
    if mode == "auto":
        mode = "sample" if seeds > SAMPLE_ABOVE else "cluster"
    if mode == "sample":
        neighbours = min(own.neighbours or config.retrieve.neighbours, pool)
        return mode, seeds * neighbours, f"{seeds:,} x {neighbours}"
    if mode == "cluster":
        cap, per = own.cap or config.retrieve.cap, own.per_cluster or config.retrieve.per_cluster
        clusters = seeds // (own.min_seeds or config.retrieve.min_seeds)
        bounds = {"its cap": cap, "all of the pool": pool, f"at most {clusters:,} clusters x {per:,}": clusters * per}
        basis, retrieved = min(bounds.items(), key=lambda item: item[1])
        return mode, retrieved, basis
    return mode, 0, "draws nothing"


def balance_target(config: RunConfig, counts: Counts) -> int:
    """Images that balanced sampling takes."""
    return min(config.balance.target, counts.kept) if config.balance is not None else 0


def nominal_counts(seed_sets: list[SeedSetPlan], balanced: int) -> dict[str, int]:
    """The paper's count: an image counts once for every time it is brought in."""
    counts = {"as is": sum(planned.as_is for planned in seed_sets)}
    for mode in ("sample", "cluster"):
        counts[f"retrieved, {mode} mode"] = sum(p.retrieved for p in seed_sets if p.mode == mode)
    if balanced:
        counts["balanced"] = balanced
    return counts | {"nominal": sum(counts.values())}


def _ingest(config: RunConfig, counts: Counts) -> list[StagePlan]:
    size, row = KNOWN["image_bytes"], KNOWN["row_bytes"]
    found = []
    if counts.listed:
        found.append(
            StagePlan(
                "download",
                counts.listed,
                counts.listed,
                bytes_read=counts.listed * size,
                bytes_written=counts.listed * (size + row),
                memory_per_worker=config.download.shard_rows * size,
                arithmetic=[
                    f"{counts.listed:,} URLs x {size:,.0f} B from the network, the same and {row:.0f} B a row to disk",
                    f"memory: a shard of {config.download.shard_rows:,} images is buffered",
                ],
            )
        )
    if counts.imported:
        found.append(
            StagePlan(
                "import",
                counts.imported,
                counts.imported,
                bytes_read=counts.imported * size,
                bytes_written=counts.imported * row,
                memory_per_worker=PART_ROWS * size,
                arithmetic=[
                    f"{counts.imported:,} images x {size:,.0f} B read where they lie, {row:.0f} B a row written"
                ],
            )
        )
    return found


def _filter(config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], _nominal: dict[str, int]) -> StagePlan:
    name = config.filter.copy_model or COPY_MODEL
    flop, dimension, _ = model_cost(name)
    size, row = KNOWN["image_bytes"], KNOWN["row_bytes"]
    images, blurred = counts.images, KNOWN["blurred_share"] if config.filter.faces else 0
    extra = NSFW_FLOP * config.filter.nsfw + FACE_FLOP * config.filter.faces
    return StagePlan(
        "filter",
        images,
        counts.filtered + sum(counts.seeds.values()) + counts.references,
        bytes_read=images * size,
        bytes_written=images * (2 * row + 2 * dimension + blurred * size),
        flop=images * (flop + extra),
        memory_per_worker=PART_ROWS * 320 * 320 * 3,
        arithmetic=[
            f"{images:,} images decoded once; {name} {flop:.3g} FLOP, NSFW and faces {extra:.3g} FLOP each",
            f"written: two rows, {dimension} x 2 B, {blurred:.0%} of the images once more with faces blurred",
        ],
    )


def _dedup(config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], _nominal: dict[str, int]) -> StagePlan:
    dimension = model_cost(config.filter.copy_model or COPY_MODEL)[1]
    others = counts.references + sum(counts.seeds.values()) - counts.exempt if counts.references else 0
    graphs = {"pool": counts.filtered}
    if others:
        graphs["kept pool with seeds and references"] = counts.distinct + others
    flop = moved = memory = 0.0
    visits = int(KNOWN["visits"])
    lines = []
    for graph, rows in graphs.items():
        if rows * rows / 2 * dimension <= EXACT_MULTIPLY_ADDS:
            flop += float(dimension) * rows * rows
            moved += 2.0 * dimension * rows
            memory = max(memory, 8.0 * dimension * TILE_ROWS)
            lines.append(f"{graph}: n = {rows:,}: all pairs, d n^2 = {float(dimension) * rows * rows:.2e} FLOP")
            continue
        cells = max(1, round(CELLS_PER_ROOT * math.sqrt(rows)))
        cell = rows / cells * KNOWN["imbalance"]
        assign, join = 2.0 * dimension * rows * cells, 2.0 * dimension * rows * visits * cell
        flop += assign + join
        moved += 2.0 * dimension * rows * (1 + visits)
        memory = max(memory, 2 * 2.0 * dimension * cell * (1 + visits))
        lines += [
            f"{graph}: n = {rows:,} in c = {CELLS_PER_ROOT:g} sqrt(n) = {cells:,} cells, each vector visits {visits}",
            f"  assign 2 d n c = {assign:.2e}, products 2 d n visits (n / c) imbalance = {join:.2e} FLOP",
            f"  shuffled: n (1 + visits) d x 2 B = {2.0 * dimension * rows * (1 + visits):.2e} B",
        ]
    union = 4.0 * counts.filtered
    lines.append(f"union-find: one array of 4 B x {counts.filtered:,} = {union:.2e} B in one process")
    return StagePlan(
        "dedup",
        counts.filtered + others,
        counts.kept,
        bytes_read=moved + counts.filtered * 2.0 * dimension,
        bytes_written=moved + counts.filtered * 40.0,
        flop=flop,
        memory_per_worker=max(memory, union),
        arithmetic=lines,
    )


def _embed(config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], _nominal: dict[str, int]) -> StagePlan:
    rows = counts.kept + sum(counts.seeds.values())
    costs = {name: model_cost(name) for name in config.embed.models}
    flop, width = sum(cost[0] for cost in costs.values()), sum(cost[1] for cost in costs.values())
    return StagePlan(
        "embed",
        rows,
        rows,
        bytes_read=rows * KNOWN["image_bytes"],
        bytes_written=rows * (2.0 * width + 8),
        flop=rows * flop,
        memory_per_worker=PART_ROWS * 224 * 224 * 3,
        arithmetic=[
            f"{counts.kept:,} pool images kept and {rows - counts.kept:,} seeds, decoded once",
            *(
                f"{name}: {rows:,} x {cost:.3g} = {rows * cost:.2e} FLOP, {dimension} x 2 B a row"
                + ("" if known else " (model not listed: counted as a ViT-H/14)")
                for name, (cost, dimension, known) in costs.items()
            ),
        ],
    )


def _semantic_dimension(config: RunConfig) -> int:
    return model_cost(config.embed.models[0])[1]


def _cluster(config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], _nominal: dict[str, int]) -> StagePlan:
    assert config.cluster is not None
    dimension, rows = _semantic_dimension(config), counts.kept
    leaf, steps = config.cluster.levels[0], config.cluster.iterations
    sample = min(rows, leaf * config.cluster.points_per_centroid)
    train, assign = 2.0 * dimension * sample * leaf * steps, 2.0 * dimension * rows * leaf
    lines = [
        f"leaf: {sample:,} sampled x {leaf:,} centroids x 2 d x {steps} steps at most = {train:.2e} FLOP",
        f"assignment: {rows:,} x {leaf:,} x 2 d = {assign:.2e} FLOP",
    ]
    above = 0.0
    resample = config.cluster.resample_steps or [0] + [10] * (len(config.cluster.levels) - 1)
    for points, count, again in zip(config.cluster.levels, config.cluster.levels[1:], resample[1:], strict=False):
        cost = 2.0 * dimension * points * count * steps * (1 + again)
        above += cost
        lines.append(f"level of {count:,}: {points:,} centroids, {again} resamplings = {cost:.2e} FLOP at most")
    return StagePlan(
        "cluster",
        rows,
        rows,
        bytes_read=2.0 * dimension * (rows + sample * steps),
        bytes_written=2.0 * dimension * sample + rows * (8.0 + 4 * len(config.cluster.levels) + 4),
        flop=train + assign + above,
        memory_per_worker=4.0 * dimension * (leaf + BLOCK_ROWS),
        arithmetic=[*lines, f"memory: {leaf:,} centroids and a block of {BLOCK_ROWS:,} in float32"],
    )


def _retrieve(config: RunConfig, counts: Counts, sets: list[SeedSetPlan], _nominal: dict[str, int]) -> StagePlan:
    dimension = _semantic_dimension(config)
    near = sum(planned.seeds for planned in sets if planned.mode == "sample")
    by_cluster = sum(planned.seeds for planned in sets if planned.mode == "cluster")
    leaf = config.cluster.levels[0] if config.cluster else 0
    flop = 2.0 * dimension * (near * counts.kept + by_cluster * leaf)
    retrieved = sum(planned.retrieved for planned in sets)
    lines = [
        f"sample mode: {near:,} seeds x {counts.kept:,} images x 2 d, exact",
        f"cluster mode: {by_cluster:,} seeds x {leaf:,} centroids x 2 d",
    ]
    lines += [f"{p.name}: {p.seeds:,} seeds, {p.mode}: {p.retrieved:,} ({p.basis})" for p in sets]
    lines.append(f"memory: the driver holds {retrieved:,} draws of {DRAW_BYTES} B")
    return StagePlan(
        "retrieve",
        counts.kept,
        retrieved,
        bytes_read=2.0 * dimension * counts.kept,
        bytes_written=40.0 * retrieved,
        flop=flop,
        memory_per_worker=max(2.0 * dimension * BLOCK_ROWS * 2, DRAW_BYTES * retrieved),
        arithmetic=lines,
    )


def _balance(config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], _nominal: dict[str, int]) -> StagePlan:
    target = balance_target(config, counts)
    return StagePlan(
        "balance",
        counts.kept,
        target,
        bytes_read=20.0 * counts.kept,
        bytes_written=16.0 * target,
        memory_per_worker=8.0 * (config.cluster.levels[0] if config.cluster else 0) + 20.0 * BLOCK_ROWS,
        arithmetic=[f"{target:,} of {counts.kept:,} images"],
    )


def _mix(_config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], nominal: dict[str, int]) -> StagePlan:
    rows = _unique_at_most(counts, nominal)
    return StagePlan(
        "mix",
        nominal["nominal"],
        rows,
        bytes_read=40.0 * nominal["nominal"],
        bytes_written=40.0 * rows,
        memory_per_worker=40.0 * BLOCK_ROWS,
        arithmetic=["one row per image: at most the nominal count, and at most all pool images kept and seeds"],
    )


def _manifest(_config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], nominal: dict[str, int]) -> StagePlan:
    rows = _unique_at_most(counts, nominal)
    row = KNOWN["row_bytes"]
    return StagePlan(
        "manifest",
        rows,
        rows,
        bytes_read=counts.images * row + 40.0 * nominal["nominal"],
        bytes_written=rows * (row + 60.0),
        memory_per_worker=(1 << 17) * row * 4,
        arithmetic=[f"the images table read by ranges of ids, {rows:,} rows written"],
    )


def _report(_config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], nominal: dict[str, int]) -> StagePlan:
    rows = _unique_at_most(counts, nominal)
    return StagePlan(
        "report",
        rows,
        rows,
        bytes_read=counts.images * 60.0,
        bytes_written=50e6,
        memory_per_worker=1e9,
        arithmetic=["counts streamed from the tables; at most 50 MB of pages whatever the size of the run"],
    )


def _unique_at_most(counts: Counts, nominal: dict[str, int]) -> int:
    return min(nominal["nominal"], counts.kept + sum(counts.seeds.values()))


NSFW_FLOP, FACE_FLOP = 5e9, 5e9
"""Assumed: a thin ResNet-50 at 224 pixels, CenterFace at about 480."""
DRAW_BYTES = 32
PLANNERS = {
    "filter": _filter,
    "dedup": _dedup,
    "embed": _embed,
    "cluster": _cluster,
    "retrieve": _retrieve,
    "balance": _balance,
    "mix": _mix,
    "manifest": _manifest,
    "report": _report,
}
DECODING = {"filter", "embed"}


def _time(planned: StagePlan, hardware: Hardware) -> None:
    """Hours and what they are spent on. Network, disk and computing overlap; on CPUs decoding and computing do not."""
    seconds = {
        "disk": (planned.bytes_read + planned.bytes_written) / (hardware.nodes * hardware.disk_bytes_s),
        "computing": planned.flop / hardware.flop_s,
    }
    if planned.stage == "download":
        seconds["disk"] = planned.bytes_written / (hardware.nodes * hardware.disk_bytes_s)
        seconds["network"] = planned.bytes_read / (hardware.nodes * hardware.network_bytes_s)
        seconds["slow hosts"] = planned.rows_in / (hardware.cores * KNOWN["download_rate"])
    if planned.stage in DECODING:
        decoding = planned.rows_in / (hardware.cores * KNOWN["decode_rate"])
        if hardware.gpus:
            seconds["decoding"] = decoding
        else:
            seconds["computing"] += decoding
    if planned.stage == "dedup":
        seconds["one core (union-find)"] = 2 * planned.rows_in / KNOWN["union_rate"]
    planned.bound, longest = max(seconds.items(), key=lambda item: item[1])
    planned.hours = longest / 3600
    each = ", ".join(f"{what} {value / 3600:.2g} h" for what, value in seconds.items())
    planned.arithmetic.append(f"time: {each}; the longest counts")


def _warnings(config: RunConfig, hardware: Hardware, stages: list[StagePlan]) -> list[str]:
    notes = []
    allowed = config.resources.memory_bytes
    for planned in stages:
        if planned.memory_per_worker > allowed:
            notes.append(
                f"{planned.stage} needs about {planned.memory_per_worker / 2**30:,.1f} GiB per worker, "
                f"resources.memory_per_worker is {config.resources.memory_per_worker}"
            )
    return notes
