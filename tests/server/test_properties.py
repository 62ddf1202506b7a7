"""Whatever is asked of the API, it answers below 500: schemathesis draws the questions from its OpenAPI document."""

from collections import Counter
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from starlette.testclient import TestClient

from tests.pipelines.synthetic_run import build
from tests.server.conftest import client_of


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A client of a run of its own: some questions are decisions."""
    found = client_of(build(tmp_path_factory.mktemp("properties") / "run", pool=20, hostile=True).run.root)
    yield found
    found.served.close()


def check(client: TestClient, examples: int, mode: GenerationMode = GenerationMode.POSITIVE) -> Counter[int]:
    """Ask every operation, as its description allows or against it; returns how many answers had which status."""
    own = {"Host": "127.0.0.1:8000"}
    schema = schemathesis.openapi.from_asgi("/api/openapi.json", client.app, headers=own)
    seen = 0
    answers: Counter[int] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        if mode is GenerationMode.NEGATIVE and not (list(operation.iter_parameters()) or operation.body):
            continue  # nothing of it can be wrong
        strategy = operation.as_strategy(generation_mode=mode)
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
            answer = case.call(headers=own, timeout=120)
            answers[answer.status_code] += 1
            assert answer.status_code < 500, (
                case.method,
                case.formatted_path,
                answer.text[:300],
            )

        ask()
    assert seen > 20
    return answers


def test_no_question_breaks_the_server(asked: Any) -> None:
    assert check(asked, 4)[200] > 20


@pytest.mark.long
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_question_of_many_breaks_the_server(asked: Any, mode: GenerationMode) -> None:
    answers = check(asked, 60, mode)
    print(f"{mode.value}: {sum(answers.values()):,} questions, answers by status: {dict(sorted(answers.items()))}")
    assert answers[200 if mode is GenerationMode.POSITIVE else 422] > 300
