"""The page of measurements: made of whatever result files there are, and nothing else."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks import page, page_tables, page_targets
from benchmarks.page_data import Results

ROOT = Path(__file__).parents[2]


def join_run(vectors: int, seconds: float) -> dict[str, Any]:
    return {
        "kind": "hard",
        "vectors": vectors,
        "cpu_seconds": seconds,
        "cpu_seconds_without_measuring": seconds / 2,
        "cpu_seconds_by_step": {"join_cells": seconds / 2, "a_new_step": seconds / 2},
        "peak_bytes": 1 << 30,
        "exact_cpu_seconds": 40 * seconds,
        "ratio_to_exact": 40.0,
        "report": {"recall": 0.995, "recall_low": 0.992, "recall_high": 0.997, "share_compared": 0.01},
    }


@pytest.fixture
def results(tmp_path: Path) -> Results:
    for vectors, seconds in ((125_000, 10.0), (1_000_000, 270.0)):
        (tmp_path / f"join-hard-{vectors}.json").write_text(json.dumps(join_run(vectors, seconds)))
    return Results(tmp_path)


def test_no_results_leave_every_section_empty(tmp_path: Path) -> None:
    made = {name: make(Results(tmp_path)) for name, make in page.SECTIONS.items()}
    targets = made.pop("targets")
    assert not any(made.values())
    assert "not measured" in targets and "yes" not in targets


def test_numbers_of_the_tables_are_those_of_the_files(results: Results) -> None:
    text = page_tables.join(results)
    assert "| hard, 125,000 | 10 | 5 | 400 | 1/40 | 0.9950 (0.9920-0.9970) | 1.00% | 1.00 |" in text
    assert "1.58 (hard)" in text  # ln 27 / ln 8
    assert "a_new_step" in page_tables.join_steps(results)


def test_targets_say_what_was_reached_and_what_was_not(results: Results) -> None:
    rows = dict(re.findall(r"(?m)^\| (.*?) \| .*? \| .*? \| (.*?) \|$", page_targets.targets(results)))
    assert rows["join, 1 M hard: exact's CPU time over ours"] == "yes"
    assert rows["join, 1 M hard: best FAISS, tuned already, over ours"] == "not measured"
    assert rows["join, 1 M easy"] == "not measured"


def test_filling_in_replaces_what_lies_between_markers_and_nothing_else() -> None:
    text = "before\n<!-- join -->\nold\n<!-- /join -->\nbetween\n<!-- add -->\n<!-- /add -->\n"
    filled = page.filled(text, {"join": "new", "add": ""})
    assert filled == (
        f"before\n<!-- join -->\nnew\n<!-- /join -->\nbetween\n<!-- add -->\n{page.MISSING}\n<!-- /add -->\n"
    )
    assert page.filled(filled, {"join": "new", "add": ""}) == filled


def test_the_page_has_a_place_for_every_section_and_plot() -> None:
    named = re.findall(r"<!-- ([\w-]+) -->", (ROOT / "docs" / "performance.md").read_text())
    assert sorted(named) == sorted([*page.SECTIONS, *page.PLOTS])
