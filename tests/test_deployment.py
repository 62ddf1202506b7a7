"""Images, Compose, Kubernetes and Slurm: files checked without a container engine, scripts run with stand-ins."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import check_jsonschema
import jsonschema
import kubernetes_validate
import pytest
import yaml
from typer.testing import CliRunner

from cli.main import app
from pipelines.configuration import load
from tests.kuberay import SCHEMAS
from tests.kustomize import build

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
LAYERS = ("base", "overlays/gpu", "overlays/job", "overlays/job-gpu")
KUBERNETES = "1.33"


# ---- images ---------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """(INSTRUCTION, arguments) of the Dockerfile, lines joined."""
    text = re.sub(r"(?m)^#.*\n", "", (DOCKER / "Dockerfile").read_text()).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in text.splitlines() if line.strip()]


def stage(name: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    inside = False
    for instruction, arguments in instructions():
        if instruction == "FROM":
            inside = arguments.endswith(f" AS {name}")
        if inside:
            found.append((instruction, arguments))
    return found


def test_images_are_built_in_stages_from_a_pinned_base_and_run_without_rights() -> None:
    base = dict(instructions())["ARG"]
    arguments = [a for i, a in instructions() if i == "ARG"]
    assert base and any(re.fullmatch(r"BASE=python:3\.12\.\d+-slim-\w+", a) for a in arguments)
    assert [a for i, a in instructions() if i == "FROM"] == ["${BASE} AS build", "${BASE} AS cpu", "cpu AS gpu"]
    cpu = stage("cpu")
    assert ("USER", "1000") in cpu and any(i == "HEALTHCHECK" for i, _ in cpu)
    assert not any("pip" in a for i, a in cpu if i == "RUN"), "no pip in what runs"
    assert any("--constraint constraints.txt" in a for i, a in stage("build") if i == "RUN")


def test_an_image_takes_what_is_there_and_what_is_not_ignored() -> None:
    kept = {line[1:].strip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for instruction, arguments in instructions():
        if instruction == "COPY" and not arguments.startswith("--from"):
            for source in arguments.split()[:-1]:
                assert (ROOT / source).exists(), source
                assert source in kept, f"{source} is left out by .dockerignore"


def test_versions_of_the_image_and_of_ray_on_kubernetes_are_those_of_the_constraints() -> None:
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"
    )
    cluster = next(d for d in build(DOCKER / "kubernetes/base") if d["kind"] == "RayCluster")
    assert cluster["spec"]["rayVersion"] == pinned["ray"] == version("ray")


@pytest.mark.parametrize(("command", "asks"), [("ray start --head --block", True), ("curate run run.yaml", False)])
def test_a_container_is_asked_for_its_raylet_only_if_it_is_a_node(tmp_path: Path, command: str, asks: bool) -> None:
    (tmp_path / "wget").write_text("#!/bin/sh\necho asked; exit 1\n")
    (tmp_path / "cmdline").write_text(command.replace(" ", "\0") + "\0")
    (tmp_path / "wget").chmod(0o755)
    script = (DOCKER / "healthcheck.sh").read_text().replace("/proc/1/cmdline", str(tmp_path / "cmdline"))
    done = subprocess.run(
        ["sh", "-c", script], env={"PATH": f"{tmp_path}:{os.environ['PATH']}"}, capture_output=True, check=False
    )
    assert (done.returncode, done.stdout) == ((1, b"asked\n") if asks else (0, b""))


# ---- Compose --------------------------------------------------------------------------------------------------------


def compose(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((DOCKER / name).read_text())
    return found


@pytest.mark.parametrize("name", ["compose.yaml", "compose.gpu.yaml"])
def test_compose_files_follow_the_schema_of_compose(name: str) -> None:
    vendored = resources.files(check_jsonschema) / "builtin_schemas" / "vendor" / "compose-spec.json"
    schema = yaml.safe_load(vendored.read_text())
    validator = jsonschema.validators.validator_for(schema)(schema)
    assert [error.message for error in validator.iter_errors(compose(name))] == []
    wrong = compose(name)
    wrong["services"]["worker"]["imagee"] = "x"
    assert list(validator.iter_errors(wrong))


def test_compose_has_a_head_workers_and_objects_and_no_secret_and_no_open_port() -> None:
    services = compose("compose.yaml")["services"]
    assert {"head", "worker", "minio"} <= set(services)
    text = (DOCKER / "compose.yaml").read_text()
    for name in ("RAY_AUTH_TOKEN", "AWS_SECRET_ACCESS_KEY", "MINIO_ROOT_PASSWORD"):
        assert re.findall(rf"{name}: (.*)", text) and all(
            value.startswith("${") and ":?" in value for value in re.findall(rf"{name}: (.*)", text)
        )
    assert [port for s in services.values() for port in s.get("ports", [])] == ["127.0.0.1:8265:8265"]
    assert all(":" in s["image"] and not s["image"].endswith(":latest") for s in services.values())
    asked = set(re.findall(r"\$\{(\w+):\?", text))
    assert asked == {line.split("=")[0] for line in (DOCKER / "example.env").read_text().splitlines() if "=" in line}
    for service in ("head", "worker"):
        assert services[service]["environment"]["RAY_AUTH_MODE"] == "token"
        assert services[service]["cap_drop"] == ["ALL"]


# ---- Kubernetes -----------------------------------------------------------------------------------------------------


def pods(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Pod templates of a RayCluster or RayJob."""
    spec = document["spec"].get("rayClusterSpec", document["spec"])
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        yield group["template"]


@pytest.mark.parametrize("layer", LAYERS)
def test_manifests_follow_the_schemas_of_kubernetes_and_kuberay(layer: str) -> None:
    kinds = set()
    for document in build(DOCKER / "kubernetes" / layer):
        kinds.add(document["kind"])
        if document["kind"] not in SCHEMAS:
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
            continue
        jsonschema.validate(document, SCHEMAS[document["kind"]])
        for pod in pods(document):
            whole = {
                "apiVersion": "v1",
                "kind": "Pod",
                "metadata": {"name": "x", **pod["metadata"]},
                "spec": pod["spec"],
            }
            kubernetes_validate.validate(whole, KUBERNETES, strict=True)
    assert {"NetworkPolicy", "ServiceAccount"} <= kinds
    assert ("RayJob" if "job" in layer else "RayCluster") in kinds and not {"RayJob", "RayCluster"} <= kinds


@pytest.mark.parametrize("layer", LAYERS)
def test_pods_run_without_rights_with_a_token_and_behind_the_policy(layer: str) -> None:
    documents = build(DOCKER / "kubernetes" / layer)
    (ray,) = [d for d in documents if d["kind"] in SCHEMAS]
    spec = ray["spec"].get("rayClusterSpec", ray["spec"])
    assert spec["authOptions"] == {"mode": "token"}
    policy = next(d for d in documents if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "curate")
    for pod in pods(ray):
        assert policy["spec"]["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        for container in pod["spec"]["containers"]:
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
            assert container["image"] == f"lvd-curate:{'gpu' if 'gpu' in layer else 'cpu'}"
            # Ray plans with the limits: what may be taken away would be promised twice.
            assert container["resources"]["requests"] == container["resources"]["limits"]
    assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_workers_reach_the_internet_and_no_private_network() -> None:
    documents = build(DOCKER / "kubernetes/base")
    policy = next(d for d in documents if d["kind"] == "NetworkPolicy" and d["metadata"]["name"] == "curate")
    blocks = [to["ipBlock"] for rule in policy["spec"]["egress"] for to in rule["to"] if "ipBlock" in to]
    assert {block["cidr"] for block in blocks} == {"0.0.0.0/0", "::/0"}
    refused = {cidr for block in blocks for cidr in block["except"]}
    assert {"169.254.0.0/16", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "fc00::/7"} <= refused


def test_the_run_of_the_job_is_a_configuration_and_lies_where_the_job_looks() -> None:
    documents = build(DOCKER / "kubernetes/overlays/job")
    (job,) = [d for d in documents if d["kind"] == "RayJob"]
    head, *workers = pods(job)
    (mount,) = [m for m in head["spec"]["containers"][0]["volumeMounts"] if m["name"] == "run"]
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["curate", "run"] and words[2] == f"{mount['mountPath']}/run.yaml"
    help_text = CliRunner().invoke(app, ["run", "--help"]).output
    assert all(word in help_text for word in words[3:] if word.startswith("--"))
    assert not any(v["name"] == "run" for pod in workers for v in pod["spec"]["volumes"])
    assert load(str(DOCKER / "kubernetes/job/run.yaml")).resources.scratch == "/shared"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
@pytest.mark.parametrize("layer", LAYERS)
def test_kubectl_makes_the_same_of_the_layers(layer: str) -> None:
    text = subprocess.run(
        ["kubectl", "kustomize", str(DOCKER / "kubernetes" / layer)], capture_output=True, text=True, check=True
    ).stdout

    def sorted_(documents: Any) -> list[Any]:
        return sorted(documents, key=lambda d: (d["kind"], d["metadata"]["name"]))

    assert sorted_(yaml.safe_load_all(text)) == sorted_(build(DOCKER / "kubernetes" / layer))


# ---- Slurm ----------------------------------------------------------------------------------------------------------


def test_shell_scripts_are_clean() -> None:
    scripts = [DOCKER / "slurm" / "curate.sbatch", DOCKER / "healthcheck.sh"]
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert shellcheck is not None
    done = subprocess.run([shellcheck, *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


STAND_INS = {
    "scontrol": 'printf "n1\\nn2\\nn3\\n"',
    "hostname": "echo 192.0.2.7 192.0.2.8",
    # What is left of srun: the options, then the command itself.
    "srun": 'host=; while [ "${1#--}" != "$1" ]; do case $1 in --nodelist=*) host=${1#*=};; esac; shift; done\n'
    'HOST=$host exec "$@"',
    "ray": 'echo "$HOST ray $*" >>"$CALLS"; if [ "$1" = start ]; then stat -c %a "$RAY_AUTH_TOKEN_PATH" >>"$CALLS"\n'
    "exec sleep 60 >/dev/null 2>&1; fi",
    "curate": 'until [ "$(grep -c "^600" "$CALLS")" = 3 ]; do sleep 0.05; done; echo "$HOST curate $*" >>"$CALLS"\n'
    'trap "echo told >>$CALLS; exit 130" TERM\n'
    'if [ "$2" = wait.yaml ]; then sleep 60 >/dev/null 2>&1 & wait $!; fi; exit 3',
}


@pytest.fixture
def slurm(tmp_path: Path) -> dict[str, str]:
    """An environment in which the commands of Slurm and Ray are stand-ins that write down how they were called."""
    (tmp_path / "bin").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_CPUS_PER_TASK": "4"}
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return {"PATH": path, "HOME": str(tmp_path), "CALLS": str(tmp_path / "calls"), **job}


def sent(environment: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(DOCKER / "slurm" / "curate.sbatch"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def test_a_slurm_job_is_a_head_and_its_nodes_and_ends_as_the_run_does(slurm: dict[str, str]) -> None:
    process = sent(slurm, "run.yaml", "--until", "dedup")
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 3, said
    calls = Path(slurm["CALLS"]).read_text().splitlines()
    nodes = sorted(line for line in calls if " ray start " in line)
    assert [line.split()[0] for line in nodes] == ["n1", "n2", "n3"]
    assert "--head" in nodes[0] and all("--address=192.0.2.7:20077" in line for line in nodes[1:])
    assert all("--num-cpus=4" in line for line in nodes)
    assert "n1 curate run run.yaml --until dedup --ray-address 192.0.2.7:20077" in calls
    assert calls.count("600") == 3, "the token is a file that its user alone reads"
    assert not list(Path(slurm["HOME"]).glob(".curate-*.token"))


def test_a_slurm_job_whose_time_is_up_tells_the_run_and_leaves_nothing_behind(slurm: dict[str, str]) -> None:
    process = sent(slurm, "wait.yaml")
    deadline = time.monotonic() + 60
    calls = Path(slurm["CALLS"])
    while not (calls.exists() and "curate run wait.yaml" in calls.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 143 and "send the job again to go on" in said
    assert "told" in calls.read_text()
    assert not list(Path(slurm["HOME"]).glob(".curate-*.token"))


def test_a_slurm_job_without_a_run_says_how_it_is_sent(slurm: dict[str, str]) -> None:
    process = sent(slurm)
    assert "usage: sbatch curate.sbatch run.yaml" in process.communicate(timeout=60)[0] and process.returncode == 2
