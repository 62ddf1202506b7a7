"""What sites ask of robots is heard: robots.txt, X-Robots-Tag, and how often one host is asked."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.download.addresses import Target, parse
from pipelines.download.errors import FetchError
from pipelines.download.politeness import HostGate
from pipelines.download.robots import RobotsCache, forbidden_directive

PAGE = parse("http://images.example/photos/1.jpg")


def cache(status: int, text: str = "", token: str = "lvd-curate", expiry_s: float = 100.0) -> RobotsCache:
    return RobotsCache(lambda target: (status, text), token, expiry_s)


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("", True),
        ("User-agent: *\nDisallow: /", False),
        ("User-agent: *\nDisallow: /photos/", False),
        ("User-agent: *\nDisallow: /other/", True),
        ("User-agent: *\nDisallow: /\nAllow: /photos/", True),
        ("User-agent: lvd-curate\nDisallow: /", False),
        ("User-agent: *\nDisallow: /\n\nUser-agent: lvd-curate\nAllow: /", True),
        ("User-agent: somebody\nDisallow: /", True),
        ("<html>not a robots file</html>", True),
    ],
)
def test_robots_rules_are_kept(text: str, allowed: bool) -> None:
    if allowed:
        cache(200, text).check(PAGE)
        return
    with pytest.raises(FetchError, match="robots_disallowed"):
        cache(200, text).check(PAGE)


def test_no_robots_file_allows_and_an_unreachable_one_forbids_for_now() -> None:
    cache(404).check(PAGE)
    cache(403).check(PAGE)
    for status in (500, 503, 429):
        with pytest.raises(FetchError, match="robots_unreachable"):
            cache(status).check(PAGE)


def test_a_host_that_may_not_be_asked_fails_for_good() -> None:
    def refuse(target: Target) -> tuple[int, str]:
        raise FetchError("private_address", "the host's address is not public")

    with pytest.raises(FetchError, match="private_address"):
        RobotsCache(refuse, "lvd-curate", 100.0).check(PAGE)


def test_crawl_delay_is_heard() -> None:
    assert cache(200, "User-agent: *\nCrawl-delay: 3").check(PAGE) == 3.0


def test_each_origin_is_asked_once_until_the_expiry() -> None:
    asked: list[str] = []

    def fetch(target: Target) -> tuple[int, str]:
        asked.append(target.url)
        time.sleep(0.05)
        return 200, ""

    robots = RobotsCache(fetch, "lvd-curate", 0.3)
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(robots.check, [PAGE] * 64))
    assert asked == ["http://images.example/robots.txt"]
    robots.check(parse("https://images.example/1.jpg"))
    assert asked[1:] == ["https://images.example/robots.txt"]
    time.sleep(0.35)
    robots.check(PAGE)
    assert len(asked) == 3


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([], None),
        (["noindex"], "noindex"),
        (["all, NoAI"], "noai"),
        (["nofollow", "noimageai"], "noimageai"),
        (["googlebot: noindex"], None),
        (["googlebot: noindex, noai"], None),
        (["lvd-curate: noai"], "noai"),
        (["LVD-Curate : noai"], "noai"),
        (["otherbot: nofollow, lvd-curate: noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 PST, noai"], "noai"),
        (["max-snippet: 10, max-image-preview: large"], None),
    ],
)
def test_x_robots_tag_directives_are_found(values: list[str], found: str | None) -> None:
    forbidden = frozenset({"noai", "noimageai", "noindex", "noimageindex"})
    assert forbidden_directive(values, "lvd-curate", forbidden) == found


def test_requests_in_flight_per_host_are_bounded(tmp_path: Path) -> None:
    gate = HostGate(str(tmp_path), 3, 0.0, 30.0)
    lock = threading.Lock()
    now, most = 0, 0

    def work(number: int) -> None:
        nonlocal now, most
        with gate.slot("one.example"):
            with lock:
                now += 1
                most = max(most, now)
            time.sleep(0.004)
            with lock:
                now -= 1

    with ThreadPoolExecutor(24) as pool:
        list(pool.map(work, range(120)))
    assert most == 3
    assert gate._hosts == {}


def test_requests_are_spaced(tmp_path: Path) -> None:
    gate = HostGate(str(tmp_path), 8, 0.05, 30.0)
    began: list[float] = []

    def work(_: int) -> None:
        with gate.slot("one.example"):
            began.append(time.monotonic())

    start = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    # A thread may be late to note its time, never early: what is asked by then is bounded, gaps between notes are not.
    assert all(at - start > 0.0499 * place for place, at in enumerate(sorted(began)))


def test_slots_hold_over_processes_and_end_with_them(tmp_path: Path) -> None:
    program = (
        "import sys, time\n"
        "from pipelines.download.politeness import HostGate\n"
        "with HostGate(sys.argv[1], 1, 0.0, 5.0).slot('one.example'):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    other = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"held\n"
        gate = HostGate(str(tmp_path), 1, 0.0, 0.1)
        with pytest.raises(FetchError, match="host_busy"), gate.slot("one.example"):
            pass
        with gate.slot("two.example"):
            pass
        other.kill()
        other.wait()
        with gate.slot("one.example"):
            pass
    finally:
        other.kill()
        other.wait()
