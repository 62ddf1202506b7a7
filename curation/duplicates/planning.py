"""The plan of a join through cells: train them, choose the rule on one sample, measure its recall on another."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from curation.duplicates import recall as recalls
from curation.duplicates.cells import CELLS_PER_ROOT, TRAINING_PER_CELL, Cells, train
from curation.duplicates.members import Members
from curation.duplicates.scratch import Scratch
from curation.duplicates.stored import Sampled, draw, rows_name, store_piece
from curation.duplicates.tasks import JoinOptions, Spread
from curation.duplicates.truth import Truth
from curation.errors import UserError

MEETING = 2048
"""Sampled rows whose meetings tell what a rule costs; an eighth of them meet all."""
PRODUCT_NANOSECONDS = 1 / 30
"""Of a multiply-add in float32 products of everything; what a plan is compared with."""
MEASURED_ROWS = 50_000
"""Old rows, drawn from all, that new ones are compared with at least to measure recall where only those are joined."""
COPIES_PER_IMAGE = 4096
"""More true pairs than so many per image are no copies: the vectors or the threshold are wrong."""


@dataclass(frozen=True)
class Plan:
    """Cells with their rule, and the sample that recall is measured on."""

    cells: Cells
    pairs: np.ndarray
    """(p,) SAMPLE_PAIR of the measuring queries."""
    queries: int
    share: float
    """Of all rows, those that a vector is compared with."""
    visits: float
    attempts: int


def find_plan(
    members: Members, ids: np.ndarray, options: JoinOptions, scratch: Scratch, spread: Spread, cells: Cells | None
) -> Plan | None:
    """Store the rows, train cells, choose the rule, measure its recall; None where exact products cost less.

    Read back from scratch where an interrupted join has done so. Raises UserError where nearly everything is above
    the threshold.
    """
    share = _measured(members) if cells is not None else 1.0
    calls = [
        (
            rows_name(number),
            (scratch, rows_name(number), piece, members.dimension, 1.0 if piece.fresh else share, options.seed),
        )
        for number, piece in enumerate(members.pieces)
        if not scratch.has(rows_name(number))
    ]
    for _ in spread(store_piece, calls):
        pass
    if not scratch.has("plan"):
        search = Truth(members, options, scratch, spread, share)
        scratch.put("plan", _make_plan(members, ids, search, cells))
    numbers = np.array(scratch.get("plan", "numbers")).tolist()
    if not numbers:
        return None
    chosen = Cells.from_bytes(np.array(scratch.get("plan", "cells")).tobytes())
    return Plan(
        chosen, np.array(scratch.get("plan", "pairs")), int(numbers[0]), numbers[1], numbers[2], int(numbers[3])
    )


def _measured(members: Members) -> float:
    """The share of old rows that new ones are compared with to measure recall.

    To compare a few new rows with all old ones would cost more than to join them.
    """
    return min(1.0, max(MEASURED_ROWS, 2 * members.fresh_rows) / max(1, members.rows - members.fresh_rows))


def _make_plan(members: Members, ids: np.ndarray, search: Truth, given: Cells | None) -> dict[str, np.ndarray]:
    options, scratch, spread = search.options, search.scratch, search.spread
    every = list(range(len(members.pieces)))
    fresh = [number for number in every if members.pieces[number].fresh]
    cells = given if given is not None else _train(members, ids, options, scratch, spread)
    asked = draw(
        scratch, ids, fresh, recalls.CHOICE_QUERIES + recalls.MOST_QUERIES, options.seed, f"{options.purpose} recall"
    )
    # A few first: where nearly everything is a copy, not even a sample can be compared.
    chooses = min(recalls.CHOICE_QUERIES, len(asked.node) // 2) if given is None else min(128, len(asked.node) // 2)
    choice = search.pairs(asked.part(0, min(128, chooses)), cells)
    _refuse_dense(choice, min(128, chooses), members, options)
    choice = np.concatenate([choice, search.pairs(asked.part(min(128, chooses), chooses), cells)])
    with_copies = len(np.unique(choice["query"][choice["similarity"] > np.float32(options.target)])) / max(1, chooses)
    # Cells that were chosen before are only measured again: that costs more than joining a few new images.
    wanted = 0.0 if given is not None else recalls.QUERIES_WITH_COPIES / max(with_copies, 1e-3) * 1.05
    measures = min(max(recalls.MEASURE_QUERIES, math.ceil(wanted)), recalls.MOST_QUERIES, len(asked.node) - chooses)
    measure = search.pairs(asked.part(chooses, chooses + measures), cells)
    sample = draw(scratch, ids, every, MEETING, options.seed, f"{options.purpose} background").vectors(scratch)
    few = len(sample) // 8
    attempts = 1
    if given is None:
        background = recalls.Background.of(cells, sample[:few], sample[few:])
        if np.count_nonzero(choice["similarity"] > np.float32(options.target)) < recalls.LEAST_PAIRS:
            choice = np.concatenate([choice, recalls.imagined(sample[:few], options.target, cells)])
        chosen, attempts = _choose(choice, measure, (chooses, measures), background, options)
        # The exact join compares equal vectors as well, this one does not.
        different = sum(len(scratch.get(rows_name(number), "nodes")) for number in every) / members.rows
        exact = members.dimension * PRODUCT_NANOSECONDS / 2
        if chosen is None or chosen.share * chosen.nanoseconds * different**2 > exact:
            return {"numbers": np.empty(0)}
        cells = cells.with_rule(chosen.rule)
    share, visits = recalls.visits(cells, sample[:few], sample[few:])
    return {
        "cells": np.frombuffer(cells.to_bytes(), np.uint8),
        "pairs": measure,
        "numbers": np.array([measures, share, visits, attempts], np.float64),
    }


def _train(members: Members, ids: np.ndarray, options: JoinOptions, scratch: Scratch, spread: Spread) -> Cells:
    every = range(len(members.pieces))
    room = options.memory_bytes // 4 // (6 * members.dimension)
    rows = sum(len(scratch.get(rows_name(number), "nodes")) for number in every)
    count = int(min(max(16, round(CELLS_PER_ROOT * math.sqrt(rows))), rows, max(16, room // 8)))
    sample = draw(scratch, ids, every, min(count * TRAINING_PER_CELL, room), options.seed, f"{options.purpose} cells")
    ((_, cells),) = spread(train_cells, [("cells", (scratch, sample, count, options.seed, options.target))])
    assert isinstance(cells, Cells)
    return cells


def train_cells(scratch: Scratch, sample: Sampled, count: int, seed: int, threshold: float, _: Any) -> Cells:
    """`cells.train` on sampled rows."""
    return train(count, seed, sample.vectors(scratch), threshold)


def _choose(
    choice: np.ndarray,
    measure: np.ndarray,
    queries: tuple[int, int],
    background: recalls.Background,
    options: JoinOptions,
) -> tuple[recalls.Choice | None, int]:
    """The cheapest rule whose measured recall reaches what is asked with the lower end of its interval."""
    aim = options.recall + recalls.margin(choice, options.target, options.recall, background, queries)
    chosen = recalls.choose(choice, options.target, aim, background)
    for attempt in range(1, recalls.ATTEMPTS + 1):
        if chosen is None:
            return None, attempt
        result = recalls.measured(measure, recalls.nominated(measure, chosen.rule), options.target, queries[1])
        if result["low"] >= options.recall or result["recall"] == 1.0 or attempt == recalls.ATTEMPTS:
            return chosen, attempt
        if attempt < recalls.LEARNING_ATTEMPTS:
            aim = min((1 + aim) / 2, aim + 1.3 * (options.recall - result["low"]))
            chosen = recalls.choose(choice, options.target, aim, background)
        else:
            # The sample has no more to teach: few copies, or all of them found.
            chosen = recalls.widened(chosen, background)
    return chosen, recalls.ATTEMPTS


def _refuse_dense(pairs: np.ndarray, queries: int, members: Members, options: JoinOptions) -> None:
    # Equal vectors are one node and cost nothing: their sketches do not differ at all.
    per_image = float(pairs["weight"][(pairs["distance"] > 0).any(axis=1)].sum()) / max(1, queries)
    if per_image > COPIES_PER_IMAGE and per_image > members.rows / 100:
        raise UserError(
            f"an image has {per_image:,.0f} others above cosine {options.threshold} on average, of {members.rows:,}: "
            "these vectors do not tell images apart at this threshold; raise it, or embed with a copy-detection model",
            exit_code=1,
        )
