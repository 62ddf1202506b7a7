"""Whole runs killed at random lose nothing."""

import random
from pathlib import Path

import pytest

from benchmarks import chaos


def carried_out(root: Path, kills: int, originals: int, seed: int, workers: int) -> chaos.Chaos:
    chaos.prepare(root, originals)
    with chaos.web(root) as port:
        chaos.write_urls(root, port)
        programme = chaos.Chaos(root, seed, workers)
        expected, seconds = programme.whole()
        programme.carry_out(kills, expected, 0.4 * seconds)
    return programme


def check(programme: chaos.Chaos, kills: int) -> None:
    assert sum(len(end.kills) for end in programme.ends) == kills
    for end in programme.ends:
        assert (end.rows_lost, end.rows_twice, end.files_different) == (0, 0, [])
        assert all(kill.said != "hung" for kill in end.kills)
    logs = [path.read_text(errors="replace") for path in programme.root.glob("run-*.log")]
    assert not [log for log in logs if "Traceback" in log]


@pytest.mark.timeout(1800)
def test_five_kills_at_random_lose_no_row_and_no_byte(tmp_path: Path) -> None:
    check(carried_out(tmp_path, 5, 8, seed=214, workers=1), 5)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_fifty_kills_at_random_lose_no_row_and_no_byte(tmp_path: Path) -> None:
    check(carried_out(tmp_path, 50, 16, seed=random.SystemRandom().randrange(10**6), workers=2), 50)


def test_rows_that_are_lost_or_twice_are_counted() -> None:
    import pyarrow as pa

    from curation import storage

    def part(*ids: int) -> bytes:
        return storage.table_bytes(pa.table({"image_id": pa.array(ids, pa.uint64())}))

    whole = {"mix/gen-0000/a.parquet": part(1, 2, 3), "mix/gen-0000/b.parquet": part(4), "x.tar": b""}
    assert chaos.compare_rows(whole, dict(whole)) == (0, 0)
    assert chaos.compare_rows(whole, {"mix/gen-0000/a.parquet": part(1, 2, 2)}) == (2, 1)
