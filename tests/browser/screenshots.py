"""Takes the pictures of the report and of the server that the documentation shows, of the demo's run.

    python -m tests.browser.screenshots

Writes docs/report.png, docs/screenshots/report-*.png and server-*.png, each below LIMIT bytes.
"""

import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.browser.conftest import CHROMIUM
from tests.browser.report_runs import DEMO, ROOT, demo
from tests.browser.servers import Running, demo_copy

LIMIT = 130_000
SIZE = {"width": 1240, "height": 900}
REPORT = {
    "docs/report.png": ("index", "light", None),
    "docs/screenshots/report-duplicates.png": ("duplicates", "light", "#pairs"),
    "docs/screenshots/report-clusters.png": ("clusters", "dark", None),
    "docs/screenshots/report-retrieval.png": ("retrieval-01", "light", None),
    "docs/screenshots/report-filters.png": ("filters", "dark", None),
}
"""By file: the page, the colours, and what it begins with (its top for None)."""
SERVER = {
    "docs/screenshots/server-overview.png": ("/", "light", None),
    "docs/screenshots/server-clusters.png": ("/clusters", "light", None),
    "docs/screenshots/server-component.png": ("/component/67", "light", None),
    "docs/screenshots/server-decontamination.png": ("/decontamination", "light", "section:has(.pairs)"),
}


def main() -> None:
    """Make a report of the demo's run and a server of it, in a temporary folder, and look at both."""
    if not DEMO.exists():
        raise SystemExit(f"{DEMO} is not there: `make demo` makes it")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        report = demo(Path(folder) / "report") / "report"
        for name, (page, scheme, element) in REPORT.items():
            take(browser, name, (report / f"{page}.html").as_uri(), scheme, element)
        server = Running(str(demo_copy(Path(folder) / "demo")))
        for name, (page, scheme, element) in SERVER.items():
            take(browser, name, server.url + page, scheme, element)
        server.close()
        browser.close()


def take(browser: Any, name: str, address: str, scheme: str, element: str | None) -> None:
    """One picture, when all that it shows has been loaded."""
    view = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()
    view.goto(address, wait_until="networkidle")
    if element:
        script = "found => window.scrollTo({top: found.offsetTop - 20, behavior: 'instant'})"
        view.locator(element).first.evaluate(script)
        view.wait_for_load_state("networkidle")
    view.wait_for_timeout(2000)
    data = small(view.screenshot())
    (ROOT / name).parent.mkdir(exist_ok=True)
    (ROOT / name).write_bytes(data)
    print(f"{name}: {len(data):,} bytes")
    view.context.close()


def small(screenshot: bytes) -> bytes:
    """The same picture below LIMIT: as it is, else with as many colours as fit."""
    image: Any = Image.open(io.BytesIO(screenshot)).convert("RGB")
    for colours in (None, 256, 192, 128, 96, 64, 48, 32):
        sink = io.BytesIO()
        shown = image if colours is None else image.quantize(colours, dither=Image.Dither.NONE)
        shown.save(sink, "PNG", optimize=True)
        if sink.tell() < LIMIT:
            return sink.getvalue()
    raise SystemExit("a picture does not fit its limit")


if __name__ == "__main__":
    main()
