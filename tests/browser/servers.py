"""Servers to look at, in a thread of this process; of the demo's run where it was made."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from pipelines.server.application import application
from pipelines.server.served import Settings
from tests.browser.report_runs import DEMO


class Running:
    """A server in a thread, on a port of its own."""

    def __init__(self, root: str, **settings: Any) -> None:
        self.guard = application(root, Settings(author="browser", **settings))
        self.served = self.guard.app.state.served
        self.served.wait()
        self.server = uvicorn.Server(uvicorn.Config(self.guard, host="127.0.0.1", port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.05)
        self.url = f"http://127.0.0.1:{self.server.servers[0].sockets[0].getsockname()[1]}"

    def close(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        self.served.close()


def demo_copy(root: Path) -> Path:
    """The demo's run, copied: its server writes an index and decisions."""
    shutil.copytree(DEMO, root, ignore=shutil.ignore_patterns("report", ".index", "decisions", ".lock"))
    return root
