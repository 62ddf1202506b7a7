"""`curate forget`: opt-out and takedown."""

import functools
from dataclasses import asdict
from typing import Annotated, Any

import typer

from cli.session import JsonOption, MemoryOption, RayOption, WorkersOption, stored_block
from cli.terminal import ProgressDisplay, handle_errors, print_result
from curation import storage
from curation.errors import UserError
from pipelines import configuration
from pipelines.context import Resources
from pipelines.events import Events

HELP = """Take images out of a run for good: their bytes, their rows in every table, and what was made of them.

They are hidden from every reader at once; then the files are rewritten. What tells copies of them stays on a block
list, so that neither their URL nor a copy under another one comes back. The certificate in RUN/forgotten says what was
removed, and what cannot be. This cannot be undone. Stopped at any point, the same command goes on; without a list it
finishes what was stopped.

Example: curate forget runs/a --urls opted-out.txt

Example: curate forget runs/a --sha256 takedown.csv --plan
"""

RunArgument = Annotated[str, typer.Argument(help="the run directory", show_default=False)]
UrlsOption = Annotated[
    str | None, typer.Option("--urls", metavar="LIST", help="URLs: text, CSV or Parquet", show_default=False)
]
Sha256Option = Annotated[
    str | None,
    typer.Option(
        "--sha256",
        metavar="LIST",
        help="hashes of files, 64 hexadecimal digits, as sha256sum prints",
        show_default=False,
    ),
]
DomainsOption = Annotated[
    str | None,
    typer.Option("--domains", metavar="LIST", help="domains, with all below them", show_default=False),
]
CopiesOption = Annotated[
    bool | None,
    typer.Option(
        "--copies/--no-copies",
        help="every member of their components of near-duplicates as well [default: for --sha256]",
        show_default=False,
    ),
]
CaughtOption = Annotated[
    bool,
    typer.Option("--caught", help="images that the block list kept out of the dataset after their bytes had come in"),
]
PlanOption = Annotated[bool, typer.Option("--plan", help="say what would go, and change nothing")]
ReElectOption = Annotated[
    bool,
    typer.Option(
        "--re-elect",
        help="then choose representatives anew, so that others stand for components that lost theirs: all from dedup "
        "on is made again, but the search",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("forget", help=HELP)(forget)


def forget(
    run: RunArgument,
    urls: UrlsOption = None,
    sha256: Sha256Option = None,
    domains: DomainsOption = None,
    copies: CopiesOption = None,
    caught: CaughtOption = False,
    plan: PlanOption = False,
    re_elect: ReElectOption = False,
    ray_address: RayOption = None,
    workers: WorkersOption = None,
    memory_per_worker: MemoryOption = None,
    as_json: JsonOption = False,
) -> None:
    lists = {
        name: path for name, path in (("urls", urls), ("sha256", sha256), ("domains", domains)) if path is not None
    }
    asked = {"ray_address": ray_address, "workers": workers, "memory_per_worker": memory_per_worker}
    resources = {name: value for name, value in asked.items() if value is not None}
    handle_errors(functools.partial(_forget, run, lists, copies, caught, plan, re_elect, resources, as_json))


def _forget(
    run: str,
    lists: dict[Any, str],
    copies: bool | None,
    caught: bool,
    plan: bool,
    re_elect: bool,
    resources: dict[str, Any],
    as_json: bool,
) -> None:
    from pipelines import forget as forgetting

    if plan and not lists and not caught:
        raise UserError("--plan: give --urls, --sha256 or --domains LIST, or --caught, to say what would go")
    if not storage.exists(run):
        raise UserError(f"{run}: no such run directory")
    checked = configuration.check(Resources, stored_block(run, "resources") | resources, "")
    with ProgressDisplay(quiet=as_json) as display:
        events = Events(None if plan else storage.join(run, "events.jsonl"), display)
        found = forgetting.forget(
            run, lists, copies=copies, caught=caught, plan=plan, re_elect=re_elect, resources=checked, events=events
        )
    print_result(asdict(found), _lines(found, bool(lists) or caught), as_json)


def _lines(found: Any, asked: bool) -> list[str]:
    lines = [f"{found.run}: finished {path}, which had been stopped" for path in found.finished]
    if not asked:
        return lines or [f"{found.run}: nothing is left to finish; give --urls, --sha256 or --domains LIST"]
    would = "would be forgotten" if found.planned else "forgotten"
    copies = f", {found.images - found.named:,} of them copies" if found.images > found.named else ""
    lines.append(f"{found.run}: {found.images:,} image{'s' if found.images != 1 else ''} {would}{copies}")
    for kind, count in found.known.items():
        if count:
            lines.append(f"  --{kind}: {count:,} forgotten before")
    for kind, count in found.unknown.items():
        if count:
            blocked = "" if found.planned else "; blocked all the same"
            lines.append(f"  --{kind}: {count:,} not in this run{blocked}")
    if found.copies_left:
        lines.append(
            f"  other images in their components of near-duplicates: {found.copies_left:,} stay; --copies takes them"
        )
    for stage, counts in found.removed.items():
        lines.append(f"  {stage}: " + ", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())))
    if found.images:
        lines.append("  cannot be removed:")
        lines += [f"    {what}" for what in found.cannot_be_removed]
    if found.places:
        lines.append("  files of yours that hold them, for you to delete:")
        lines += [f"    {place}" for place in found.places]
    if found.certificates:
        lines += [f"  certificate: {path}" for path in found.certificates]
        lines.append(f"  `curate run {found.run}` writes the manifest and the report anew, without them")
    return lines
