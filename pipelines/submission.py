"""A run sent to a Ray cluster as a job: this code and the configuration travel with it, data never does.

The job is `curate run run.yaml --ray-address auto` in a folder that Ray unpacks on the cluster (its runtime
environment). It lives on the cluster: whoever looks at it may go, come back, or stop it.
"""

import asyncio
import importlib.util
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from curation import storage
from curation.errors import UserError
from pipelines import cluster, configuration, preflight
from pipelines.configuration import RunConfig

PACKAGES = ("cli", "curation", "embeddings", "pipelines", "training")
NOT_SHIPPED = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
ENTRY = ("python", "-m", "cli.main")
CONFIGURATION = "run.yaml"
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
LOOK_S = 1.0
SETTLE_S, CODE_S = 30.0, 5.0
LOST_CONTACT_S = 60.0
"""How long a connection to the job server is tried again before it is given up; the job does not notice."""
TALKATIVE = (
    "ray.dashboard.modules.dashboard_sdk",
    "ray.dashboard.modules.job.sdk",
    "ray._private.runtime_env.packaging",
)
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Job:
    """What the job server says of a job. exit_code: of `curate` on the cluster, once it has ended by itself."""

    job: str
    state: str
    run: str | None
    command: str
    started: float | None
    ended: float | None
    exit_code: int | None
    message: str

    @property
    def has_ended(self) -> bool:
        """Whether its state is the last one."""
        return self.state in ENDED

    @property
    def outcome(self) -> int:
        """The exit code that stands for it: its own; of one that was killed or stopped 128 + signal, or 1."""
        if self.state == "SUCCEEDED":
            return 0
        code = self.exit_code or 1
        return code if code > 0 else 128 - code

    def document(self) -> dict[str, Any]:
        """For `--json`."""
        return asdict(self)


def copy_packages(folder: str) -> list[str]:
    """Copy the code of `curate` into a folder, as it is imported here; the folders of its packages."""
    made = []
    for name in PACKAGES:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None, name
        origin = Path(found.origin).parent
        target = Path(folder) / name
        shutil.copytree(origin, target, ignore=NOT_SHIPPED)
        made.append(str(target))
    return made


def prepare(path: str) -> RunConfig:
    """The configuration to send: relative paths start here, and the cluster's Ray is the one it will use.

    Raises UserError for what is wrong with it.
    """
    stored = storage.join(path, CONFIGURATION)
    config = preflight.resolve(configuration.load(stored if storage.exists(stored) else path))
    resources = config.resources.model_copy(update={"ray_address": None})
    return config.model_copy(update={"resources": resources})


def local_paths(config: RunConfig) -> list[str]:
    """What the configuration names that lies on a file system: every machine of the cluster has to see it there."""
    named = [config.run, *(source.origin[1] for source in config.sources)]
    named += [path for name in preflight.URL_LISTS if (path := getattr(config.download, name)) is not None]
    models = [*config.embed.models, config.filter.copy_model or ""]
    named += [path for model in models if (path := model.partition(":")[2]).startswith("/")]
    return [path for path in dict.fromkeys(named) if storage.is_local(path)]


def environment(names: Sequence[str]) -> dict[str, str]:
    """Values of `NAME` (taken from here) and `NAME=VALUE`. Raises UserError; no message holds a value."""
    found = {}
    for given in names:
        name, separator, value = given.partition("=")
        if not NAME.fullmatch(name):
            raise UserError("--env: expected NAME or NAME=VALUE, NAME of letters, digits and _")
        if not separator:
            if name not in os.environ:
                raise UserError(f"--env {name}: no such environment variable here")
            value = os.environ[name]
        found[name] = value
    return found


def submit(
    address: str,
    command: Sequence[str],
    files: Mapping[str, str],
    *,
    run: str | None = None,
    env: Mapping[str, str] | None = None,
    requirements: str | None = None,
) -> str:
    """Start `curate COMMAND` on a cluster, in a folder with `files` (text by name) and this code; the job's id.

    env: environment variables of the job and of its tasks. requirements: a file of packages to install with pip on
    every machine first. Raises UserError.
    """
    client = connect(address)
    runtime: dict[str, Any] = {}
    if requirements is not None:
        runtime["pip"] = _packages(requirements)
    with tempfile.TemporaryDirectory(prefix="curate-job-") as folder:
        copy_packages(folder)
        for name, text in files.items():
            (Path(folder) / name).write_text(text, encoding="utf-8")
        # Not as `env_vars`: Ray writes those into its logs, values and all.
        variables = Path(folder) / cluster.VARIABLES
        variables.touch(0o600)
        variables.write_text("".join(f"{name}={shlex.quote(value)}\n" for name, value in (env or {}).items()))
        return str(
            _asked(
                address,
                lambda: client.submit_job(
                    entrypoint=f"set -a; . ./{cluster.VARIABLES}; set +a; exec {shlex.join([*ENTRY, *command])}",
                    runtime_env=runtime | {"working_dir": folder, "worker_process_setup_hook": cluster.HOOK},
                    metadata={"curate": command[0]} | ({"run": run} if run else {}),
                ),
            )
        )


def submit_run(path: str, address: str, options: Sequence[str] = (), **more: Any) -> tuple[str, RunConfig]:
    """Send a configuration; options: of `curate run`. The job's id and the configuration as sent. Raises UserError."""
    config = prepare(path)
    command = ["run", CONFIGURATION, "--ray-address", "auto", *options]
    return submit(address, command, {CONFIGURATION: configuration.dump(config)}, run=config.run, **more), config


def status(address: str, job: str) -> Job:
    """What has become of a job. Raises UserError."""
    return _job(_asked(address, lambda: connect(address).get_job_info(job), job))


def jobs(address: str) -> list[Job]:
    """Jobs that were submitted to the cluster, the newest first. Raises UserError."""
    found = _asked(address, lambda: connect(address).list_jobs())
    return sorted((_job(one) for one in found if one.submission_id), key=lambda job: -(job.started or 0))


def stop(address: str, job: str) -> Job:
    """Ask a job to stop and wait until it has; finished parts are kept. Raises UserError."""
    client = connect(address)
    _asked(address, lambda: client.stop_job(job), job)
    deadline = time.monotonic() + SETTLE_S
    while not (found := _job(_asked(address, lambda: client.get_job_info(job), job))).has_ended:
        if time.monotonic() > deadline:
            break
        time.sleep(LOOK_S)
    return found


def follow(address: str, job: str, write: Callable[[str], None]) -> Job:
    """Hand on what the job prints, from its first line, until it ends. A connection that breaks is made again.

    Raises UserError when the server cannot be reached for LOST_CONTACT_S; the job is not touched.
    """
    client = connect(address)
    _asked(address, lambda: client.get_job_info(job), job)
    told = 0
    lost_at: float | None = None
    while True:
        passed = told

        async def pass_on(skip: int = passed) -> None:
            nonlocal told, lost_at
            at = 0
            async for text in client.tail_job_logs(job):
                lost_at = None
                fresh = text[max(0, skip - at) :]
                at += len(text)
                if fresh:
                    write(fresh)
                    told += len(fresh)

        try:
            asyncio.run(pass_on())
            found = _job(client.get_job_info(job))
            lost_at = None
        except Exception as error:  # of three libraries; what counts is for how long
            lost_at = lost_at or time.monotonic()
            if time.monotonic() - lost_at > LOST_CONTACT_S:
                raise UserError(
                    f"{address}: no contact for {LOST_CONTACT_S:.0f} s ({type(error).__name__}); the job may go on: "
                    f"curate submit --logs {job} --address {address}",
                    exit_code=1,
                ) from error
            time.sleep(LOOK_S)
            continue
        if found.has_ended:
            return _settled(client, found)
        time.sleep(LOOK_S)


def connect(address: str) -> Any:
    """A client of the cluster's job server. Raises UserError."""
    from ray.job_submission import JobSubmissionClient

    for talkative in TALKATIVE:
        logging.getLogger(talkative).setLevel(logging.WARNING)
    # Ray prefers its environment variables to the address it is given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    return _asked(address, lambda: JobSubmissionClient(address))


def _asked[T](address: str, question: Callable[[], T], job: str | None = None) -> T:
    import requests
    from ray.exceptions import AuthenticationError, RayError

    try:
        return question()
    except AuthenticationError as error:
        raise UserError(
            f"{address}: the cluster wants its token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or "
            "RAY_AUTH_TOKEN_PATH, as on its machines",
            exit_code=1,
        ) from error
    except (ConnectionError, OSError, RuntimeError, ValueError, RayError, requests.RequestException) as error:
        reason = str(error).strip().splitlines()[0][:300]
        if job is not None and "404" in reason:
            raise UserError(f"{job}: no such job at {address}; curate submit --list --address {address}") from error
        raise UserError(f"{address}: the job server did not answer as it should ({reason})", exit_code=1) from error


def _settled(client: Any, found: Job) -> Job:
    """The exit code is written a moment after the state."""
    deadline = time.monotonic() + CODE_S
    while found.state == "FAILED" and found.exit_code is None and time.monotonic() < deadline:
        time.sleep(LOOK_S / 5)
        found = _job(client.get_job_info(found.job))
    return found


def _packages(path: str) -> list[str]:
    try:
        lines = storage.read_bytes(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--requirements {path}: cannot be read as text ({error})") from error
    named = [line.split(" #")[0].strip() for line in lines]
    return [line for line in named if line and not line.startswith("#")]


def _job(found: Any) -> Job:
    about = found.metadata or {}
    return Job(
        found.submission_id or found.job_id or "?",
        str(found.status),
        about.get("run"),
        found.entrypoint,
        _seconds(found.start_time),
        _seconds(found.end_time),
        found.driver_exit_code,
        (found.message or "").strip(),
    )


def _seconds(milliseconds: int | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1000
