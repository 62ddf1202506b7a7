"""`curate cluster`, `retrieve`, `balance`, `mix`: from embeddings to the images of the dataset.

All but `mix` also work on plain Parquet from elsewhere, without a run.
"""

from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from cli import session
from cli.options import config_options
from curation.errors import UserError
from pipelines.context import Context, Outcome
from pipelines.stages import balance, cluster, mix, retrieve
from pipelines.stages.balance import BalanceConfig
from pipelines.stages.cluster import ClusterConfig
from pipelines.stages.mix import MixConfig
from pipelines.stages.retrieve import RetrieveConfig

CLUSTER_HELP = """k-means of the kept pool images: flat, or a hierarchy of several levels, leaf first.

Writes each image's path through the levels, and centroids/level-K.parquet with sizes and parents. Images that come
later are assigned to the centroids that are there.

Example: curate cluster runs/a --levels 1000,100,10

Example: curate cluster --embeddings DIR --out DIR --levels 1000
"""
RETRIEVE_HELP = """The pool images that seed sets draw: the nearest of each seed, or images of clusters that hold seeds.

Mode auto takes --mode sample for seed sets of more than 1,000,000 images, else --mode cluster. Settings per seed set
stand in the configuration (retrieve.seed_sets). What each set drew is in seed_sets.json beside the result.

Example: curate retrieve runs/a

Example: curate retrieve --embeddings POOL --seeds birds=SEEDS --mode sample --neighbours 4 --out DIR

Example: curate retrieve --embeddings POOL --seeds SEEDS --mode cluster --clusters DIR --out DIR
"""
BALANCE_HELP = """A sample of the pool spread evenly over the hierarchy of clusters, of exactly the size asked for.

Example: curate balance runs/a --target 1000000

Example: curate balance --clusters DIR --target 1000000 --out DIR
"""
MIX_HELP = """Seed sets as they are, retrieved and balanced images: one row per image, with its weight.

Example: curate mix runs/a --share seed=0.3 --share retrieve=0.5 --share balance=0.2
"""

EmbeddingsOption = Annotated[
    str | None,
    typer.Option(
        "--embeddings", help="folder of Parquet with image_id and embedding, in place of a run", show_default=False
    ),
]
OutOption = Annotated[
    str | None, typer.Option("--out", help="without a run: folder for the result", show_default=False)
]
ClustersOption = Annotated[
    str | None,
    typer.Option("--clusters", help="folder that `curate cluster` wrote, in place of a run", show_default=False),
]
SeedsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--seeds",
        help="[NAME=]DIR, embeddings of a seed set; NAME defaults to the folder's; repeat for several sets",
        show_default=False,
    ),
]
ShareOption = Annotated[
    list[str] | None,
    typer.Option(
        "--share",
        help="NAME=PART of the draws for seed, retrieve, balance or a full name (retrieve:birds); "
        "repeat until they add up to 1",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("cluster", help=CLUSTER_HELP)(config_options(ClusterConfig)(_cluster))
    app.command("retrieve", help=RETRIEVE_HELP)(config_options(RetrieveConfig)(_retrieve))
    app.command("balance", help=BALANCE_HELP)(config_options(BalanceConfig)(_balance))
    app.command("mix", help=MIX_HELP)(config_options(MixConfig)(_mix))


def _cluster(
    overrides: dict[str, Any],
    run: session.RunArgument = None,
    embeddings: EmbeddingsOption = None,
    out: OutOption = None,
    ray_address: session.RayOption = None,
    workers: session.WorkersOption = None,
    memory_per_worker: session.MemoryOption = None,
    seed: session.SeedOption = None,
    rebuild: session.RebuildOption = False,
    as_json: session.JsonOption = False,
) -> None:
    _run_or_plain(run, {"--embeddings": embeddings, "--out": out}, "curate cluster runs/a --levels 1000,100")
    config = session.resolve(ClusterConfig, run, "cluster", overrides)
    resources = {"ray_address": ray_address, "workers": workers, "memory_per_worker": memory_per_worker}
    _carry_out(
        lambda context: cluster.execute(context, config, embeddings=embeddings),
        as_json,
        stage="cluster",
        run=run,
        out=out,
        seed=seed,
        rebuild=rebuild,
        **resources,
    )


def _retrieve(
    overrides: dict[str, Any],
    run: session.RunArgument = None,
    embeddings: EmbeddingsOption = None,
    seeds: SeedsOption = None,
    clusters: ClustersOption = None,
    out: OutOption = None,
    ray_address: session.RayOption = None,
    workers: session.WorkersOption = None,
    memory_per_worker: session.MemoryOption = None,
    seed: session.SeedOption = None,
    rebuild: session.RebuildOption = False,
    as_json: session.JsonOption = False,
) -> None:
    plain = {"--embeddings": embeddings, "--seeds": seeds, "--out": out}
    _run_or_plain(run, plain, "curate retrieve runs/a --mode sample", {"--clusters": clusters})
    named = _named_seeds(seeds or [])
    config = session.resolve(RetrieveConfig, run, "retrieve", overrides)
    resources = {"ray_address": ray_address, "workers": workers, "memory_per_worker": memory_per_worker}
    _carry_out(
        lambda context: retrieve.execute(context, config, embeddings=embeddings, seeds=named, clusters=clusters),
        as_json,
        stage="retrieve",
        run=run,
        out=out,
        seed=seed,
        rebuild=rebuild,
        **resources,
    )


def _balance(
    overrides: dict[str, Any],
    run: session.RunArgument = None,
    clusters: ClustersOption = None,
    out: OutOption = None,
    ray_address: session.RayOption = None,
    workers: session.WorkersOption = None,
    memory_per_worker: session.MemoryOption = None,
    seed: session.SeedOption = None,
    rebuild: session.RebuildOption = False,
    as_json: session.JsonOption = False,
) -> None:
    _run_or_plain(run, {"--clusters": clusters, "--out": out}, "curate balance runs/a --target 100000")
    config = session.resolve(BalanceConfig, run, "balance", overrides)
    resources = {"ray_address": ray_address, "workers": workers, "memory_per_worker": memory_per_worker}
    _carry_out(
        lambda context: balance.execute(context, config, clusters=clusters),
        as_json,
        stage="balance",
        run=run,
        out=out,
        seed=seed,
        rebuild=rebuild,
        **resources,
    )


def _mix(
    overrides: dict[str, Any],
    run: session.RunArgument = None,
    share: ShareOption = None,
    ray_address: session.RayOption = None,
    workers: session.WorkersOption = None,
    memory_per_worker: session.MemoryOption = None,
    seed: session.SeedOption = None,
    rebuild: session.RebuildOption = False,
    as_json: session.JsonOption = False,
) -> None:
    if run is None:
        raise UserError("give the run directory: curate mix RUN")
    if share:
        overrides["shares"] = _shares(share)
    config = session.resolve(MixConfig, run, "mix", overrides)
    resources = {"ray_address": ray_address, "workers": workers, "memory_per_worker": memory_per_worker}
    _carry_out(
        lambda context: mix.execute(context, config),
        as_json,
        stage="mix",
        run=run,
        seed=seed,
        rebuild=rebuild,
        **resources,
    )


def _carry_out(execute: Callable[[Context], Outcome], as_json: bool, *, run: str | None, **surroundings: Any) -> None:
    outcome = session.carry_out(execute, as_json, run=run, **surroundings)
    if not as_json:
        for group in ("seed_sets", "sources"):
            for name, counts in outcome.summary.get(group, {}).items():
                typer.echo(f"  {name}: " + ", ".join(_figure(what, value) for what, value in counts.items()))


def _figure(what: str, value: Any) -> str:
    return f"{what.replace('_', ' ')} {value:,}" if isinstance(value, int) else f"{what} {value}"


def _run_or_plain(
    run: str | None, plain: Mapping[str, Any], example: str, optional: Mapping[str, Any] | None = None
) -> None:
    """A run, or every one of the plain folders. Raises UserError for both or for parts of the latter."""
    given = [name for name, value in {**plain, **(optional or {})}.items() if value]
    missing = [name for name, value in plain.items() if not value]
    wanted = " and ".join([", ".join(list(plain)[:-1]), list(plain)[-1]])
    if run is not None and given:
        raise UserError(f"give a run directory, or {wanted}, not both ({given[0]} beside {run})")
    if run is None and missing:
        lacking = f"; {', '.join(missing)} is missing" if given else ""
        raise UserError(f"give a run directory, or {wanted}{lacking}; example: {example}")


def _named_seeds(values: list[str]) -> dict[str, str]:
    """Folder of each seed set by name, from [NAME=]DIR."""
    named: dict[str, str] = {}
    for value in values:
        name, separator, folder = value.partition("=")
        if not separator or "/" in name:
            folder = value
            name = value.rstrip("/").rsplit("/", 1)[-1]
        if not name or not folder:
            raise UserError(f"--seeds {value}: expected DIR or NAME=DIR")
        if name in named:
            raise UserError(f"--seeds {value}: a second seed set named {name}; give another with NAME={folder}")
        named[name] = folder
    return named


def _shares(values: list[str]) -> dict[str, float]:
    shares: dict[str, float] = {}
    for value in values:
        name, _, part = value.rpartition("=")
        try:
            shares[name] = float(part)
        except ValueError:
            name = ""
        if not name:
            raise UserError(f"--share {value}: expected NAME=PART, e.g. retrieve=0.5")
    return shares
