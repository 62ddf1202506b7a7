"""Small runs with an index, and clients that ask their servers without a socket."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from pipelines.server.application import application
from pipelines.server.served import Served, Settings
from tests.pipelines.synthetic_run import SyntheticRun, build

BASE = "http://127.0.0.1:8000"


def client_of(root: str | Path, settings: Settings | None = None) -> TestClient:
    """A client of a server of this run, its index made."""
    guard = application(str(root), settings or Settings(author="tester"))
    served: Served = guard.app.state.served
    served.wait()
    client = TestClient(guard, base_url=BASE, raise_server_exceptions=False)
    client.served = served  # type: ignore[attr-defined]
    return client


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    """60 images of the pool, seeds, references, duplicates, clusters, retrieval, mix."""
    return build(tmp_path_factory.mktemp("served") / "run", pool=60)


@pytest.fixture(scope="session")
def client(made: SyntheticRun) -> Iterator[TestClient]:
    """Of a server that nobody changes."""
    found = client_of(made.run.root)
    yield found
    found.served.close()  # type: ignore[attr-defined]


@pytest.fixture
def copied(made: SyntheticRun, client: TestClient, tmp_path: Path) -> Callable[..., Any]:
    """Makes a client of a copy of the run, index and all, that a test may change."""

    def copy(name: str = "run", **settings: Any) -> Any:
        root = tmp_path / name
        shutil.copytree(made.run.root, root)
        return client_of(root, Settings(author="tester", **settings))

    return copy
