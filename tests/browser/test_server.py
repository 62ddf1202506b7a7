"""`curate serve` in a real browser: every page, keys, forms; no error, no foreign request, nothing WCAG forbids."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from curation import audit
from tests.browser.report_runs import DEMO
from tests.browser.servers import Running, demo_copy
from tests.pipelines.synthetic_run import build
from tests.server.test_pages import EVERY_PAGE

pytestmark = pytest.mark.long

NOISE = re.compile(r"status of (404|410)|net::ERR_ABORTED")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Of the demo's run where it was made, else of a small one."""
    root = tmp_path_factory.mktemp("browser") / "run"
    if DEMO.exists():
        demo_copy(root)
    else:
        build(root, pool=60)
    found = Running(str(root))
    yield found
    found.close()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    found = Running(build(tmp_path_factory.mktemp("hostile") / "run", pool=30, hostile=True).run.root)
    yield found
    found.close()


def wrong(visit: Any) -> list[str]:
    """What went wrong, but for pictures that are not there and requests that a next page cut short."""
    return [text for text in visit.wrong if not NOISE.search(text)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_is_without_errors_requests_elsewhere_and_violations(
    server: Running, visit: Any, scheme: str
) -> None:
    looked = visit(server.url, scheme)
    for path in EVERY_PAGE:
        looked.page.goto(server.url + path, wait_until="networkidle")
        assert looked.page.locator("h1").count() == 1, path
        assert looked.violations() == [], path
    assert wrong(looked) == []


def test_menu_is_clicked_through_and_counts_are_those_of_the_api(server: Running, visit: Any) -> None:
    looked = visit(server.url)
    page = looked.page
    page.goto(server.url)
    names = page.locator(".side a").all_inner_texts()
    assert len(names) >= 12
    for number in range(len(names)):
        page.locator(".side a").nth(number).click()
        page.wait_for_load_state()
        assert page.locator(".side a[aria-current=page]").count() == 1
    page.goto(server.url)
    steps = page.request.get(server.url + "/api/run").json()["steps"]
    assert f"{sum(s['listed'] for s in steps):,}" in page.locator(".facts").inner_text()
    assert wrong(looked) == []


def table(page: Any, title: str) -> list[list[str]]:
    """The cells of the table of a section, as they are read."""
    rows = page.get_by_role("region", name=title, exact=True).locator("tbody tr").all()
    return [[" ".join(c.split()) for c in row.locator("td:not(.meter)").all_inner_texts()] for row in rows]


def test_figures_of_the_stages_are_those_of_the_tables(server: Running, visit: Any) -> None:
    run = audit.open_run(server.served.run.root)
    looked = visit(server.url)
    page = looked.page

    page.goto(server.url + "/retrieval")
    drawn = {r["seed_set"]: r["images"] for r in server.served.index.document["seed_entropy"]}
    shown = {cells[0]: cells for cells in table(page, "Seed sets")}
    if run.manifest:
        for row in audit.seed_sets(run).to_pylist():
            wanted = [f"{row[name]:,}" for name in ("nominal", "unique", "colliding", "shared")]
            assert shown[row["seed_set"]][3:7] == wanted and drawn[row["seed_set"]] == row["unique"]
    page.get_by_role("link", name=next(iter(shown)), exact=True).first.click()
    page.wait_for_url("**seed_set=*")
    assert page.locator("svg.chart .curve").count() == 1 and looked.violations() == []

    page.goto(server.url + "/clusters")
    assert page.locator("svg.map a").count() >= 4 or not run.centroids
    for cells in table(page, "Levels"):
        assert cells[1] == f"{len(audit.clusters(run, int(cells[0][0]))):,}"

    page.goto(server.url + "/balance")
    for row in audit.balance(run).to_pylist():
        if row["of"] == "pool":
            level = row["level"].removeprefix("cluster_")
            cells = table(page, f"Level {level}" + (": leaves" if level == "1" else ""))[0]
            assert cells[2:] == [f"{row['effective']:.1f}", f"{row['entropy']:.3f}", f"{row['gini']:.3f}"]

    page.goto(server.url + "/decontamination")
    hits = audit.reference_hits(run, [0.45, 0.5]).to_pylist()
    assert [cells[3] for cells in table(page, "Reference sets")] == [f"{row['images']:,}" for row in hits]
    assert page.locator(".pairs .pair").first.locator("figure").count() == 2
    assert wrong(looked) == []


def test_keys_search_walk_and_open(server: Running, visit: Any) -> None:
    looked = visit(server.url)
    page = looked.page
    page.goto(server.url + "/images")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Escape")
    page.keyboard.press("j")
    page.keyboard.press("j")
    second = page.evaluate("document.activeElement.getAttribute('href')")
    assert second == page.locator("[data-tiles] figcaption a").nth(1).get_attribute("href")
    page.keyboard.press("Enter")
    page.wait_for_url("**" + second)
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "q"
    page.keyboard.type("picture" if not DEMO.exists() else "silver gull")
    page.keyboard.press("Enter")
    page.wait_for_url("**/images?words=*")
    assert page.locator("[data-tiles] li").count() >= 1
    page.goto(server.url + "/images")
    page.keyboard.press("n")
    page.wait_for_url("**after=*")
    assert wrong(looked) == []


def test_pictures_are_drawn(server: Running, visit: Any) -> None:
    looked = visit(server.url)
    page = looked.page
    page.goto(server.url + "/image/4", wait_until="networkidle")
    assert page.evaluate("document.querySelector('.whole img').naturalWidth") > 16
    page.goto(server.url + "/images?status=ok", wait_until="networkidle")
    widths = page.evaluate("[...document.querySelectorAll('.thumb')].slice(0, 8).map((i) => i.naturalWidth)")
    assert widths and all(width > 8 for width in widths)


def test_flagged_pictures_stay_veiled_until_asked_for(hostile: Running, visit: Any) -> None:
    looked = visit(hostile.url)
    page = looked.page
    page.goto(hostile.url + "/images", wait_until="networkidle")
    veiled = page.locator(".veil .thumb").first
    assert "blur" in veiled.evaluate("(e) => getComputedStyle(e).filter")
    page.keyboard.press("u")
    assert "blur" not in veiled.evaluate("(e) => getComputedStyle(e).filter")


def test_drop_and_keep_by_the_forms(server: Running, visit: Any) -> None:
    looked = visit(server.url)
    page = looked.page
    page.goto(server.url + "/image/4")
    form = page.locator(".decide").first
    form.get_by_label("Note").fill("<b>watermark</b>")
    form.get_by_role("button", name="Drop this image").click()
    page.wait_for_url("**/decisions")
    assert "<b>watermark</b>" in page.locator("tbody tr").first.inner_text()
    page.goto(server.url + "/image/4")
    assert "Hidden" in page.locator("h1").inner_text() and looked.violations() == []
    page.get_by_role("button", name="Keep").click()
    page.wait_for_load_state()
    page.goto(server.url + "/image/4")
    assert page.locator(".whole").count() == 1
    assert wrong(looked) == []


def test_scan_streams_into_the_page(server: Running, visit: Any) -> None:
    looked = visit(server.url)
    page = looked.page
    page.goto(server.url + "/scan")
    page.get_by_role("textbox", name="Text").fill("e" if DEMO.exists() else "ture 1")
    page.get_by_role("button", name="Scan").click()
    page.get_by_text(re.compile("all rows read|stopped at")).wait_for()
    assert page.locator("[data-found] li").count() > 3 and looked.violations() == []
    assert wrong(looked) == []


def test_hostile_content_runs_nothing(hostile: Running, visit: Any) -> None:
    looked = visit(hostile.url)
    looked.page.on("dialog", lambda dialog: looked.wrong.append(f"dialog {dialog.message}"))
    for path in EVERY_PAGE:
        looked.page.goto(hostile.url + path, wait_until="networkidle")
    assert wrong(looked) == []


def test_login_takes_the_token_and_no_other(tmp_path: Path, visit: Any) -> None:
    server = Running(build(tmp_path / "run", pool=20).run.root, token="a-token-of-more-than-16")
    looked = visit(server.url)
    page = looked.page
    page.goto(server.url + "/images")
    assert page.url.endswith("/login") and looked.violations() == []
    page.get_by_label("Token").fill("wrong")
    page.get_by_role("button", name="Go on").click()
    assert "not the token" in page.locator("[role=alert]").inner_text()
    page.get_by_label("Token").fill("a-token-of-more-than-16")
    page.get_by_role("button", name="Go on").click()
    page.wait_for_url(server.url + "/")
    assert page.locator("h1").inner_text() == "Overview"
    server.close()
