"""A Ray cluster on this machine: one `ray start --block` per node, with ports, folder and token of its own.

With `isolated` every node has its own network namespace and a temporary folder that no other node sees, as machines
have: only root can make these.
"""

import itertools
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import IO

import psutil

SUBNET = "10.213.77"
START_S = 240.0
ATTEMPTS = 4
"""Ray gives a node half a minute to come up: too little on a busy machine."""
STORE_BYTES = 120_000_000
RAYS_OWN = (
    "IDLE",
    "DashboardAgent",
    "RuntimeEnvAgent",
    "JobSupervisor",
    "_StatsActor",
    "_Autoscaling",
    "ActorLocation",
)
"""Titles of processes that compute nothing of ours."""
BINARIES = str(Path(sys.executable).parent)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def own_address() -> str:
    """The address by which Ray knows this machine."""
    import ray

    return str(ray.util.get_node_ip_address())


class Node:
    """One node; `kill` is the power switch."""

    def __init__(self, cluster: "Cluster", number: int, arguments: list[str]) -> None:
        self.cluster = cluster
        self.folder = cluster.folder / str(number)
        self.local = cluster.folder / "local"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        self.space = f"cur{os.getpid() % 10000}x{number}" if cluster.isolated else None
        self.address = f"{SUBNET}.{number + 1}" if self.space else cluster.host
        if self.space is not None:
            self._plug_in()
        command = ["ray", "start", "--block", f"--node-ip-address={self.address}", f"--temp-dir={self.folder}"]
        command += ["--disable-usage-stats", f"--object-store-memory={STORE_BYTES}"]
        command += [f"--dashboard-agent-listen-port={free_port()}", "--min-worker-port=0", "--max-worker-port=0"]
        self.log = cluster.folder / f"{number}.log"
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                self.inside([*command, *arguments], private=True),
                stdout=log,
                stderr=log,
                env=cluster.environment | {"TMPDIR": str(self.local)},
                cwd=self.folder,
                start_new_session=True,
            )

    def inside(self, command: list[str], private: bool = False) -> list[str]:
        """A command as it is run on this node. private: with a temporary folder that others do not see."""
        if self.space is None:
            return command
        mount = f'mount -t tmpfs tmpfs "{self.local}" && exec "$@"'
        hidden = ["unshare", "--mount", "sh", "-c", mount, "sh"] if private else []
        return ["ip", "netns", "exec", self.space, *hidden, *command]

    def processes(self) -> list[psutil.Process]:
        """Everything that runs on it."""
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def is_at_work(self) -> bool:
        """Whether one of its workers computes something of ours now."""
        for process in self.processes():
            try:
                name = " ".join(process.cmdline())
            except psutil.Error:
                continue
            if name.startswith("ray::") and not name.removeprefix("ray::").startswith(RAYS_OWN):
                return True
        return False

    def kill(self) -> None:
        """SIGKILL for the raylet first, then for all that is left."""
        processes = self.processes()
        processes.sort(key=lambda process: "raylet" not in process.name())
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.kill()
        self.process.wait()
        if self.space is not None:
            subprocess.run(["ip", "netns", "del", self.space], check=False, stderr=subprocess.DEVNULL)

    def _plug_in(self) -> None:
        assert self.space is not None
        wire = f"v{self.space}"
        for command in (
            f"ip netns add {self.space}",
            f"ip link add {wire} type veth peer name eth0 netns {self.space}",
            f"ip link set {wire} master {self.cluster.bridge} up",
            f"ip -n {self.space} addr add {self.address}/24 dev eth0",
            f"ip -n {self.space} link set eth0 up",
            f"ip -n {self.space} link set lo up",
        ):
            subprocess.run(command.split(), check=True, capture_output=True)


class Cluster:
    """A head and its nodes. Use as a context manager."""

    def __init__(self, *, head_cpus: int = 1, isolated: bool = False, dashboard: bool = False) -> None:
        self.isolated = isolated
        self.folder = Path(tempfile.mkdtemp(prefix="cur", dir="/tmp"))  # sockets have short names
        (self.folder / "local").mkdir()
        self.token = secrets.token_hex(16)
        path = f"{BINARIES}:{os.environ['PATH']}"
        self.environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token, "PATH": path}
        self.environment.pop("RAY_ADDRESS", None)
        self.bridge = f"cur{os.getpid() % 10000}b"
        self.host = f"{SUBNET}.1" if isolated else own_address()
        self.port, self.jobs_port = free_port(), free_port()
        if isolated:
            subprocess.run(["ip", "link", "add", self.bridge, "type", "bridge"], check=True)
            subprocess.run(["ip", "link", "set", self.bridge, "up"], check=True)
        self.nodes: list[Node] = []
        self.numbers = itertools.count(1)
        asked = [f"--dashboard-host={self.host}", f"--dashboard-port={self.jobs_port}"]
        self.address = f"{self.host}:{self.port}"
        self.jobs_address = f"http://{self.host}:{self.jobs_port}"
        self.head_arguments = (
            ["--head", f"--port={self.port}", f"--num-cpus={head_cpus}", f"--ray-client-server-port={free_port()}"]
            + ["--include-dashboard=true", *asked] * dashboard
            + ["--include-dashboard=false"] * (not dashboard)
        )

    def __enter__(self) -> "Cluster":
        try:
            self.head = self._started(self.head_arguments)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in reversed(self.nodes):
            node.kill()
        if self.isolated:
            subprocess.run(["ip", "link", "del", self.bridge], check=False)
        shutil.rmtree(self.folder, ignore_errors=True)

    def add(self, resources: dict[str, float] | None = None, cpus: int = 1) -> Node:
        """One more node, which has joined when this returns."""
        more = [f"--resources={json.dumps(resources)}"] if resources else []
        return self._started([f"--address={self.address}", f"--num-cpus={cpus}", *more])

    def curate(self, *arguments: object, output: IO[str] | int = subprocess.PIPE) -> subprocess.Popen[str]:
        """`curate` started on the head."""
        command = self.head.inside([str(Path(BINARIES) / "curate"), *map(str, arguments)])
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, text=True, env=self.environment)

    def logs(self) -> str:
        """Everything that Ray has written on any node."""
        found = [path for node in self.nodes for path in node.folder.rglob("*") if path.is_file()]
        return "\n".join(path.read_text(errors="replace") for path in found if "logs" in path.parts)

    def _started(self, arguments: list[str]) -> Node:
        for _ in range(ATTEMPTS):
            # A head has the first address of the network, also when it is tried again.
            node = Node(self, 0 if "--head" in arguments else next(self.numbers), arguments)
            deadline = time.monotonic() + START_S
            while node.process.poll() is None and time.monotonic() < deadline:
                if "Ray runtime started" in node.log.read_text():
                    self.nodes.append(node)
                    return node
                time.sleep(0.1)
            said = node.log.read_text()[-2000:]
            node.kill()
        raise AssertionError(f"no Ray node: {said}")


def results(run: Path) -> dict[str, bytes]:
    """Everything a run promises to reproduce: all Parquet and the data card."""
    kept = [*run.rglob("*.parquet"), *run.rglob("manifest.json")]
    return {str(p.relative_to(run)): p.read_bytes() for p in kept}
