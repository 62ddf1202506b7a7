"""How many rows a run will have at each of its points: of its sources, after each stage, and what seed sets bring.

Counts come from `images:` where it is given, else from files' metadata; what stages keep are assumptions of
`pipelines/hardware.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from curation import storage
from curation.errors import UserError
from pipelines.configuration import RunConfig, SourceConfig
from pipelines.hardware import KNOWN
from pipelines.stages.retrieve import SAMPLE_ABOVE, SeedSetConfig

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


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


@dataclass(frozen=True)
class SeedSetPlan:
    """What a seed set is expected to bring. basis: how `retrieved` was arrived at."""

    name: str
    seeds: int
    as_is: int
    mode: str
    retrieved: int
    basis: str


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
