"""What retrieval works on: the pool, the seed sets with their settings, and the clusters."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from pydantic import Field

from curation import hierarchy, parquet, vectors
from curation.errors import UserError
from curation.hierarchy import Hierarchy
from curation.retrieval import Draws
from curation.vectors import VectorSet
from pipelines import embedded
from pipelines.context import Context, StageConfig
from pipelines.embedded import EmbeddingPart

SAMPLE_ABOVE = 1_000_000
"""Mode `auto`: seed sets of more images go by sample, others by cluster (DINOv2, appendix A.4)."""

Mode = Literal["auto", "sample", "cluster", "none"]


class SeedSetConfig(StageConfig):
    """What one seed set does otherwise; what is not given is as for all sets."""

    mode: Mode | None = Field(None, description="auto, sample, cluster or none (draw nothing)")
    neighbours: int | None = Field(None, ge=1, description="sample mode: pool images per seed image")
    per_cluster: int | None = Field(None, ge=1, description="cluster mode: images from each chosen cluster")
    min_seeds: int | None = Field(None, ge=1, description="cluster mode: seeds that choose a cluster")
    cap: int | None = Field(None, ge=1, description="cluster mode: images in all")


class RetrieveConfig(StageConfig):
    """Options of `curate retrieve`."""

    model: str | None = Field(None, description="embedding to search; default: the first of embed.models")
    mode: Mode = Field("auto", description="auto: sample for seed sets over 1,000,000 images, else cluster")
    neighbours: int = Field(4, ge=1, description="sample mode: pool images per seed image")
    per_cluster: int = Field(10_000, ge=1, description="cluster mode: images from each chosen cluster")
    min_seeds: int = Field(4, ge=1, description="cluster mode: a cluster with so many seeds is chosen")
    cap: int = Field(
        1_000_000, ge=1, description="cluster mode: images per seed set at most, round-robin over clusters"
    )
    collisions: Literal["keep_all", "unique", "next_best"] = Field(
        "keep_all",
        description="sample mode, an image near several seeds: a row for each (the paper), for the nearest only, "
        "or for the nearest while the others take their next one",
    )
    recall: float = Field(
        0.99,
        gt=0,
        le=1,
        description="sample mode: share of the true neighbours to find, measured and reported; 1 compares everything",
    )
    seed_sets: dict[str, SeedSetConfig] = Field(default_factory=dict, description="per seed set: what differs")


@dataclass
class SeedSet:
    """A seed set and its settings, with its mode decided."""

    number: int
    name: str
    parts: list[EmbeddingPart]
    mode: Literal["sample", "cluster", "none"]
    neighbours: int
    per_cluster: int
    min_seeds: int
    cap: int

    @property
    def paths(self) -> list[str]:
        return [part.path for part in self.parts if part.rows]

    @property
    def seeds(self) -> int:
        return sum(part.rows for part in self.parts)


@dataclass
class Retrieved:
    """What a seed set drew. clusters: (n,) int32 of each row in cluster mode."""

    draws: Draws
    clusters: np.ndarray | None
    counts: dict[str, Any]
    chosen: list[dict[str, int]] = field(default_factory=list)


@dataclass(frozen=True)
class Inputs:
    """The pool, the seed sets and the clusters that the stage reads."""

    stages: list[str]
    extra: dict[str, Any]
    pool: list[EmbeddingPart]
    opened: VectorSet
    sets: list[SeedSet]
    clusters: list[str]
    hierarchy: Hierarchy | None


def run_inputs(context: Context, config: RetrieveConfig) -> Inputs:
    stage = embedded.stage_of(context, config.model)
    generations = context.run.stage(stage).generations()
    pool = embedded.pool_parts(context, generations)
    opened = embedded.open_parts(pool)
    sets = _seed_sets(config, embedded.seed_parts(context, generations))
    _check_seeds(sets, opened, context.run.path(stage))
    folder, paths = None, []
    if any(s.mode == "cluster" for s in sets):
        clustered = context.run.stage("cluster").generations()
        if not clustered:
            raise UserError(
                f"{context.run.path('cluster')}: no clusters; run `curate cluster` first, or use mode sample"
            )
        if stage not in clustered[-1].consumed:
            raise UserError(
                f"{context.run.path('cluster')} was made from {', '.join(clustered[-1].consumed)}, not {stage}"
            )
        done = {number for generation in clustered for number in generation.consumed.get(stage, [])}
        if any(generation.number not in done for generation in generations):
            raise UserError(f"{context.run.path('cluster')} lacks the newest images; run `curate cluster` first")
        folder = clustered[-1].directory
        paths = [path for generation in clustered for path in generation.part_paths]
    built = hierarchy.read_hierarchy(folder)[0] if folder else None
    return Inputs([stage, "cluster"], {}, pool, opened, sets, paths, built)


def plain_inputs(
    context: Context, config: RetrieveConfig, embeddings: str, seeds: Mapping[str, str], clusters: str | None
) -> Inputs:
    opened, pool = embedded.folder_parts(embeddings)
    vectors.refuse_repeated_ids(opened.all_ids(), embeddings)
    extra: dict[str, Any] = {"embeddings": embedded.files_digest(part.path for part in pool)}
    parts: dict[str, list[EmbeddingPart]] = {}
    for name, folder in seeds.items():
        seed_vectors, parts[name] = embedded.folder_parts(folder)
        vectors.refuse_other_model(opened, seed_vectors, embeddings, folder)
        vectors.refuse_repeated_ids(seed_vectors.all_ids(), folder)
        extra[f"seeds {name}"] = embedded.files_digest(part.path for part in parts[name])
    sets = _seed_sets(config, parts)
    by_cluster = next((s for s in sets if s.mode == "cluster"), None)
    if by_cluster is None:
        return Inputs([], extra, pool, opened, sets, [], None)
    if clusters is None:
        raise UserError(
            f"seed set {by_cluster.name} ({by_cluster.seeds:,} seeds) goes by cluster: "
            "give --clusters DIR (of `curate cluster`), or --mode sample"
        )
    paths = embedded.cluster_paths(clusters)
    built, _, model = hierarchy.read_hierarchy(clusters)
    if built.dimension != opened.dimension or (model and opened.model and model != opened.model):
        raise UserError(
            f"{clusters} was made from embeddings of another model than {embeddings}; cluster this pool first"
        )
    pool_ids = embedded.ids_digest(context, (part.path for part in pool))
    if embedded.ids_digest(context, paths) != pool_ids:
        raise UserError(f"{clusters} holds clusters of another pool than {embeddings}; cluster this pool first")
    extra["clusters"] = embedded.files_digest([*paths, *hierarchy.level_paths(clusters)])
    return Inputs([], extra, pool, opened, sets, paths, built)


def _seed_sets(config: RetrieveConfig, parts: Mapping[str, list[EmbeddingPart]]) -> list[SeedSet]:
    for name in config.seed_sets:
        if name not in parts:
            close = difflib.get_close_matches(name, parts, 1)
            hint = f"did you mean `{close[0]}`?" if close else f"known: {', '.join(parts) or 'none'}"
            raise UserError(f"retrieve.seed_sets.{name}: no such seed set; {hint}")
    return [_settled(config, number, name, parts[name]) for number, name in enumerate(parts)]


def _settled(config: RetrieveConfig, number: int, name: str, parts: list[EmbeddingPart]) -> SeedSet:
    own = config.seed_sets.get(name, SeedSetConfig())  # type: ignore[call-arg]
    mode = own.mode or config.mode
    if mode == "auto":
        mode = "sample" if sum(part.rows for part in parts) > SAMPLE_ABOVE else "cluster"
    return SeedSet(
        number,
        name,
        parts,
        mode,
        own.neighbours or config.neighbours,
        own.per_cluster or config.per_cluster,
        own.min_seeds or config.min_seeds,
        own.cap or config.cap,
    )


def _check_seeds(sets: Sequence[SeedSet], opened: VectorSet, where: str) -> None:
    for seed_set in sets:
        if seed_set.paths:
            vectors.refuse_other_model(opened, vectors.open_files(seed_set.paths), where, f"seed set {seed_set.name}")


@dataclass(frozen=True)
class Piece:
    """Rows of one Parquet file. row_groups: None is the whole file."""

    path: str
    row_groups: tuple[int, ...] | None
    rows: int

    def read(self, dimension: int, first: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(ids, vectors) of all rows, or of so many."""
        return vectors.read_vectors(self.path, dimension, self.row_groups, first)


def stretches(parts: Sequence[EmbeddingPart], most: int) -> list[tuple[Piece, ...]]:
    """The rows of these parts in order, cut into stretches of at most `most` rows as far as row groups allow."""
    found: list[tuple[Piece, ...]] = []
    held: list[Piece] = []
    rows = 0
    for piece in (piece for part in parts if part.rows for piece in _pieces(part, most)):
        if held and rows + piece.rows > most:
            found.append(tuple(held))
            held, rows = [], 0
        held.append(piece)
        rows += piece.rows
    return [*found, tuple(held)] if held else found


def _pieces(part: EmbeddingPart, most: int) -> list[Piece]:
    if part.rows <= most:
        return [Piece(part.path, None, part.rows)]
    footer = parquet.open_file(part.path).metadata
    groups = (Piece(part.path, (g,), footer.row_group(g).num_rows) for g in range(footer.num_row_groups))
    return [piece for piece in groups if piece.rows]


def read_stretch(pieces: Sequence[Piece], dimension: int) -> tuple[np.ndarray, np.ndarray]:
    """(ids (n,) uint64, vectors (n, d)) of a stretch."""
    read = [piece.read(dimension) for piece in pieces]
    if len(read) == 1:
        return read[0]
    return np.concatenate([ids for ids, _ in read]), np.concatenate([rows for _, rows in read])
