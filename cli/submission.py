"""`curate submit`: a run as a job of a Ray cluster, and a look at the jobs that are there."""

import os
import sys
import time
from typing import Annotated, Any

import typer

from cli.session import JsonOption
from cli.start import FromOption, RebuildOption, UntilOption
from cli.terminal import console, handle_errors, print_result
from curation.errors import UserError

HELP = """Send a run to a Ray cluster as a job, and show what it prints until it ends.

The configuration and this code travel with the job; images and tables stay where they are, so every path in the
configuration must be seen by the cluster: s3://... or a shared file system. Ctrl-C leaves the job running. The exit
code is that of the job: 0, 1 (it failed), 2 (asked wrongly). A cluster that wants a token gets it from RAY_AUTH_TOKEN
or RAY_AUTH_TOKEN_PATH, with RAY_AUTH_MODE=token.

Example: curate submit run.yaml --address http://head:8265

Example: curate submit --status raysubmit_4LamXRuQpYdSMg7J --address http://head:8265
"""

ConfigArgument = Annotated[
    str | None, typer.Argument(help="configuration (YAML), or a run directory to go on with", show_default=False)
]
AddressOption = Annotated[
    str | None,
    typer.Option(
        "--address",
        help="of the cluster: http://head:8265 or ray://head:10001; default: $RAY_API_SERVER_ADDRESS, $RAY_ADDRESS",
        show_default=False,
    ),
]
StatusOption = Annotated[str | None, typer.Option("--status", metavar="JOB", help="say how a job is")]
LogsOption = Annotated[str | None, typer.Option("--logs", metavar="JOB", help="show a job's output until it ends")]
StopOption = Annotated[str | None, typer.Option("--stop", metavar="JOB", help="stop a job; finished parts are kept")]
ListOption = Annotated[bool, typer.Option("--list", help="list the jobs of the cluster")]
FollowOption = Annotated[bool, typer.Option("--follow/--no-follow", help="show the output, or only start the job")]
EnvOption = Annotated[
    list[str] | None,
    typer.Option("--env", metavar="NAME[=VALUE]", help="environment variable of the job; NAME: as it is here"),
]
RequirementsOption = Annotated[
    str | None,
    typer.Option("--requirements", metavar="FILE", help="packages that the machines lack: pip installs them first"),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file to `curate`."""
    app.command("submit", help=HELP)(submit)


def submit(
    config: ConfigArgument = None,
    address: AddressOption = None,
    first: FromOption = None,
    until: UntilOption = None,
    rebuild: RebuildOption = None,
    follow: FollowOption = True,
    env: EnvOption = None,
    requirements: RequirementsOption = None,
    status: StatusOption = None,
    logs: LogsOption = None,
    stop: StopOption = None,
    listed: ListOption = False,
    as_json: JsonOption = False,
) -> None:
    """See HELP."""
    asked = {"CONFIG": config, "--status": status, "--logs": logs, "--stop": stop, "--list": listed}

    def call() -> None:
        from pipelines import submission

        given = [name for name, value in asked.items() if value]
        if len(given) != 1:
            raise UserError(
                f"give one of {', '.join(asked)}; example: curate submit run.yaml --address http://head:8265"
            )
        where = _address(address)
        if config is not None:
            options = {"--from": first, "--until": until, "--rebuild": rebuild}
            passed = [text for name, value in options.items() if value is not None for text in (name, value)]
            environment = submission.environment(env or [])
            job, sent = submission.submit_run(config, where, passed, env=environment, requirements=requirements)
            console.print(f"submitted {job} to {where}", soft_wrap=True)
            if paths := submission.local_paths(sent):
                console.print(f"every machine of the cluster must see {', '.join(paths)}", soft_wrap=True)
            if follow:
                _follow(where, job, as_json)
            else:
                print_result({"job": job, "address": where, "run": sent.run}, _hints(where, job), as_json)
        elif logs is not None:
            _follow(where, logs, as_json)
        elif status is not None:
            found = submission.status(where, status)
            print_result(found.document(), _lines(found), as_json)
        elif stop is not None:
            found = submission.stop(where, stop)
            print_result(found.document(), _lines(found), as_json)
        else:
            found_jobs = submission.jobs(where)
            rows = [line for job in found_jobs for line in _lines(job)[:1]]
            print_result({"jobs": [job.document() for job in found_jobs]}, rows or ["no jobs"], as_json)

    handle_errors(call)


def _address(given: str | None) -> str:
    address = given or os.environ.get("RAY_API_SERVER_ADDRESS") or os.environ.get("RAY_ADDRESS")
    if not address:
        raise UserError("give the cluster with --address http://head:8265 (or ray://head:10001)")
    return address


def _follow(address: str, job: str, as_json: bool) -> None:
    """Show the output of a job; ends with its exit code. With --json it goes to stderr."""
    from pipelines import submission

    stream = sys.stderr if as_json else sys.stdout

    def write(text: str) -> None:
        stream.write(text)
        stream.flush()

    try:
        found = submission.follow(address, job, write)
    except KeyboardInterrupt:
        console.print(f"{job} goes on without you", soft_wrap=True)
        for line in _hints(address, job):
            console.print(line, soft_wrap=True)
        raise typer.Exit(130) from None
    if as_json:
        print_result(found.document(), [], as_json)
    else:
        console.print(_lines(found)[0], soft_wrap=True)
    if found.outcome:
        raise typer.Exit(found.outcome)


def _hints(address: str, job: str) -> list[str]:
    return [
        f"  look again: curate submit --logs {job} --address {address}",
        f"  stop it:    curate submit --stop {job} --address {address}",
    ]


def _lines(found: Any) -> list[str]:
    """A job in a line, and below it what the server says of one that failed."""
    began = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(found.started)) if found.started else "not yet"
    words = [f"{found.job}: {found.state.lower()}"]
    if found.has_ended and found.state == "FAILED":
        words.append(f"exit code {found.outcome}")
    words.append(f"begun {began}")
    if found.started and found.ended:
        words.append(f"took {found.ended - found.started:,.1f} s")
    if found.run:
        words.append(found.run)
    lines = [", ".join(words)]
    if found.state == "FAILED" and found.message:
        lines += [f"  {line}" for line in found.message.splitlines()[-5:]]
    return lines
