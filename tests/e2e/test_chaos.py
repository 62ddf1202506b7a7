"""Whole runs killed at random lose nothing."""

import json
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from benchmarks import chaos
from benchmarks.chaos_kills import START, VICTIMS, drawn, spans_of
from cli.main import app


@contextmanager
def programme(root: Path, originals: int, seed: int, workers: int) -> Iterator[chaos.Chaos]:
    chaos.prepare(root, originals)
    with chaos.web(root) as port:
        chaos.write_urls(root, port)
        yield chaos.Chaos(root, seed, workers)


def check(carried_out: chaos.Chaos, kills: int) -> None:
    assert sum(len(end.kills) for end in carried_out.ends) == kills
    for end in carried_out.ends:
        assert (end.rows_lost, end.rows_twice, end.files_different, end.left_behind) == (0, 0, [], [])
        assert all(kill.said != "hung" for kill in end.kills)
    logs = [path.read_text(errors="replace") for path in carried_out.root.glob("run-*.log")]
    assert not [log for log in logs if "Traceback" in log]


def run_here(config: Path) -> dict[str, Any]:
    """`curate run` in this process and its Ray, untouched, with two workers; its last line."""
    done = CliRunner().invoke(app, ["run", str(config), "--json"])
    assert done.exit_code == 0, done.output
    summary: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return summary


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Iterator[tuple[chaos.Chaos, chaos.Whole]]:
    root = tmp_path_factory.mktemp("chaos")
    with programme(root, 8, seed=0, workers=1) as chaotic:
        began = time.time()
        assert not any(stage["skipped"] for stage in run_here(chaotic.config("whole"))["stages"])
        spans = spans_of(chaos.events(root / "whole"), began) | {START: 3.0}  # here Ray runs before
        yield chaotic, chaos.Whole(chaos.results(root / "whole"), time.time() - began, spans)


@pytest.mark.timeout(900)
def test_a_run_killed_at_five_random_moments_each_time_elsewhere_loses_no_row_and_no_byte(
    untouched: tuple[chaos.Chaos, chaos.Whole],
) -> None:
    chaotic, whole = untouched
    choice = random.Random(5)
    left = choice.sample(list(VICTIMS), 5)
    while left:  # a run may end before its last moments come: those are drawn again for another
        done = len(chaotic.ends)
        chaotic.one_run(drawn(choice, left, list(whole.spans)), choice, whole)
        left = [victim for victim in left if victim not in {kill.victim for kill in chaotic.ends[done].kills}]
    check(chaotic, 5)


def test_the_second_run_skips_everything(untouched: tuple[chaos.Chaos, chaos.Whole]) -> None:
    chaotic, whole = untouched
    assert all(stage["skipped"] for stage in run_here(chaotic.config("whole"))["stages"])
    assert chaos.results(chaotic.root / "whole") == whole.files


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_fifty_kills_at_random_lose_no_row_and_no_byte(tmp_path: Path) -> None:
    with programme(tmp_path, 16, seed=random.SystemRandom().randrange(10**6), workers=2) as chaotic:
        chaotic.carry_out(50, chaotic.whole())
    check(chaotic, 50)


def test_rows_that_are_lost_or_twice_are_counted() -> None:
    import pyarrow as pa

    from curation import storage

    def part(*ids: int) -> bytes:
        return storage.table_bytes(pa.table({"image_id": pa.array(ids, pa.uint64())}))

    whole = {"mix/gen-0000/a.parquet": part(1, 2, 3), "mix/gen-0000/b.parquet": part(4), "x.tar": b""}
    assert chaos.compare_rows(whole, dict(whole)) == (0, 0)
    assert chaos.compare_rows(whole, {"mix/gen-0000/a.parquet": part(1, 2, 2)}) == (2, 1)
