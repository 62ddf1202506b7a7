"""Jobs of a cluster: what is sent, what is shown, what a broken connection and Ctrl-C do; a job server in small."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from curation.errors import UserError
from pipelines import cluster, submission
from pipelines.context import Context, Resources, StageResources
from pipelines.image_pass import Workers
from pipelines.run_directory import RunDirectory

URL = "http://head:8265"


class JobServer:
    """Answers as Ray's client does: a job whose output comes in pieces."""

    def __init__(self, pieces: list[str], state: str = "SUCCEEDED", exit_code: int | None = 0) -> None:
        self.pieces, self.end, self.exit_code = pieces, state, exit_code
        self.state = "RUNNING"
        self.asked: dict[str, Any] = {}
        self.shipped: dict[str, bytes] = {}
        self.modes: dict[str, int] = {}
        self.breaks_after: list[int] = []

    def submit_job(self, **asked: Any) -> str:
        self.asked = asked
        folder = Path(asked["runtime_env"]["working_dir"])
        files = [path for path in folder.rglob("*") if path.is_file()]
        self.shipped = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        self.modes = {path.relative_to(folder).as_posix(): path.stat().st_mode & 0o777 for path in files}
        return "raysubmit_1"

    def get_job_info(self, job: str) -> Any:
        if job != "raysubmit_1":
            raise RuntimeError(f"Request failed with status code 404: Job {job} does not exist.")
        ended = self.state != "RUNNING"
        return SimpleNamespace(
            submission_id=job,
            job_id=None,
            status=self.state,
            metadata={"run": "s3://b/run"},
            entrypoint="python",
            start_time=1_700_000_000_000,
            end_time=1_700_000_060_000 if ended else None,
            driver_exit_code=self.exit_code if ended else None,
            message="Job entrypoint command failed\nlast words" if self.state == "FAILED" else "",
        )

    def list_jobs(self) -> list[Any]:
        return [self.get_job_info("raysubmit_1")]

    def stop_job(self, job: str) -> bool:
        self.get_job_info(job)
        self.state = "STOPPED"
        return True

    async def tail_job_logs(self, job: str) -> AsyncIterator[str]:
        limit = self.breaks_after.pop(0) if self.breaks_after else None
        for number, piece in enumerate(self.pieces):
            if number == limit:
                raise RuntimeError("WebSocket connection closed unexpectedly")
            yield piece
        self.state = self.end


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Callable[[JobServer], JobServer]:
    monkeypatch.setattr(submission, "LOOK_S", 0.0)
    monkeypatch.setattr(submission, "CODE_S", 0.0)

    def start(server: JobServer) -> JobServer:
        monkeypatch.setattr(submission, "connect", lambda address: server)
        return server

    return start


def write(folder: Path) -> Path:
    (folder / "images").mkdir()
    path = folder / "mine.yaml"
    path.write_text(
        "run: s3://bucket/run\nsources: [{as: pool, folder: images}]\n"
        "resources: {ray_address: elsewhere, workers: 2, stages: {filter: {cpus: 2}}}\n"
    )
    return path


def curate(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["submit", *map(str, arguments), "--address", URL])


def test_what_is_sent_is_the_code_and_the_configuration_with_whole_paths(
    tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve(JobServer(["import: 3 rows\n", "done\n"]))
    monkeypatch.chdir(write(tmp_path).parent)
    monkeypatch.setenv("KEY_OF_BUCKET", "a 'secret' $HOME value")
    done = curate("mine.yaml", "--until", "dedup", "--env", "KEY_OF_BUCKET")
    assert done.exit_code == 0 and done.stdout.startswith("import: 3 rows\ndone\n"), done.output
    assert f"every machine of the cluster must see {tmp_path}/images" in done.output
    assert server.asked["entrypoint"].endswith("-m cli.main run run.yaml --ray-address auto --until dedup")
    sent = yaml.safe_load(server.shipped["run.yaml"])
    assert sent["sources"][0]["folder"] == f"{tmp_path}/images" and sent["resources"]["ray_address"] is None
    assert sent["resources"]["stages"]["filter"]["cpus"] == 2
    tops = {name.split("/")[0] for name in server.shipped}
    assert tops == {*submission.PACKAGES, "run.yaml", cluster.VARIABLES}
    assert {"cli/configs/run.yaml", "curation/audit/templates/style.css", "pipelines/cluster.py"} <= set(server.shipped)
    assert not [name for name in server.shipped if name.endswith(".pyc")]
    # The value reaches a shell and a worker as it was; nothing but that file, which its user alone reads, has it.
    holders = [name for name, data in server.shipped.items() if b"secret' $HOME" in data or b"'secret'" in data]
    assert server.modes[cluster.VARIABLES] == 0o600 and "secret" not in str(server.asked) + done.output
    assert [name for name in holders if not name.endswith(".py")] == [cluster.VARIABLES]
    for command in (
        ['. ./environment; printf %s "$KEY_OF_BUCKET"'],
        [
            f"{sys.executable} -c 'from pipelines import cluster; import os; cluster.set_up_worker(); "
            'print(os.environ["KEY_OF_BUCKET"], end="")\''
        ],
    ):
        (tmp_path / cluster.VARIABLES).write_bytes(server.shipped[cluster.VARIABLES])
        clean = {"PATH": os.environ["PATH"], "PYTHONPATH": str(Path(submission.__file__).parents[1])}
        told = subprocess.run(
            ["sh", "-c", *command], cwd=tmp_path, env=clean, capture_output=True, text=True, check=True
        )
        assert told.stdout == "a 'secret' $HOME value"


def test_output_is_shown_once_though_the_connection_breaks(serve: Any) -> None:
    server = serve(JobServer(["one\n", "two\n", "three\n"]))
    server.breaks_after = [2, 0, 1]
    said: list[str] = []
    found = submission.follow(URL, "raysubmit_1", said.append)
    assert "".join(said) == "one\ntwo\nthree\n" and found.state == "SUCCEEDED"


def test_a_server_that_stays_away_is_given_up_and_the_job_is_not(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(JobServer(["one\n"]))
    server.breaks_after = [0] * 1000
    monkeypatch.setattr(submission, "LOST_CONTACT_S", 0.01)
    with pytest.raises(UserError, match=r"no contact .* curate submit --logs raysubmit_1 --address http://head:8265"):
        submission.follow(URL, "raysubmit_1", lambda _: None)
    assert server.state == "RUNNING"


@pytest.mark.parametrize(
    ("state", "exit_code", "expected"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 1, 1),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
    ],
)
def test_the_exit_code_is_that_of_the_job(serve: Any, state: str, exit_code: int | None, expected: int) -> None:
    serve(JobServer(["words\n"], state, exit_code))
    done = curate("--logs", "raysubmit_1", "--json")
    assert done.exit_code == expected
    assert json.loads(done.stdout)["state"] == state and "words" in done.stderr


def test_ctrl_c_leaves_the_job_and_says_how_to_look_again_or_stop(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    server = serve(JobServer(["words\n"]))

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(submission, "follow", interrupted)
    done = curate("--logs", "raysubmit_1")
    assert done.exit_code == 130 and server.state == "RUNNING"
    assert "raysubmit_1 goes on without you" in done.output
    for verb in ("--logs", "--stop"):
        assert f"curate submit {verb} raysubmit_1 --address {URL}" in done.output
    assert curate("--status", "raysubmit_1").stdout.startswith("raysubmit_1: running, begun 2023-11-14 22:13:20 UTC")
    assert "raysubmit_1: stopped" in curate("--stop", "raysubmit_1").stdout
    assert server.state == "STOPPED"
    assert "took 60.0 s, s3://b/run" in curate("--list").stdout


def test_what_is_asked_wrongly_is_one_sentence(tmp_path: Path, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    serve(JobServer([]))
    config = write(tmp_path)
    for arguments, sentence in (
        ([], "give one of CONFIG, --status"),
        ([config, "--status", "x"], "give one of CONFIG, --status"),
        (["--status", "nobody"], f"nobody: no such job at {URL}"),
        ([config, "--env", "no-name=secret"], "--env: expected NAME or NAME=VALUE"),
        ([config, "--env", "NOWHERE_SET"], "no such environment variable"),
        ([config, "--requirements", tmp_path / "none"], "--requirements"),
        ([tmp_path / "none.yaml"], "no such configuration"),
    ):
        done = curate(*arguments)
        assert done.exit_code == 2 and sentence in done.output, done.output
        assert "secret" not in done.output and "Traceback" not in done.output
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    done = CliRunner().invoke(app, ["submit", "--list"])
    assert done.exit_code == 2 and "give the cluster with --address" in done.output


def test_requirements_are_installed_first_and_comments_are_not(tmp_path: Path, serve: Any) -> None:
    server = serve(JobServer([]))
    (tmp_path / "more.txt").write_text("# models\ntimm==1.0.12  # pinned\n\n--no-deps\n")
    assert curate(write(tmp_path), "--requirements", tmp_path / "more.txt", "--no-follow").exit_code == 0
    assert server.asked["runtime_env"]["pip"] == ["timm==1.0.12", "--no-deps"]


# ---- what a stage's tasks ask for -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("block", "sentence"),
    [
        ("{filtre: {cpus: 1}}", "`filtre` is no stage; did you mean `filter`?"),
        ("{filter: {cpus: 0}}", "resources.stages.filter.cpus: 0 is refused"),
        ("{filter: {gpus: 1.5}}", "1.5 GPUs: above 1 Ray lends whole ones only"),
        ("{filter: {memory: 3MiB}}", "less than 64MiB"),
        ("{filter: {custom: {CPU: 1}}}", "`CPU` is no custom resource"),
        ("{filter: {custom: {egress: -1}}}", "must be above 0"),
        ("{filter: {cores: 1}}", "resources.stages.filter.cores: unknown key"),
    ],
)
def test_resources_that_cannot_be_are_named(tmp_path: Path, block: str, sentence: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"run: r\nresources:\n  stages: {block}\n")
    from pipelines import configuration

    with pytest.raises(UserError) as caught:
        configuration.load(str(path))
    assert sentence in str(caught.value) and "run.yaml line 3" in str(caught.value)


STAGES = {"dedup": {"cpus": 2, "memory": "6GiB", "gpus": 0.5, "custom": {"egress": 1}}}


def surroundings(folder: Path, address: str | None) -> Context:
    resources = Resources.model_validate({"stages": STAGES, "ray_address": address})
    return Context(RunDirectory(str(folder)), resources=resources)


def test_tasks_of_a_stage_ask_for_what_its_entry_says_and_those_of_others_do_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(cluster, "start", lambda *_: None)
    monkeypatch.setattr(cluster, "require_seen", lambda *_: None)
    monkeypatch.setattr(cluster, "gpus", lambda: 4.0)
    monkeypatch.setattr(cluster, "spread", lambda *_, **asks: asked.append(asks) or [])
    context = surroundings(tmp_path, "ray://head:10001")
    context.for_stage("dedup").spread(print, [], heavy=True)
    context.for_stage("dedup").spread(print, [])
    context.for_stage("cluster").spread(print, [], memory_bytes=7)
    surroundings(tmp_path, None).for_stage("dedup").spread(print, [])
    shown = [tuple(a[name] for name in ("num_cpus", "num_gpus", "memory_bytes", "custom")) for a in asked]
    assert shown == [
        (2, 0.5, 6 << 30, {"egress": 1}),
        (2, 0, 6 << 30, {"egress": 1}),
        (1, 0, 7, {}),
        (2, 0, 6 << 30, {}),  # Ray in this process has no custom resources
    ]
    assert context.for_stage("dedup").resources.memory_bytes == 6 << 30
    assert context.for_stage("cluster").resources.memory_bytes == 4 << 30


def test_an_image_pass_asks_for_its_decoding_and_its_models(tmp_path: Path) -> None:
    context = surroundings(tmp_path, "auto")
    usual = Workers.of(context.for_stage("filter"), 0)
    assert (usual.decode.amounts, usual.actor.amounts) == ({"CPU": 0.5}, {"CPU": 0.5})
    more = {"memory": 6 << 30, "egress": 1}
    asked = Workers.of(context.for_stage("dedup"), 0)
    assert asked.decode.amounts == {"CPU": 2, **more} and asked.actor.amounts == {"CPU": 2, **more}
    on_gpu = Workers.of(context.for_stage("dedup"), 1)
    assert on_gpu.decode.amounts == {"CPU": 2, **more} and on_gpu.actor.amounts == {"GPU": 0.5, **more}
    assert on_gpu.both.amounts == {"CPU": 2, "GPU": 0.5, "memory": 12 << 30, "egress": 2}


def test_actors_of_an_image_pass_leave_room_for_decoding_and_ask_an_autoscaler_for_gpus(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    Machines(monkeypatch, {"CPU": 1}, {"CPU": 8, "GPU": 4, "memory": 100})
    monkeypatch.setattr(cluster, "cpus", lambda: 9)
    for grows in (False, True):
        on_cpus = Workers(cluster.Demand(0.5), cluster.Demand(0.5), grows)
        assert on_cpus.wanted(100) == 9 and on_cpus.wanted(3) == 3, "half of each core is left to decode"
        assert on_cpus.decoders() == 9 * (1 + grows)
        on_gpus = Workers(cluster.Demand(1), cluster.Demand(0, 1), grows)
        assert on_gpus.wanted(100) == 4 + grows and on_gpus.wanted(2) == 2
        much = Workers(cluster.Demand(1, 0, 30), cluster.Demand(0, 1, 30), grows)
        assert much.wanted(100) == 2 + grows, "of 100 bytes, 30 are left to decode"


def test_resources_are_no_part_of_any_fingerprint() -> None:
    from pipelines.catalog import STAGES as ALL
    from pipelines.configuration import RunConfig

    blocks = {stage.block for stage in ALL} - {None}
    assert "resources" not in blocks and "resources" in RunConfig.model_fields
    assert not {"cpus", "gpus", "custom"} & {name for b in blocks for name in dir(RunConfig.model_fields[str(b)])}
    assert StageResources.model_fields.keys() == {"cpus", "gpus", "memory", "custom"}


class Machines:
    """`ray.nodes()` of a cluster whose machines come and go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *machines: dict[str, float]) -> None:
        self.now = {str(number): machine for number, machine in enumerate(machines)}
        monkeypatch.setattr(cluster, "_machines", lambda: self.now)


def test_slots_are_counted_machine_by_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    machines = Machines(monkeypatch, {"CPU": 4, "memory": 10}, {"CPU": 3, "memory": 100, "egress": 1})
    assert cluster.slots(cluster.Demand(2)) == 2 + 1
    assert cluster.slots(cluster.Demand(1, memory_bytes=4)) == 2 + 3
    assert cluster.slots(cluster.Demand(1, custom={"egress": 0.1})) == 3
    assert cluster.slots(cluster.Demand(5)) == 0
    machines.now["2"] = {"CPU": 64}
    assert cluster.slots(cluster.Demand(5)) == 12


def test_what_no_machine_has_is_refused_here_and_waited_for_on_a_cluster(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = Machines(monkeypatch, {"CPU": 4, "memory": 8 << 30})
    wanted = cluster.Demand(8, memory_bytes=6 << 30, custom={"egress": 2})
    with pytest.raises(UserError, match=r"a task asks for 8 CPU and 2 egress; ask for less in resources\.stages"):
        surroundings(tmp_path, None).ask(wanted)
    context = surroundings(tmp_path, "auto")
    told: list[Any] = []
    context.events.listener = told.append
    context.ask(wanted)
    assert "no machine of the cluster has 8 CPU and 2 egress yet: tasks wait" in told[0]["text"]
    machines.now["1"] = {"CPU": 8, "memory": 8 << 30, "egress": 2}
    context.ask(wanted)
    assert len(told) == 1


def slow(number: int, shared: None) -> int:
    import time

    time.sleep(0.05)
    return number


def test_more_is_handed_in_when_machines_join_and_less_when_they_leave(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    machines = Machines(monkeypatch, {"CPU": 1})
    monkeypatch.setattr(cluster, "LOOK_AGAIN_S", 0.0)
    taken: list[int] = []

    def calls() -> Iterator[tuple[str, tuple[int]]]:
        for number in range(60):
            taken.append(number)
            yield str(number), (number,)

    in_flight = []
    for done, _ in enumerate(cluster.spread(slow, calls()), 1):
        in_flight.append(len(taken) - done)
        if done == 10:
            machines.now["1"] = {"CPU": 5}
        if done == 30:
            del machines.now["1"]
    assert max(in_flight[:10]) <= 3 and max(in_flight[10:30]) > 10 and max(in_flight[45:]) <= 3
    assert done == 60


def test_a_task_whose_machines_are_lost_is_done_again_and_given_up_in_the_end(
    ray_session: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer = cluster.result
    lost: list[str] = []

    def result(reference: Any, name: str) -> Any:
        if name == "1" and len(lost) < most:
            lost.append(name)
            raise cluster.LostError("NodeDiedError")
        return answer(reference, name)

    monkeypatch.setattr(cluster, "result", result)
    most = cluster.LOSSES
    assert dict(cluster.spread(slow, [("0", (0,)), ("1", (1,))])) == {"0": 0, "1": 1} and len(lost) == most
    lost.clear()
    most = cluster.LOSSES + 1
    with pytest.raises(UserError, match=r"1: its worker died every time it was tried \(NodeDiedError\)") as caught:
        dict(cluster.spread(slow, [("1", (1,))]))
    assert caught.value.exit_code == 1


def test_processes_with_models_end_with_their_pass(ray_session: None, tmp_path: Path) -> None:
    import time

    from ray._private import state

    from tests.pipelines.test_image_pass import run

    run(tmp_path)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        living = [a for a in state.actors().values() if a["State"] == "ALIVE" and a["ActorClassName"] == "_Actor"]
        if not living:
            return
        time.sleep(0.2)
    raise AssertionError(living)


def test_every_command_that_works_through_ray_takes_an_address() -> None:
    import typer

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    alone = {"init", "status", "doctor", "evaluate", "export", "pack", "submit", "serve"}
    without = {
        name
        for name, command in commands.items()
        if not any("--ray-address" in parameter.opts for parameter in command.params)
    }
    assert without <= alone, without - alone
