"""`make test-full`: every test, the long families included, as one figure file.

Writes benchmarks/results/test-full.json: per family (test folder) tests, failures, skips and seconds.
"""

import json
import platform
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

RESULT = Path(__file__).parent / "results" / "test-full.json"


def main() -> int:
    """Run pytest on everything and write the figures. Returns pytest's exit code."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        began = time.time()
        code = subprocess.run([sys.executable, "-m", "pytest", f"--junitxml={report}"], check=False).returncode
        seconds = time.time() - began
        cases = list(ElementTree.parse(report).iter("testcase"))
    families: dict[str, dict[str, float]] = defaultdict(lambda: {"tests": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
    for case in cases:
        family = families[case.get("classname", "").removeprefix("tests.").split(".")[0]]
        family["tests"] += 1
        family["failed"] += case.find("failure") is not None or case.find("error") is not None
        family["skipped"] += case.find("skipped") is not None
        family["seconds"] = round(family["seconds"] + float(case.get("time", 0)), 3)
    document = {
        "command": "make test-full",
        "exit_code": code,
        "seconds": round(seconds, 1),
        "machine": {"platform": platform.platform(), "python": platform.python_version()},
        "families": dict(sorted(families.items())),
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    return code


if __name__ == "__main__":
    raise SystemExit(main())
