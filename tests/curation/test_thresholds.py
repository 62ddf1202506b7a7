"""Thresholds drop what they say, for the first reason that applies, and spare what is not theirs."""

from typing import Any

import pyarrow as pa

from curation import thresholds
from curation.schemas import IMAGES
from curation.thresholds import Thresholds

ALL = Thresholds(64, 3.0, 2.0, 0.8)
NONE = Thresholds(None, None, None, None)


def table(*rows: dict[str, Any]) -> pa.Table:
    usual = {"source": "pool:a", "status": "ok", "width": 100, "height": 100, "contrast": 40.0, "nsfw": 0.1}
    schema = pa.schema([IMAGES.field(name) for name in thresholds.COLUMNS])
    return pa.Table.from_pylist([usual | row for row in rows], schema=schema)


def reasons(limits: Thresholds, *rows: dict[str, Any], exempt: tuple[str, ...] = ()) -> list[str]:
    return thresholds.reasons(table(*rows), limits, exempt).tolist()


def test_each_threshold_drops_what_is_beyond_it_and_not_what_is_at_it() -> None:
    assert reasons(ALL, {"height": 63}, {"height": 64}) == ["too_small", ""]
    assert reasons(ALL, {"width": 301}, {"width": 300}) == ["aspect_ratio", ""]
    assert reasons(ALL, {"contrast": 1.9}, {"contrast": 2.0}) == ["solid_colour", ""]
    assert reasons(ALL, {"nsfw": 0.9}, {"nsfw": 0.7}) == ["nsfw", ""]


def test_the_first_reason_counts() -> None:
    assert reasons(ALL, {"width": 10, "height": 1, "contrast": 0.0, "nsfw": 1.0}) == ["too_small"]


def test_a_threshold_that_is_none_drops_nothing() -> None:
    assert reasons(NONE, {"width": 10, "height": 1, "contrast": 0.0, "nsfw": 1.0}) == [""]


def test_a_score_that_was_not_computed_drops_nothing() -> None:
    assert reasons(ALL, {"nsfw": None, "contrast": None}) == [""]


def test_references_exempt_sources_and_rows_without_an_image_pass() -> None:
    bad = {"contrast": 0.0}
    found = reasons(
        ALL, bad, bad | {"source": "seed:b"}, bad | {"source": "seed:c"}, bad | {"source": "reference:d"},
        bad | {"status": "failed"}, exempt=("seed:c",)
    )  # fmt: skip
    assert found == ["solid_colour", "solid_colour", "", "", ""]


def test_an_empty_part_has_no_reasons() -> None:
    assert reasons(ALL) == []
