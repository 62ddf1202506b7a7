"""`curate add`: new images for a run that is finished."""

import functools
from typing import Annotated, Any, Literal

import typer

from cli import session
from cli.terminal import ProgressDisplay, handle_errors, print_result
from curation import storage
from curation.errors import UserError
from pipelines import configuration
from pipelines.configuration import SourceConfig
from pipelines.context import Resources
from pipelines.events import Events

HELP = """Add images to a finished run: only they are fetched, filtered, joined, embedded and assigned to clusters.

Everything before stays as it is: ids, rows, representatives and centroids; the manifest is written anew as the next
generation. Printed: what became of the new images, older components that they bridge, and how far the clusters drift.
The same command again goes on where it was stopped.

Example: curate add runs/a more-urls.parquet

Example: curate add runs/a --folder /data/new --as pool:new
"""

RunArgument = Annotated[str, typer.Argument(help="the run directory", show_default=False)]
UrlsArgument = Annotated[
    list[str] | None, typer.Argument(help="URL lists to download: text, CSV or Parquet", show_default=False)
]
FolderOption = Annotated[list[str] | None, typer.Option("--folder", help="folder of images", show_default=False)]
TarsOption = Annotated[list[str] | None, typer.Option("--tars", help="folder of webdataset tars", show_default=False)]
ParquetOption = Annotated[
    list[str] | None, typer.Option("--parquet", help="Parquet with a column `path`", show_default=False)
]
RoleOption = Annotated[
    str, typer.Option("--as", help="pool, pool:NAME, seed:NAME or reference:NAME; a NAME is for one source alone")
]
LicenceOption = Annotated[
    str | None, typer.Option("--licence", help="licence of the images, for the data card", show_default=False)
]
ExemptOption = Annotated[
    bool, typer.Option("--exempt", help="a seed set that enters the manifest without filter and decontamination")
]
ReElectOption = Annotated[
    bool,
    typer.Option(
        "--re-elect",
        help="choose the representatives of all components anew: from dedup on, every stage but the search is made "
        "again; default: those chosen before stay",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("add", help=HELP)(add)


def add(
    run: RunArgument,
    urls: UrlsArgument = None,
    folder: FolderOption = None,
    tars: TarsOption = None,
    parquet: ParquetOption = None,
    role: RoleOption = "pool",
    licence: LicenceOption = None,
    exempt: ExemptOption = False,
    re_elect: ReElectOption = False,
    ray_address: session.RayOption = None,
    workers: session.WorkersOption = None,
    memory_per_worker: session.MemoryOption = None,
    as_json: session.JsonOption = False,
) -> None:
    """See HELP."""
    given = {"urls": urls or [], "folder": folder or [], "tars": tars or [], "parquet": parquet or []}
    about = {"as": role, "licence": licence, "exempt": exempt}
    resources = {"ray_address": ray_address, "workers": workers, "memory_per_worker": memory_per_worker}
    handle_errors(functools.partial(_add, run, given, about, resources, re_elect, as_json))


def _add(
    run: str,
    given: dict[Literal["urls", "folder", "tars", "parquet"], list[str]],
    about: dict[str, Any],
    resources: dict[str, Any],
    re_elect: bool,
    as_json: bool,
) -> None:
    from pipelines import add as adding

    sources = [
        configuration.check(SourceConfig, about | {kind: origin}, "the options")
        for kind, origins in given.items()
        for origin in origins
    ]
    if not sources:
        raise UserError("give URL lists, --folder, --tars or --parquet; example: curate add runs/a more-urls.parquet")
    if len(sources) > 1 and ":" in about["as"]:
        raise UserError(f"--as {about['as']}: a name is for one source; add {len(sources)} of them one by one")
    wanted = {name: value for name, value in resources.items() if value is not None}
    configuration.check(Resources, wanted, "the options")
    with ProgressDisplay(quiet=as_json) as display:
        events = Events(storage.join(run, "events.jsonl"), display) if storage.exists(run) else None
        found = adding.add(run, sources, resources=wanted, re_elect=re_elect, events=events)
    print_result(found.document(), _lines(found), as_json)


def _lines(found: Any) -> list[str]:
    lines = [f"{found.run}: added {', '.join(found.sources)}"]
    lines += [f"  {name.replace('_', ' ')}: {count:,}" for name, count in found.images.items()]
    if found.re_elected:
        lines.append("  representatives were chosen anew: from dedup on, the counts are of the whole pool")
    if found.manifest:
        was, now, gained, lost = (f"{found.manifest[key]:,}" for key in ("before", "now", "gained", "lost"))
        lines.append(f"  images of the dataset: {was} before, {now} now ({gained} new, {lost} gone)")
    if found.bridged:
        lines.append(f"  older components joined by new images: {len(found.bridged):,}; their representatives stay")
        for one in found.bridged[:5]:
            lines.append(f"    component {one['component_id']}: {', '.join(map(str, one['representatives'][:5]))}")
    for level in found.drift:
        lines.append(
            f"  clusters, level {level['level']} ({level['clusters']:,}): mean distance of older images "
            f"{level['mean_distance_older']:.4f}, of new ones {level['mean_distance_new']:.4f}; "
            f"{level['moved']:.1%} of the new ones would have to move to be spread alike"
        )
    return lines
