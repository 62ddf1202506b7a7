"""A real browser for pages: Debian's Chromium, driven by playwright; what it asks for stays in the pages' own place.

Used by the tests of the report (files) and of the server (loopback).
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path("/usr/bin/chromium")
LAPTOP = {"width": 1366, "height": 800}
AXE = {
    "runOnly": {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]},
    "resultTypes": ["violations"],
    "preload": False,  # it would fetch the style sheet, which the policy of the pages forbids
}


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """Chromium without a window. Without it the tests fail: what they promise has not been looked at."""
    if not CHROMIUM.exists():
        pytest.fail(
            f"{CHROMIUM} is not there: install it with `apt-get install chromium`, these tests look at real pages"
        )
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@dataclass
class Visit:
    """A page of the browser and what went wrong on it: console messages, errors, requests that left or failed."""

    page: Any
    allowed: str
    wrong: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)

    def watch(self) -> None:
        self.page.on("console", lambda message: self.wrong.append(f"console {message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("requestfailed", lambda request: self.wrong.append(f"failed: {request.url} {request.failure}"))
        self.page.on("request", self._asked)

    def _asked(self, request: Any) -> None:
        self.asked.append(request.url)
        if not request.url.startswith((self.allowed, "data:")):
            self.wrong.append(f"asked for {request.url}")

    def violations(self) -> list[str]:
        """What axe-core finds against WCAG 2.1 A and AA: rule and element."""
        from axe_playwright_python.sync_playwright import Axe

        found = Axe().run(self.page, options=AXE).response["violations"]
        return [f"{v['id']}: {node['target']} {node['html'][:120]}" for v in found for node in v["nodes"][:3]]


@pytest.fixture
def visit(browser: Any) -> Iterator[Any]:
    """visit(allowed, scheme="light", **options of the context): a Visit that is watched; closed after the test.

    allowed: what every request must begin with.
    """
    contexts = []

    def opened(allowed: str, scheme: str = "light", **options: Any) -> Visit:
        context = browser.new_context(color_scheme=scheme, **({"viewport": LAPTOP} | options))
        contexts.append(context)
        made = Visit(context.new_page(), allowed)
        made.watch()
        return made

    yield opened
    for context in contexts:
        context.close()
