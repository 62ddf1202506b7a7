"""One driver per run directory on an object store, whatever the clocks of the machines say."""

import json
import threading
import time
from collections.abc import Iterator

import pytest

from curation import storage
from curation.errors import UserError
from pipelines import lock
from tests.e2e.s3_server import S3, serving

ELSEWHERE = {"pid": 1, "host": "elsewhere", "since": "then", "token": "theirs", "life": "1 pid:[1] another-boot"}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serving() as server:
        yield server


@pytest.fixture
def root(s3: S3, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name}"


def held_elsewhere(root: str, **changes: object) -> None:
    storage.write_whole(f"{root}/.lock", json.dumps(ELSEWHERE | changes).encode())


def test_a_second_driver_is_refused_and_gets_in_when_the_first_lets_go(root: str) -> None:
    with lock.hold(root):
        mine = lock._held.pop(f"{root}/.lock")  # as another process sees it
        with pytest.raises(UserError, match="is being worked on by process"):
            lock.acquire(root)
        assert lock.is_held(root)
        lock._held[f"{root}/.lock"] = mine
    assert not lock.is_held(root) and lock.holder(root) == {}
    with lock.hold(root):
        pass


@pytest.mark.parametrize("skew_s", [-86_400, 86_400])
def test_a_clock_that_is_a_day_off_neither_breaks_a_living_lock_nor_keeps_a_dead_one(
    root: str, skew_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_elsewhere(root)
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + skew_s)
    with pytest.raises(UserError, match="process 1 on elsewhere since then"):
        lock.acquire(root)
    monkeypatch.setattr(lock, "STALE_S", 1.0)
    time.sleep(2.1)  # the store's stamps are whole seconds
    with lock.hold(root):
        assert lock.holder(root)["host"] != "elsewhere"


def test_of_many_who_reach_for_a_dead_lock_one_gets_it(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    held_elsewhere(root)
    monkeypatch.setattr(lock, "STALE_S", -1.0)
    outcomes: list[str] = []
    together = threading.Barrier(6)

    def reach() -> None:
        together.wait()
        try:
            lock._lock_object(f"{root}/.lock")
            outcomes.append("held")
        except UserError:
            outcomes.append("refused")

    threads = [threading.Thread(target=reach) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    # All looked while it was dead; whoever looked later saw a lock of this process, dead as well by STALE_S.
    assert lock.holder(root)["token"] != "theirs" and "held" in outcomes
    monkeypatch.setattr(lock, "STALE_S", 180.0)
    with pytest.raises(UserError, match="is being worked on"):
        lock._lock_object(f"{root}/.lock")


def test_who_was_taken_over_is_told_before_it_finishes_anything(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "RENEW_S", 0.1)
    with lock.hold(root):
        time.sleep(0.5)
        lock.confirm(root)  # renewed some times, and still its own
        held_elsewhere(root)
        deadline = time.monotonic() + 10
        while not lock._held[f"{root}/.lock"].lost.is_set() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(UserError, match="taken over by process 1 on elsewhere"):
            lock.confirm(root)
    assert lock.holder(root)["token"] == "theirs"


def test_a_lock_whose_answer_was_lost_is_had_all_the_same(root: str, s3: S3) -> None:
    s3.faults(lost=0.3, seed=3)
    try:
        with lock.hold(root):
            pass
    finally:
        s3.faults()
    assert lock.holder(root) == {}


def test_a_process_of_this_machine_that_ended_is_dead_at_once(root: str) -> None:
    mine = lock._life()
    assert mine is not None
    held_elsewhere(root, pid=2**22 + 1, life="0 " + mine.split(" ", 1)[1])
    with lock.hold(root):
        assert lock.holder(root)["token"] != "theirs"
