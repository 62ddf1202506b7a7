"""`curate serve`: a run in the browser, over all its rows."""

import os
import secrets
from typing import Annotated

import typer

from cli import session
from cli.terminal import console, handle_errors, print_result
from curation import storage
from curation.errors import UserError


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("serve")(serve)


def serve(
    run: Annotated[str, typer.Argument(help="the run directory")],
    index: Annotated[
        bool, typer.Option("--index", help="make the index of look-ups, words and vectors, then end")
    ] = False,
    host: Annotated[
        str, typer.Option("--host", help="address to bind; any but loopback asks for a token")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="port to bind")] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            "--token", envvar="CURATE_TOKEN", help="what everyone must give; made up if needed", show_default=False
        ),
    ] = None,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="a name under which the server is asked", show_default=False),
    ] = None,
    compare: Annotated[
        str | None, typer.Option("--compare", metavar="RUN", help="another run to show beside it", show_default=False)
    ] = None,
    index_folder: Annotated[
        str | None, typer.Option("--index-folder", help="where the index lies; default: RUN/.index", show_default=False)
    ] = None,
    author: Annotated[
        str | None, typer.Option("--author", help="who decides, unless a decision says", show_default=False)
    ] = None,
    as_json: session.JsonOption = False,
) -> None:
    """Show a run in the browser: every image, component, cluster and retrieval; search, decide, compare.

    Example: curate serve runs/first
    """

    def call() -> None:
        _refuse_what_is_no_run(run)
        if compare is not None:
            _refuse_what_is_no_run(compare)
        if index:
            _index(run, index_folder, as_json)
        else:
            _serve(run, host, port, token, tuple(allow_host or ()), compare, index_folder, author)

    handle_errors(call)


def _refuse_what_is_no_run(run: str) -> None:
    from pipelines import status

    if not storage.exists(run):
        raise UserError(f"{run}: no such run directory")
    status.status(run)


def _index(run: str, folder: str | None, as_json: bool) -> None:
    _require_packages()
    from pipelines.run_directory import RunDirectory
    from pipelines.server import building

    opened = RunDirectory(run)
    root = building.index_root(opened, folder)
    made = building.find(opened, root)
    fresh = made is None
    if made is None:
        made = building.build(opened, root, lambda text: console.print(text, soft_wrap=True))
    document = building.described(made)
    size = sum(document["bytes"].values())
    lines = [
        f"{made}: {document['rows']:,} images, {size / 1e6:,.1f} MB"
        + (f", made in {document['seconds']:,.1f} s" if fresh else ": fits the run as it is, nothing to do")
    ]
    lines += [
        f"  {name}: {space['vectors']:,} vectors, {space['probes']:,} of {space['cells']:,} cells read, "
        f"recall {space['recall']:.3f}"
        for name, space in document["spaces"].items()
    ]
    kept = {name: document[name] for name in ("digest", "rows", "seconds", "bytes", "stages", "spaces")}
    print_result({"folder": made, "fresh": fresh, **kept}, lines, as_json)


def _serve(
    run: str,
    host: str,
    port: int,
    token: str | None,
    names: tuple[str, ...],
    compare: str | None,
    folder: str | None,
    author: str | None,
) -> None:
    _require_packages()
    from pipelines.server import application, guard
    from pipelines.server.served import Settings

    outside = not guard.is_loopback(host)
    if token is not None and len(token) < 16:
        raise UserError("--token: at least 16 characters, or leave it out and one is made up")
    if outside and token is None:
        token = secrets.token_urlsafe(24)
        console.print(f"token: {token}", soft_wrap=True)
    if outside:
        console.print(
            "[yellow]warning:[/] what goes over the network is not encrypted: put a proxy with TLS in front",
            soft_wrap=True,
        )
    if not outside or host not in ("0.0.0.0", "::"):
        names = (*names, host) if names or not outside else names
    settings = Settings(token, names, author or os.environ.get("USER") or "auditor", folder, compare)
    served = application.application(run, settings)
    shown = f"[{host}]" if ":" in host else host
    console.print(f"http://{shown}:{port}/ shows {run}; Ctrl-C ends it", soft_wrap=True)
    try:
        application.run(served, host, port)
    finally:
        served.app.state.served.close()


def _require_packages() -> None:
    try:
        import duckdb  # noqa: F401
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise UserError(f"curate serve needs {error.name}: `pip install 'lvd-curate[serve]'`", exit_code=1) from error
