"""What each stage will read, write, compute and hold, from the counts of a run; every line of the arithmetic is kept.

The stages that work on vectors and tables are counted in CPU seconds by `pipelines/costs.py`, those that run a model
in FLOP.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from curation.duplicates.tasks import EXACT_MULTIPLY_ADDS
from curation.duplicates.tiles import TILE_ROWS
from curation.sketch import WORDS
from pipelines import costs
from pipelines.configuration import RunConfig
from pipelines.costs import Term
from pipelines.hardware import KNOWN, model_cost
from pipelines.plan_counts import Counts, SeedSetPlan, balance_target
from pipelines.retrieve_sample import BLOCK_ROWS as SEED_BLOCK
from pipelines.stages.cluster import task_bytes

COPY_MODEL = "sscd"
PART_ROWS = 1000
BLOCK_ROWS = 65_536
NSFW_FLOP, FACE_FLOP = 5e9, 5e9
"""Assumed: a thin ResNet-50 at 224 pixels, CenterFace at about 480."""
DRAW_BYTES = 32
SKETCH_BYTES = 8 * WORDS + 8
DRIVER_BYTES = 37.3
"""Per pool image, that the driver of dedup must have: measured, benchmarks/results/dedup_driver.json."""


@dataclass
class StagePlan:
    """One stage. rows_out: rows that go on to the next stage. bound: what its hours are spent on."""

    stage: str
    rows_in: int
    rows_out: int
    bytes_read: float = 0
    bytes_written: float = 0
    flop: float = 0
    cpu_seconds: float = 0
    """Of all cores together, without the models; of it `serial_seconds` in the driver, on one core."""
    serial_seconds: float = 0
    memory_per_worker: float = 0
    hours: float = 0
    bound: str = ""
    arithmetic: list[str] = field(default_factory=list)

    def spend(self, terms: Sequence[Term]) -> None:
        """Add CPU seconds, and their lines to the arithmetic."""
        self.cpu_seconds += costs.seconds(terms)
        self.serial_seconds += costs.seconds([term for term in terms if term.serial])
        self.arithmetic += [f"  {term.line()}" for term in terms]


def ingest(config: RunConfig, counts: Counts) -> list[StagePlan]:
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
    memory = config.resources.of_stage("dedup").memory_bytes
    others = sum(counts.seeds.values()) - counts.exempt if counts.references else 0
    planned = StagePlan(
        "dedup",
        counts.filtered + counts.references + others,
        counts.kept,
        bytes_read=counts.filtered * 2.0 * dimension,
        bytes_written=counts.filtered * 40.0,
        memory_per_worker=memory / 4,
    )
    graphs = {"pool": counts.filtered}
    if counts.references:
        graphs["kept pool with seeds"] = counts.distinct + others
    for graph, rows in graphs.items():
        _join(planned, graph, rows, dimension, memory)
    if counts.references:
        rows = counts.distinct + others + counts.references
        products = 2.0 * dimension * counts.references * rows
        planned.arithmetic.append(f"references: {counts.references:,} x {rows:,} x 2 d = {products:.2e} FLOP, exact")
        planned.flop += products
    planned.spend(costs.components(counts.filtered))
    planned.arithmetic.append(
        f"the driver holds {DRIVER_BYTES} B x {counts.filtered:,} = {DRIVER_BYTES * counts.filtered:.2e} B"
    )
    return planned


def _join(planned: StagePlan, graph: str, rows: int, dimension: int, memory: int) -> None:
    if float(rows) * rows / 2 * dimension <= EXACT_MULTIPLY_ADDS:
        planned.arithmetic.append(f"{graph}: n = {rows:,}, d = {dimension}: all pairs are compared")
        planned.spend(costs.exact_pairs(rows, dimension))
        planned.memory_per_worker = max(planned.memory_per_worker, 8.0 * dimension * TILE_ROWS)
        return
    easy = costs.seconds(costs.join(rows, dimension, memory, "easy"))
    planned.arithmetic.append(
        f"{graph}: n = {rows:,}, d = {dimension}, recall 0.99; vectors as hard as the benchmark's"
    )
    planned.spend(costs.join(rows, dimension, memory))
    planned.arithmetic.append(f"  the same of vectors as easy as the benchmark's: {easy:,.3g} CPU s")
    # Raw vectors with sketches, sketches by cell, what visitors read, the vectors of the pairs that are verified.
    written = rows * (2.0 * dimension + 2 * SKETCH_BYTES)
    read = written + rows * (SKETCH_BYTES * KNOWN["visits_hard"] + 4.0 * dimension)
    planned.arithmetic.append(f"  scratch: {written:.2e} B written, {read:.2e} B read")
    planned.bytes_written += written
    planned.bytes_read += read


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
    block = config.cluster
    dimension, rows, leaf = _semantic_dimension(config), counts.kept, block.levels[0]
    sample = min(rows, leaf * block.points_per_centroid)
    planned = StagePlan(
        "cluster",
        rows,
        rows,
        bytes_read=2.0 * dimension * (rows + sample * block.iterations),
        bytes_written=2.0 * dimension * sample + rows * (8.0 + 4 * len(block.levels) + 4),
        memory_per_worker=float(task_bytes(leaf, dimension)),
    )
    planned.arithmetic.append(f"n = {rows:,}, d = {dimension}, leaf level of {leaf:,} centroids")
    planned.spend(
        costs.cluster(rows, dimension, block.levels, block.iterations, block.points_per_centroid, block.resample_steps)
    )
    planned.arithmetic.append(f"memory: {leaf:,} centroids, their sums and a block in every worker")
    return planned


def _retrieve(config: RunConfig, counts: Counts, sets: list[SeedSetPlan], _nominal: dict[str, int]) -> StagePlan:
    dimension = _semantic_dimension(config)
    near = sum(planned.seeds for planned in sets if planned.mode == "sample")
    by_cluster = sum(planned.seeds for planned in sets if planned.mode == "cluster")
    leaf = config.cluster.levels[0] if config.cluster else 0
    retrieved = sum(planned.retrieved for planned in sets)
    passes = -(-near // SEED_BLOCK)
    planned = StagePlan(
        "retrieve",
        counts.kept,
        retrieved,
        bytes_read=2.0 * dimension * counts.kept * max(1, passes),
        bytes_written=40.0 * retrieved,
        memory_per_worker=max(2.0 * dimension * BLOCK_ROWS * 2, DRAW_BYTES * retrieved),
        arithmetic=[f"n = {counts.kept:,}, d = {dimension}; a pass over the pool per {SEED_BLOCK:,} seeds"],
    )
    planned.spend(costs.retrieve(counts.kept, dimension, near, by_cluster, leaf))
    planned.arithmetic += [f"{p.name}: {p.seeds:,} seeds, {p.mode}: {p.retrieved:,} ({p.basis})" for p in sets]
    planned.arithmetic.append(f"memory: the driver holds {retrieved:,} draws of {DRAW_BYTES} B")
    return planned


def _balance(config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], _nominal: dict[str, int]) -> StagePlan:
    target = balance_target(config, counts)
    planned = StagePlan(
        "balance",
        counts.kept,
        target,
        bytes_read=20.0 * counts.kept,
        bytes_written=16.0 * target,
        memory_per_worker=8.0 * (config.cluster.levels[0] if config.cluster else 0) + 20.0 * BLOCK_ROWS,
        arithmetic=[f"{target:,} of {counts.kept:,} images"],
    )
    planned.spend(costs.balance(counts.kept, target, PART_ROWS))
    return planned


def _mix(_config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], nominal: dict[str, int]) -> StagePlan:
    rows = _unique_at_most(counts, nominal)
    planned = StagePlan(
        "mix",
        nominal["nominal"],
        rows,
        bytes_read=40.0 * nominal["nominal"],
        bytes_written=40.0 * rows,
        memory_per_worker=40.0 * BLOCK_ROWS,
        arithmetic=["one row per image: at most the nominal count, and at most all pool images kept and seeds"],
    )
    planned.spend(costs.mix(nominal["nominal"]))
    return planned


def _manifest(_config: RunConfig, counts: Counts, _sets: list[SeedSetPlan], nominal: dict[str, int]) -> StagePlan:
    rows = _unique_at_most(counts, nominal)
    row = KNOWN["row_bytes"]
    planned = StagePlan(
        "manifest",
        rows,
        rows,
        bytes_read=counts.images * row + 40.0 * nominal["nominal"],
        bytes_written=rows * (row + 60.0),
        memory_per_worker=(1 << 17) * row * 4,
        arithmetic=[f"the images table read by ranges of ids, {rows:,} rows written"],
    )
    planned.spend(costs.manifest(rows))
    return planned


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
