"""`curate extract`, `curate download`, `curate import`: how images come into a run."""

import functools
from typing import Annotated, Any, Literal

import typer

from cli.options import config_options
from cli.session import JsonOption, MemoryOption, RayOption, WorkersOption, context, print_outcome, resolve
from cli.terminal import ProgressDisplay, handle_errors, print_result
from curation import storage
from curation.errors import UserError
from pipelines import configuration, extract, lock
from pipelines.context import Outcome, Resources
from pipelines.events import Events
from pipelines.stages import download, importing
from pipelines.stages.download import DownloadConfig

OutRunOption = Annotated[str | None, typer.Option("--out", metavar="RUN", help="the run directory", show_default=False)]
LicenceOption = Annotated[
    str | None, typer.Option("--licence", help="licence of the images, for the data card", show_default=False)
]
ExemptOption = Annotated[
    bool, typer.Option("--exempt", help="a seed set that enters the manifest without filter and decontamination")
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("extract")(_extract)
    app.command("download")(_download)
    app.command("import")(_import)


def _extract(
    crawl_files: Annotated[list[str], typer.Argument(metavar="WARC|WAT...", help="crawl files, gzip or not")],
    out: Annotated[str, typer.Option("--out", help="the URL list to write, Parquet", show_default=False)],
    ray_address: RayOption = None,
    workers: WorkersOption = None,
    as_json: JsonOption = False,
) -> None:
    """Take the URLs and alt texts of <img> tags out of Common Crawl files.

    Example: curate extract CC-MAIN-*.warc.gz --out urls.parquet
    """

    def work() -> None:
        resources = configuration.check(Resources, {"ray_address": ray_address, "workers": workers}, "")
        with ProgressDisplay(quiet=as_json) as display:
            found = extract.execute(crawl_files, out, resources, Events(None, display))
        lines = [f"extract: {found.rows:,} URLs in {found.out}"]
        lines += [f"  {name}: {count:,}" for name, count in found.counts.items()]
        print_result(
            {"stage": "extract", "rows": found.rows, "out": found.out, "summary": found.counts}, lines, as_json
        )

    handle_errors(work)


@config_options(DownloadConfig)
def _download(
    target: Annotated[
        str, typer.Argument(metavar="URLS|RUN", help="URL list (text, CSV or Parquet); with --retry the run directory")
    ],
    out: OutRunOption = None,
    role: Annotated[str, typer.Option("--as", help="pool, pool:NAME, seed:NAME or reference:NAME")] = "pool",
    licence: LicenceOption = None,
    exempt: ExemptOption = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="ask again for the rows of RUN that failed transiently")
    ] = False,
    ray_address: RayOption = None,
    workers: WorkersOption = None,
    memory_per_worker: MemoryOption = None,
    as_json: JsonOption = False,
    overrides: dict[str, Any] = {},  # noqa: B006 - filled by config_options
) -> None:
    """Fetch the images of a URL list into a run: tar shards, and a row for every URL.

    Example: curate download urls.parquet --out runs/first --as pool:web
    Example: curate download runs/first --retry
    """
    if retry and out is not None:
        raise UserError("--retry takes the run directory alone: curate download RUN --retry")
    if not retry and out is None:
        raise UserError("give the run directory with --out RUN")
    run = target if retry else out
    assert run is not None
    if retry and not storage.exists(storage.join(run, "sources.json")):
        raise UserError(f"{run}: not a run directory (no sources.json in it)")
    config = resolve(DownloadConfig, run, "download", overrides)
    with ProgressDisplay(quiet=as_json) as display, lock.hold(run):
        surroundings = context(
            run,
            stage="download",
            ray_address=ray_address,
            workers=workers,
            memory_per_worker=memory_per_worker,
            display=display,
        )
        if retry:
            outcome = download.retry(surroundings, config)
        else:
            outcome = download.execute(surroundings, config, urls=target, role=role, licence=licence, exempt=exempt)
    _print(outcome, as_json)


def _import(
    source: Annotated[str, typer.Argument(help="folder of images, folder of webdataset tars, or Parquet with `path`")],
    role: Annotated[str, typer.Option("--as", help="pool, pool:NAME, seed:NAME or reference:NAME", show_default=False)],
    out: OutRunOption = None,
    licence: LicenceOption = None,
    exempt: ExemptOption = False,
    label_column: Annotated[
        str | None, typer.Option("--label-column", help="column of the labels, for the audit", show_default=False)
    ] = None,
    ray_address: RayOption = None,
    workers: WorkersOption = None,
    memory_per_worker: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    """Register images that are already there; nothing is copied.

    Example: curate import /data/flowers --as seed:flowers --out runs/first
    """
    work = functools.partial(
        _import_now, source, role, out, licence, exempt, label_column, ray_address, workers, memory_per_worker, as_json
    )
    handle_errors(work)


def _import_now(
    source: str,
    role: str,
    out: str | None,
    licence: str | None,
    exempt: bool,
    label_column: str | None,
    ray_address: str | None,
    workers: int | None,
    memory_per_worker: str | None,
    as_json: bool,
) -> None:
    if out is None:
        raise UserError("give the run directory with --out RUN")
    kind = _kind(source)
    with ProgressDisplay(quiet=as_json) as display, lock.hold(out):
        surroundings = context(
            out,
            stage="import",
            ray_address=ray_address,
            workers=workers,
            memory_per_worker=memory_per_worker,
            display=display,
        )
        outcome = importing.execute(
            surroundings,
            kind=kind,
            origin=source,
            role=role,
            licence=licence,
            exempt=exempt,
            label_column=label_column,
        )
    _print(outcome, as_json)


def _kind(source: str) -> Literal["folder", "tars", "parquet"]:
    """What SOURCE is: a folder with tars is tars, one with Parquet and no images is Parquet, any other is images."""
    fs, inner = storage.filesystem(source)
    if fs.isdir(inner):
        if storage.list_files(source, ".tar") or storage.list_files(source, ".tar.gz"):
            return "tars"
        names = [str(n) for n in fs.ls(inner, detail=False)]
        plain = [n for n in names if not n.rsplit("/", 1)[-1].startswith((".", "_"))]
        return "parquet" if plain and all(n.endswith(".parquet") for n in plain) else "folder"
    name = source.lower()
    if not fs.exists(inner) and not any(sign in source for sign in "*?["):
        raise UserError(f"{source}: no such folder or file")
    if name.endswith((".tar", ".tar.gz", ".tgz")):
        return "tars"
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    raise UserError(f"{source}: give a folder of images, a folder of tars, a .tar or a .parquet with a column `path`")


def _print(outcome: Outcome, as_json: bool) -> None:
    """The usual closing lines, and below them why rows failed."""
    print_outcome(outcome, as_json)
    errors = outcome.summary.get("errors") or {}
    if errors and not as_json:
        print_result({}, [f"  {name}: {count:,}" for name, count in sorted(errors.items(), key=lambda e: -e[1])], False)
