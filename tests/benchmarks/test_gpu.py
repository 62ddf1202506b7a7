"""`make gpu` keeps what it has found, whatever becomes of a part of it; no GPU is needed to show that."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import carry_out


def broken(torch: Any, document: dict[str, Any], median_seconds: Any) -> None:
    document["broken"] = [2 * document["ceilings"]["bytes_per_s"]]
    document["failures"].append("something differs")
    raise RuntimeError("no such kernel")


def dying(torch: Any, document: dict[str, Any], median_seconds: Any) -> None:
    document["dying"] = ["a figure"]
    time.sleep(1.6)
    os.abort()


def hanging(torch: Any, document: dict[str, Any], median_seconds: Any) -> None:
    document["hanging"] = ["a figure"]
    time.sleep(600)


def test_a_part_that_fails_dies_or_hangs_leaves_what_it_had() -> None:
    document: dict[str, Any] = {"ceilings": {"bytes_per_s": 3.0}, "failures": []}
    carry_out("broken", broken, document, 60)
    carry_out("dying", dying, document, 60)
    # A process begins more slowly where much else runs: so long as it took the last one, and as much again.
    limit_s = 2 * document["seconds_of_parts"]["dying"] + 2
    carry_out("hanging", hanging, document, limit_s)
    assert document["seconds_of_parts"]["hanging"] < limit_s + 10
    assert document["broken"] == [6.0]
    assert document["dying"] == document["hanging"] == ["a figure"]
    differs, failed, died, hung = document["failures"]
    assert differs == "something differs" and failed == "broken: failed: RuntimeError: no such kernel"
    assert died.startswith("dying: ended after") and hung.startswith("hanging: ended after")


def test_torch_and_numpy_are_all_it_imports() -> None:
    """A machine with a GPU to measure on may have nothing else; Triton comes with torch there."""
    script = """
import importlib, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in "PIL cv2 faiss jaxtyping numba pandas pyarrow pydantic ray safetensors scipy".split():
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
for name in ("benchmarks.gpu", "training.parallel", "training.step", "training.finishing", "training.losses.choice",
             "training.schedules", "training.flops", "training.kernels.choice", "training.optimizer",
             "training.kernels.attention", "training.kernels.branch", "training.kernels.augmentation"):
    importlib.import_module(name)
"""
    told = subprocess.run(
        [sys.executable, "-c", script], check=False, cwd=Path(__file__).parents[2], capture_output=True, text=True
    )
    assert told.returncode == 0, told.stderr[-2000:]
