"""The cost model: rates that were measured, units that follow from the algorithms."""

import json
from pathlib import Path

import pytest

from curation import nearest
from curation.duplicates.cells import CELLS_PER_ROOT
from pipelines import costs
from pipelines.hardware import CALIBRATION, KNOWN, MEASURED

DOCUMENT = json.loads((Path(__file__).parents[2] / CALIBRATION).read_text())


def units(terms: list[costs.Term]) -> dict[str, float]:
    return {term.step: term.units for term in terms}


def test_rates_of_the_plan_are_those_of_the_calibration() -> None:
    assert {name: value for name, (value, _) in MEASURED.items()} == DOCUMENT["rates_nanoseconds"] | DOCUMENT["facts"]


def test_predictions_written_down_are_those_of_the_model() -> None:
    asked = DOCUMENT["arguments"]
    for row in DOCUMENT["checks"]:
        if row["stage"] == "cluster":
            terms = costs.cluster(row["vectors"], asked["dimension"], [asked["clusters"]], asked["steps"], 256)
            assert row["predicted_cpu_seconds"] == pytest.approx(costs.seconds(terms), rel=0.01)
        assert row["within_30_percent"] == (abs(row["error"]) <= 0.3)


def test_twice_the_rows_are_four_times_the_comparisons_and_twice_the_rest() -> None:
    one, two = units(costs.join(1_000_000, 512)), units(costs.join(2_000_000, 512))
    assert two["sketches compared"] == 4 * one["sketches compared"]
    for step in ("rows stored with sketches", "recall measured", "visits opened", "pairs verified, forests"):
        assert two[step] == 2 * one[step]
    # Cells grow as the root, so that products of all rows with all cells grow as n sqrt(n).
    assert two["rows assigned, visits"] == pytest.approx(2**1.5 * one["rows assigned, visits"], rel=1e-3)


def test_cells_are_bounded_by_the_memory_of_a_worker() -> None:
    assert costs.cell_count(1_000_000, 512, 64 << 30) == round(CELLS_PER_ROOT * 1000)
    assert costs.cell_count(1_300_000_000, 512, 4 << 30) < round(CELLS_PER_ROOT * 1_300_000_000**0.5)


def test_many_centroids_are_searched_by_groups() -> None:
    assert costs.searched(nearest.FLAT) == nearest.FLAT
    assert costs.searched(100_000) < 3000


def test_resampling_and_levels_add_to_the_cost_of_clusters() -> None:
    flat = costs.seconds(costs.cluster(100_000, 64, [1000], 20, 50))
    levels = costs.seconds(costs.cluster(100_000, 64, [1000, 100], 20, 50, [0, 0]))
    again = costs.seconds(costs.cluster(100_000, 64, [1000, 100], 20, 50, [0, 10]))
    assert again - flat == pytest.approx(11 * (levels - flat))


def test_few_seeds_or_rows_are_compared_exactly_and_seeds_go_in_blocks() -> None:
    few = costs.retrieve(1_000_000, 64, 100, 0, 0)
    assert [term.units for term in few] == [100 * 1_000_000 * 64]
    block = costs.SEED_BLOCK
    once, twice = (units(costs.retrieve(1_000_000, 64, n, 0, 0)) for n in (block, block + 1))
    assert twice["sample mode: rows coded"] == 2 * once["sample mode: rows coded"]


def test_a_term_says_its_own_arithmetic() -> None:
    term = costs.Term("step", "n d", 5e9, "product")
    assert term.seconds() == pytest.approx(5 * KNOWN["product"])
    assert term.line().startswith("step: n d = 5e+09 x ") and term.line().endswith("CPU s")
