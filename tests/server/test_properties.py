"""Whatever is asked of the API, it answers below 500: schemathesis draws the questions from its OpenAPI document."""

from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from starlette.testclient import TestClient

from tests.pipelines.synthetic_run import build
from tests.server.conftest import client_of


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A client of a run of its own: some questions are decisions."""
    found = client_of(build(tmp_path_factory.mktemp("properties") / "run", pool=20, hostile=True).run.root)
    yield found
    found.served.close()


def check(client: TestClient, examples: int) -> None:
    own = {"Host": "127.0.0.1:8000"}
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", client.app, headers=own)
    seen = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        strategy = operation.as_strategy()
        seen += 1

        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            derandomize=True,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=strategy)
        def ask(case: Any) -> None:
            answer = case.call(headers=own)
            assert answer.status_code < 500, (
                case.method,
                case.formatted_path,
                answer.text[:300],
            )

        ask()
    assert seen > 25


def test_no_question_breaks_the_server(asked: Any) -> None:
    check(asked, 4)


@pytest.mark.long
def test_no_question_of_many_breaks_the_server(asked: Any) -> None:
    check(asked, 60)
