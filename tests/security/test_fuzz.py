"""The fuzz campaign of benchmarks/fuzz.py in short: changed honest inputs end in a class, a sentence or pixels."""

import os
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.fuzz_targets import CRASH_IS_HANDLED, TARGETS, Target, mutate
from embeddings.decoding import REASONS

INPUTS = 12
KEPT = Path(__file__).parent / "inputs"


@pytest.mark.parametrize("name", list(TARGETS))
def test_changed_inputs_end_in_a_verdict(name: str) -> None:
    target, chance = TARGETS[name], random.Random(f"test {name}")
    seeds = target.seeds()
    outcomes: Counter[str] = Counter()
    for data in seeds:
        target.run(data)
    for _ in range(INPUTS):
        outcomes[target.run(mutate(chance.choice(seeds), chance, seeds))] += 1
    assert sum(outcomes.values()) == INPUTS
    if name.startswith("decode"):
        assert set(outcomes) <= {"pixels", *REASONS}


@pytest.mark.parametrize("name", ["url", "robots", "answer", "list", "tar", "header"])
@settings(max_examples=10, deadline=None)
@given(data=st.one_of(st.binary(max_size=600), st.text(max_size=200).map(lambda text: text.encode(errors="replace"))))
def test_any_bytes_end_in_a_verdict(name: str, data: bytes) -> None:
    assert TARGETS[name].run(data)


def kept() -> list[tuple[str, str]]:
    """(target, file) of the inputs that once crashed something; a file's name begins with its target's."""
    return [
        (name, file)
        for file in sorted(os.listdir(KEPT))
        for name in TARGETS
        if file.startswith(name.replace(" ", "-") + "--")
    ]


@pytest.mark.parametrize(("name", "file"), kept())
def test_inputs_that_once_crashed_end_in_a_verdict(name: str, file: str) -> None:
    assert TARGETS[name].run((KEPT / file).read_bytes())


def test_a_crash_is_seen() -> None:
    def fails(data: bytes) -> str:
        raise ValueError(data)

    with pytest.raises(ValueError):
        Target(fails, list).run(b"x")
    assert set(CRASH_IS_HANDLED) <= set(REASONS)
