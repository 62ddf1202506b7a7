"""Takes the pictures of the report that the documentation shows, of the demo's run.

    python -m tests.browser.screenshots

Writes docs/report.png and docs/screenshots/report-*.png, each below LIMIT bytes.
"""

import io
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import sync_playwright

from tests.browser.conftest import CHROMIUM
from tests.browser.report_runs import DEMO, ROOT, demo

LIMIT = 300_000
SIZE = {"width": 1240, "height": 900}
SHOTS = {
    "docs/report.png": ("index", "light", None),
    "docs/screenshots/report-duplicates.png": ("duplicates", "light", "#pairs"),
    "docs/screenshots/report-clusters.png": ("clusters", "dark", None),
    "docs/screenshots/report-retrieval.png": ("retrieval-01", "light", None),
    "docs/screenshots/report-filters.png": ("filters", "dark", None),
}
"""By file: the page, the colours, and what it begins with (its top for None)."""


def main() -> None:
    """Make a report of the demo's run in a temporary folder and look at it."""
    if not DEMO.exists():
        raise SystemExit(f"{DEMO} is not there: `make demo` makes it")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        report = demo(Path(folder) / "run") / "report"
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        for name, (page, scheme, element) in SHOTS.items():
            view = browser.new_context(viewport=SIZE, color_scheme=scheme).new_page()
            view.goto((report / f"{page}.html").as_uri(), wait_until="load")
            if element:
                view.locator(element).evaluate(
                    "found => window.scrollTo({top: found.offsetTop - 20, behavior: 'instant'})"
                )
            view.wait_for_timeout(400)
            data = small(view.screenshot())
            (ROOT / name).parent.mkdir(exist_ok=True)
            (ROOT / name).write_bytes(data)
            print(f"{name}: {len(data):,} bytes")
        browser.close()


def small(screenshot: bytes) -> bytes:
    """The same picture below LIMIT: as it is, else with as many colours as fit."""
    image: Any = Image.open(io.BytesIO(screenshot)).convert("RGB")
    for colours in (None, 256, 128, 64, 32):
        sink = io.BytesIO()
        shown = image if colours is None else image.quantize(colours, dither=Image.Dither.NONE)
        shown.save(sink, "PNG", optimize=True)
        if sink.tell() < LIMIT:
            return sink.getvalue()
    raise SystemExit("a picture does not fit its limit")


if __name__ == "__main__":
    main()
