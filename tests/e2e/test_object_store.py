"""Stages and locks on s3://, against a server that fails: the same tables as on a disk, and one driver."""

import gzip
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from botocore.exceptions import ClientError

from benchmarks import chaos
from curation import locations, object_store, storage, vectors
from curation.errors import UserError
from pipelines import cluster, lock, repair
from pipelines.download import url_list
from pipelines.run_directory import RunDirectory
from tests.e2e.s3_server import KEY, S3, SECRET, serving
from tests.pipelines import test_repair

ELSEWHERE = {"pid": 1, "host": "elsewhere", "since": "then", "token": "theirs", "life": "1 pid:[1] another-boot"}
MIXED = {"error": 0.02, "lost": 0.01, "drop": 0.02, "slow": 0.02, "lag_s": 5.0, "seed": 1}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with serving() as server:
        yield server


@pytest.fixture
def root(s3: S3, request: pytest.FixtureRequest) -> str:
    """A run directory of the test's own; its name looks like a pattern."""
    return f"s3://bucket/{request.node.name}"


@pytest.fixture
def failing(s3: S3) -> Iterator[S3]:
    yield s3
    s3.faults()


def curate(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own, as another machine would run it."""
    command = [sys.executable, "-m", "cli.main", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=900, env={**os.environ, **environment}
    )


def uploaded(root: Path, s3_root: str) -> None:
    """Folders and lists of sources, as objects."""
    fs = fsspec.filesystem("s3")
    for path in sorted(root.rglob("*")):
        if path.is_file() and path.parts[len(root.parts)] in ("pool", "seeds-even", "evaluation", "urls.parquet"):
            fs.pipe_file(f"{s3_root}/{path.relative_to(root)}", path.read_bytes())


def tables(run: str) -> dict[str, bytes]:
    """What a run promises to reproduce, by path under the run."""
    fs, root = storage.filesystem(run)
    return {
        str(path).removeprefix(str(root).rstrip("/") + "/"): bytes(fs.cat_file(path))
        for path in fs.find(root)
        if str(path).endswith((".parquet", ".tar", "manifest.json"))
    }


def configured(root: Path, name: str, **changes: Any) -> str:
    """A configuration file over `root`, which may be s3://."""
    config = yaml.safe_load(chaos.CONFIG.format(run="RUN", root=root, workers=2, shard_rows=8)) | changes
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def test_failures_that_pass_are_not_seen(failing: S3) -> None:
    failing.faults(error=0.2, lost=0.1, drop=0.2, slow=0.1, seed=5)
    data = bytes(range(256)) * 40
    for number in range(12):
        path = f"s3://bucket/passing/{number}.bin"
        storage.write_whole(path, data[number:])
        assert storage.read_bytes(path) == data[number:]
        assert storage.read_bytes(path, 100, 50) == data[number + 100 : number + 150]
    assert len(storage.list_files("s3://bucket/passing", ".bin")) == 12
    counted = failing.faults()
    assert min(counted[kind] for kind in ("SlowDown", "InternalError", "answer lost", "dropped")) > 0


@pytest.mark.parametrize("fault", ["error", "lost"])
def test_a_store_that_stays_away_is_one_sentence_and_never_a_missing_file(
    failing: S3, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    storage.write_whole("s3://bucket/away/0.bin", b"data")
    failing.faults(**{fault: 1.0})
    place = ("s3://bucket/away/0.bin", 0, 4)
    asked: list[Callable[[], object]] = [
        lambda: storage.read_bytes(place[0]),
        lambda: storage.exists(place[0]),
        lambda: storage.write_whole(place[0], b"more"),
        lambda: list(locations.read_ranges("", [place])),
        lambda: lock.holder("s3://bucket/away"),
    ]
    for ask in asked:
        with pytest.raises(UserError, match=r"s3://bucket/away.*run the same command again") as caught:
            ask()
        assert caught.value.exit_code == 1 and "\n" not in str(caught.value)
        assert KEY not in str(caught.value) and SECRET not in str(caught.value)


def test_keys_in_an_address_are_refused_and_not_repeated() -> None:
    with pytest.raises(UserError, match="keys do not belong in an address") as caught:
        storage.read_bytes("s3://AKIAKEY:verysecret@bucket/run/run.yaml")
    assert "AKIAKEY" not in str(caught.value) and "verysecret" not in str(caught.value)


def test_wrong_keys_are_one_sentence_without_them(s3: S3) -> None:
    error = ClientError({"Error": {"Code": "SignatureDoesNotMatch", "Message": f"{KEY} {SECRET}"}}, "PutObject")
    told = str(object_store.said("s3://bucket/run", error))
    assert "refuses this (SignatureDoesNotMatch)" in told and KEY not in told and SECRET not in told


def test_a_large_object_is_read_whole_although_the_connection_breaks(failing: S3) -> None:
    data = os.urandom(1 << 20) * 6
    storage.write_whole("s3://bucket/large.bin", data)
    failing.faults(drop=0.7, seed=2)
    assert storage.read_bytes("s3://bucket/large.bin") == data
    assert storage.digest("s3://bucket/large.bin", 1 << 20) == (len(data), storage.sha256(data))
    assert failing.faults()["dropped"] > 0


def test_a_footer_and_a_row_group_are_ranges_of_a_part(s3: S3) -> None:
    rows = vectors.embeddings_table(np.arange(100_000, dtype=np.uint64), np.ones((100_000, 16), np.float32))
    path, data = "s3://bucket/parts/part-0.parquet", storage.table_bytes(rows)
    storage.write_whole(path, data)
    before = s3.done()["sent"]
    opened = vectors.open_folder("s3://bucket/parts")
    assert s3.done()["sent"] - before < len(data) // 20, "the footer says what is in a part"
    ids, _ = vectors.read_vectors(path, 16, row_groups=[1])
    assert ids[0] == 1 << 16 and opened.rows == 100_000
    assert s3.done()["sent"] - before < len(data) * 2 // 3


def test_neighbouring_images_are_one_request(s3: S3) -> None:
    images = [bytes([n]) * (1000 + n) for n in range(20)]
    starts = np.cumsum([0] + [len(one) + 512 for one in images])
    storage.write_whole("s3://bucket/run/shards/0.tar", b"".join(one + b"\0" * 512 for one in images))
    places = [("shards/0.tar", int(start), len(one)) for start, one in zip(starts, images, strict=False)]
    before = s3.done()["requests"]
    wanted = [hashlib.sha256(one).digest() for one in images]
    assert list(locations.read_ranges("s3://bucket/run", places, wanted)) == images
    assert s3.done()["requests"] - before == 1
    (gone,) = locations.read_ranges("s3://bucket/run", [("shards/1.tar", 0, 5)])
    assert isinstance(gone, FileNotFoundError)
    (beyond,) = locations.read_ranges("s3://bucket/run", [("shards/0.tar", 10**6, 5)])
    assert isinstance(beyond, OSError)
    with pytest.raises(UserError, match=r"shards/0\.tar: damaged \(the image at byte 0"):
        list(locations.read_ranges("s3://bucket/run", places[:1], wanted[1:2]))


def test_a_compressed_list_of_urls_is_read_from_a_store(s3: S3) -> None:
    lines = "url,alt\n" + "".join(f"http://example.org/{n}.jpg,a {n}\n" for n in range(3000))
    storage.write_whole("s3://bucket/list.csv.gz", gzip.compress(lines.encode()))
    with url_list.open_text("s3://bucket/list.csv.gz") as text:
        assert text.read() == lines


def test_stages_on_a_failing_store_with_lagging_listings_give_the_bytes_of_a_disk(
    failing: S3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "spread", test_repair.here)
    monkeypatch.setattr(cluster, "start", lambda *_: None)
    test_repair.run_stages(tmp_path)
    failing.faults(error=0.05, lost=0.03, drop=0.05, lag_s=60.0, seed=7)
    assert test_repair.run_stages("s3://bucket/stages") == [False, False]
    assert test_repair.run_stages("s3://bucket/stages") == [True, True], "no listing is needed to see what is there"
    run = RunDirectory("s3://bucket/stages")
    assert run.begun() == ["again", "square"]
    storage.write_whole("s3://bucket/stages/sources.json", b"[]")
    assert run.exists()
    assert repair.verify(run.root).damaged == ()
    assert failing.faults()["hidden from a listing"] > 0
    assert tables(run.root) == tables(str(tmp_path))


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


REACHING = """
import sys, time
from curation.errors import UserError
from pipelines import lock

lock._is_dead("s3://bucket/none/.lock", {"pid": 0, "host": ""})  # the client is ready
print("ready", flush=True)
first = float(sys.stdin.readline())
for number, root in enumerate(sys.argv[1:]):
    time.sleep(max(0, first + 0.5 * number - time.time()))
    try:
        lock.acquire(root)
        print("held", flush=True)
    except UserError as error:
        print("refused" if "is being worked on by process" in str(error) else error, flush=True)
sys.stdin.readline()
"""


def test_of_two_processes_that_reach_for_a_run_at_the_same_moment_exactly_one_gets_it(root: str, failing: S3) -> None:
    """Runs that nobody holds, and those that a driver left which died, in turns; answers come in any order."""
    rounds, mine = [f"{root}/{number}" for number in range(10)], lock._life()
    assert mine is not None
    for one in rounds[::2]:
        held_elsewhere(one, host=socket.gethostname(), pid=2**22 + 1, life="0 " + mine.split(" ", 1)[1])
    command = [sys.executable, "-c", REACHING, *rounds]
    both = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in both:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        failing.faults(slow=0.4, seed=7)
        begin = time.time() + 0.5
        for process in both:
            assert process.stdin is not None
            process.stdin.write(f"{begin}\n")
            process.stdin.flush()
        outcomes = [[process.stdout.readline().strip() for _ in rounds] for process in both if process.stdout]
        assert [sorted(pair) for pair in zip(*outcomes, strict=True)] == [["held", "refused"]] * len(rounds), outcomes
    finally:
        for process in both:
            process.kill()
            process.wait()


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


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_whole_run_on_a_failing_store_gives_the_tables_of_a_disk(failing: S3, tmp_path: Path) -> None:
    chaos.prepare(tmp_path, 12)
    with chaos.web(tmp_path) as port:
        chaos.write_urls(tmp_path, port)
        uploaded(tmp_path, "bucket/sources")  # so long before it is read that it is in every listing
        here = configured(tmp_path, "here", run=str(tmp_path / "run"))
        done = curate("run", here, "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        sources = [
            {"as": "pool:web", "urls": "s3://bucket/sources/urls.parquet"},
            {"as": "seed:even", "folder": "s3://bucket/sources/seeds-even"},
            {"as": "reference:evaluation", "folder": "s3://bucket/sources/evaluation"},
        ]
        there = configured(tmp_path, "there", run="s3://bucket/run", sources=sources)
        failing.faults(**MIXED)
        done = curate("run", there, "--json")
        assert done.returncode == 0, done.stderr[-3000:]
        again = curate("run", there, "--json")
        assert all(stage["skipped"] for stage in json.loads(again.stdout.splitlines()[-1])["stages"])
        counted = failing.faults()
    assert min(counted[kind] for kind in ("SlowDown", "InternalError", "answer lost", "dropped", "slow")) > 0
    assert counted["hidden from a listing"] > 0
    expected, found = tables(str(tmp_path / "run")), tables("s3://bucket/run")
    # The place of an imported image is its whole address: those columns differ, and what is made of them.
    assert expected.keys() == found.keys()
    assert [path for path in expected if differ(expected[path], found[path], tmp_path)] == []
    text = (
        done.stdout
        + done.stderr
        + "".join(storage.read_bytes(path).decode() for path in storage.list_files("s3://bucket/run", ".jsonl"))
    )
    assert KEY not in text and SECRET not in text


def differ(here: bytes, there: bytes, root: Path) -> bool:
    """Whether two files differ in more than where the sources lie."""
    if here == there:
        return False
    if here[:1] == b"{":  # the data card names digests of tables in which those places stand
        cards = json.loads(here), json.loads(there)
        return any(cards[0][key] != cards[1][key] for key in ("counts", "decontamination", "seed_sets"))
    a, b = (pq.read_table(pa.BufferReader(data)) for data in (here, there))
    moved = [str(row).replace(str(root), "s3://bucket/sources") for row in a.to_pylist()]
    return moved != [str(row) for row in b.to_pylist()]
