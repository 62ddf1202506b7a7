"""The report as a reader meets it: opened from disk in Chromium, clicked through, by mouse and by keyboard."""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from curation.audit.run_tables import RunTables, open_run
from tests.browser import report_runs

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=["small", "hostile", "demo"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp(request.param) / "run"
    if request.param == "demo":
        if not report_runs.DEMO.exists():
            pytest.skip("no demo-run here: `make demo` makes it")
        yield report_runs.demo(folder)
    else:
        yield report_runs.small(folder, pool=80, hostile=request.param == "hostile")


def place(run: Path) -> str:
    return (run / "report").as_uri() + "/"


def texts(page: Any, selector: str) -> list[str]:
    return [" ".join(text.split()) for text in page.locator(selector).all_inner_texts()]


def table(page: Any, section: str) -> list[list[str]]:
    """The cells of the first table of a section, as they are read."""
    rows = page.locator(f"#{section} table").first.locator("tbody tr")
    return [[" ".join(c.split()) for c in row.locator("th, td").all_inner_texts()] for row in rows.all()]


def number(text: str) -> int:
    return int(text.replace(",", ""))


def rows_of(paths: Any, columns: list[str]) -> list[dict[str, Any]]:
    return pq.read_table(list(paths), columns=columns).to_pylist()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_reached_by_clicks_and_none_has_a_fault(run: Path, visit: Any, scheme: str) -> None:
    seen = visit(place(run), scheme)
    page = seen.page
    page.goto(place(run) + "index.html")
    grounds = set()
    done: list[str] = []

    def look() -> None:
        page.wait_for_load_state("load")  # with its style sheet
        done.append(page.url.split("#")[0].rsplit("/", 1)[1])
        assert page.locator("h1").count() == 1
        grounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        assert not seen.violations(), page.url

    for entry in range(page.locator("nav.side a").count()):
        page.locator("nav.side a").nth(entry).click()
        look()
        cards = page.locator("main .cards a")
        for card in range(cards.count()):
            cards.nth(card).click()
            look()
            page.go_back()
    assert sorted(done) == sorted(p.name for p in (run / "report").glob("*.html"))
    assert not seen.wrong
    assert grounds == {"rgb(245, 246, 247)" if scheme == "light" else "rgb(17, 20, 23)"}


def test_thumbnails_are_drawn_and_come_from_the_folder(run: Path, visit: Any) -> None:
    seen = visit(place(run))
    seen.page.goto(place(run) + "duplicates.html", wait_until="load")
    seen.page.wait_for_timeout(200)
    sheets = [url for url in seen.asked if url.endswith(".webp")]
    assert sheets and not seen.wrong
    thumb = seen.page.locator(".frame:not(.veil) svg.thumb").first
    thumb.scroll_into_view_if_needed()
    from io import BytesIO

    from PIL import Image

    drawn = Image.open(BytesIO(thumb.screenshot())).convert("RGB")
    assert len(drawn.getcolors(1 << 20) or range(99)) > 20


def test_what_is_shown_is_what_the_tables_hold(run: Path, visit: Any) -> None:
    tables: RunTables = open_run(str(run))
    page = visit(place(run)).page
    images = rows_of(tables.images, ["image_id", "source", "status", "error"])
    card = json.loads(Path(tables.card).read_text())

    page.goto(place(run) + "index.html")
    facts = dict(zip(texts(page, ".facts dt"), texts(page, ".facts dd"), strict=True))
    pool = [row for row in images if row["source"].startswith("pool:")]
    assert number(facts["Pool images listed"].split()[0]) == len(pool)
    assert number(facts["In the manifest"].split()[0]) == card["manifest"]["rows"]
    usable = Counter(row["source"] for row in images if row["status"] == "ok")
    shown = {row[0]: number(row[3]) for row in table(page, "sources")}
    assert len(shown) == 4 + (run.parent.name.startswith("demo"))
    assert all(count == usable[name] for name, count in shown.items() if name in usable)

    page.goto(place(run) + "failures.html")
    lost = Counter(
        (r["status"], (r["error"] or "").split(":")[0].strip()) for r in images if r["status"] not in ("ok", "dropped")
    )
    by_reason: Counter[tuple[str, str]] = Counter()
    for status, reason, _, count, *_ in table(page, "reasons"):
        by_reason[status, reason.replace("–", "")] += number(count)
    assert by_reason == lost

    page.goto(place(run) + "filters.html")
    dropped = sum(row["status"] == "dropped" for row in images)
    assert texts(page, ".lead")[0].startswith(f"{dropped:,} image")

    page.goto(place(run) + "duplicates.html")
    duplicates = rows_of(tables.duplicates, ["component_id", "kept", "reason"])
    outcomes = Counter(r["kept"] for r in duplicates)
    found = Counter[bool]()
    for outcome, _, count, *_ in table(page, "outcome"):
        found[outcome == "kept"] += number(count)
    assert found == outcomes
    sizes = Counter(r["component_id"] for r in duplicates)
    for component, count, *_ in table(page, "components"):
        assert sizes[int(component)] == number(count)

    page.goto(place(run) + "clusters.html")
    clusters = rows_of(tables.clusters, ["cluster_1", "cluster_2"])
    levels = {row[0].split()[0]: number(row[1]) for row in table(page, "levels")}
    assert levels == {str(k): len({r[f"cluster_{k}"] for r in clusters}) for k in (1, 2)}
    page.locator("#list summary").click()
    inside = Counter(r["cluster_2"] for r in clusters)
    assert {int(r[0]): number(r[1]) for r in table(page, "list")} == dict(inside)

    page.goto(place(run) + "retrieval.html")
    drawn = Counter(r["seed_set"] for r in rows_of(tables.retrieval, ["seed_set"]))
    assert sorted(number(row[4]) for row in table(page, "seed-sets")) == sorted(drawn.values())

    page.goto(place(run) + "balance.html")
    taken = Counter(r["image_id"] >> 40 for r in rows_of(tables.balance, ["image_id"]))
    assert texts(page, ".lead")[0].startswith(f"{sum(taken.values()):,} images were sampled")
    assert number(table(page, "sources")[0][3]) == taken[0]


def test_the_keyboard_is_enough(run: Path, visit: Any) -> None:
    page = visit(place(run)).page
    page.goto(place(run) + "index.html")

    def focused(what: str) -> str:
        return str(page.evaluate(f"document.activeElement.{what} ?? ''"))

    page.keyboard.press("Tab")
    assert focused("className") == "skip"
    page.keyboard.press("Enter")
    assert focused("id") == "main"
    page.goto(place(run) + "index.html")
    for _ in range(30):
        page.keyboard.press("Tab")
        if focused("textContent").startswith("Filters"):
            break
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"  # one sees where one is
    page.keyboard.press("Enter")
    page.wait_for_url("**/filters.html")

    blur = "getComputedStyle(document.querySelector('.veil .thumb')).filter"
    assert "blur" in page.evaluate(blur)
    page.locator("#unveil").focus()
    page.keyboard.press("Space")
    assert page.evaluate(blur) == "none"
    page.keyboard.press("Space")
    page.locator(".veil input").first.focus()
    page.keyboard.press("Space")
    assert page.evaluate(blur) == "none"
    assert "blur" in page.evaluate("getComputedStyle(document.querySelectorAll('.veil .thumb')[1]).filter")

    page.goto(place(run) + "index.html")
    page.locator("#flow summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#flow table").first.is_visible()

    page.goto(place(run) + "clusters.html")
    if page.locator("svg.map a").count():
        page.locator("svg.map a .ring").first.click()
        page.wait_for_url("**/cluster-*")
        page.go_back()
        page.locator("svg.map a").first.focus()
        page.keyboard.press("Enter")
        page.wait_for_url("**/cluster-*")
        page.locator(".crumbs a").first.press("Enter")
        page.wait_for_url("**/clusters.html")
    page.locator("a[rel=next]").press("Enter")
    assert not page.url.endswith("/clusters.html")


@pytest.mark.parametrize("width", [1280, 700, 390])
def test_no_page_is_wider_than_the_screen(run: Path, visit: Any, width: int) -> None:
    page = visit(place(run), viewport={"width": width, "height": 800}).page
    for path in sorted((run / "report").glob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= width, path.name


def test_hostile_words_are_read_as_words(tmp_path: Path, visit: Any) -> None:
    run = report_runs.small(tmp_path / "run", pool=20, hostile=True)
    seen = visit(place(run))
    for path in sorted((run / "report").glob("*.html")):
        seen.page.goto(path.as_uri())
        assert seen.page.evaluate("document.scripts.length") == 0
        assert not seen.page.evaluate(
            "[...document.querySelectorAll('main a')].filter(a => a.protocol == 'javascript:').length"
        )
    seen.page.goto(place(run) + "retrieval-01.html")
    assert seen.page.locator("h1").inner_text() in ("Seed set <script>alert(1)</script>", "Seed set animals")
    seen.page.goto(place(run) + "retrieval.html")
    assert "<script>alert(1)</script>" in seen.page.locator("main").inner_text()
    assert not seen.wrong


def test_a_report_in_a_bucket_is_the_same_one(tmp_path: Path, visit: Any) -> None:
    """A bucket is a web server of files: relative links and the policy must hold there too."""
    import functools
    import http.server
    import threading

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Tests print nothing."""

        def do_GET(self) -> None:
            if self.path == "/favicon.ico":  # browsers ask for it at the top of a server
                self.send_response(204)
                self.end_headers()
            else:
                super().do_GET()

    run = report_runs.small(tmp_path / "run", pool=20)
    handler = functools.partial(Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{server.server_port}/run/report/"
        seen = visit(base)
        for path in sorted((run / "report").glob("*.html")):
            seen.page.goto(base + path.name)
            assert seen.page.evaluate("getComputedStyle(document.querySelector('.page')).display") == "grid"
        assert [url for url in seen.asked if url.endswith(".webp")]
        assert [w for w in seen.wrong if "favicon" not in w] == []
        server.shutdown()
