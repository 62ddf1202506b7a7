"""Which rule reaches the recall asked for at the least cost, and what recall it has.

Sampled queries are compared with everything: not cell by cell, but by sketches with so wide a cut that a true pair is
passed over less than once in a hundred thousand, and the definition of similarity decides. For each pair found so it is
known at which reach of the visits and at which cuts of the sketches the join nominates it. One sample chooses the rule,
another measures it; intervals are bootstraps over queries, whose pairs are found and missed together.
"""

import itertools
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import numpy as np

from curation import sketch
from curation.duplicates.cells import EXPONENTS, LEFT_OUT, SKETCH_WORDS, Cells, Rule
from curation.order import generator

CHOICE_QUERIES = 2048
MEASURE_QUERIES = 2048
QUERIES_WITH_COPIES = 2048
MOST_QUERIES = 8192
"""Queries measured with at most, while fewer than QUERIES_WITH_COPIES of them have a copy."""
PAIRS_PER_QUERY = 64
"""Kept of one query in one tile of a piece, by node hash; the others count through the weight of those."""
TRUTH_DEVIATIONS = 4.0
RESAMPLES = 1000
LEAST_PAIRS = 100
"""To choose a rule on; with fewer, imagined ones join them."""
ATTEMPTS = 10
LEARNING_ATTEMPTS = 5
NANOSECONDS = {2: 1.2, 3: 1.6, 4: 1.8}
"""Of a pair of sketches by the words that are compared first: measured, one core with AVX2."""
NANOSECONDS_PASSED = np.array([12.0, 700.0])
"""Further ones of a pair that is near in its first words, in all."""
FIRST_WORDS = (2, 3, 4)
LOSSES = (0.05, 0.15, 0.3, 0.5)
"""Shares of the permitted loss that the sketches may take,"""
FIRST_LOSSES = (0.3, 0.7)
"""and of that the first words."""

SAMPLE_PAIR = np.dtype(
    [
        ("query", "<u4"),
        ("node", "<u4"),
        ("similarity", "<f4"),
        ("weight", "<f4"),
        ("gap", "<f4", (len(EXPONENTS),)),
        ("first", "<u2", (len(LEFT_OUT), sketch.LONGEST_FIRST)),
        ("distance", "<u2", (len(LEFT_OUT),)),
    ]
)
"""A true pair: the query's node, the other's, how many pairs it stands for, the reach at which it is compared for each
of EXPONENTS, and for each of LEFT_OUT the distance of the sketches in 1, 2, … words and in all of them."""


@dataclass(frozen=True)
class Recall:
    """A measured recall with its 95 % interval."""

    threshold: float
    recall: float
    low: float
    high: float
    pairs: int
    queries: int
    queries_with_pairs: int


@dataclass(frozen=True)
class Background:
    """A sample of vectors that meet in cells: what a rule costs.

    Of all pairs of q with r others: gaps (len(EXPONENTS), q r) float32, the reach at which they meet, ascending, and
    pairs, which ones; first (len(LEFT_OUT), LONGEST_FIRST, q r) and distance (len(LEFT_OUT), q r) uint16 of their
    sketches.
    """

    gaps: np.ndarray
    pairs: np.ndarray
    first: np.ndarray
    distance: np.ndarray

    @classmethod
    def of(cls, cells: Cells, vectors: np.ndarray, homes_of: np.ndarray) -> "Background":
        """vectors: (q, d), homes_of: (r, d) stored vectors of two random samples."""
        scores = np.concatenate([block for _, block in cells.scores(vectors)])
        first = np.zeros((len(LEFT_OUT), sketch.LONGEST_FIRST, len(vectors), len(homes_of)), np.uint16)
        total = np.zeros((len(LEFT_OUT), len(vectors), len(homes_of)), np.uint16)
        for law, left_out in enumerate(LEFT_OUT):
            one, other = cells.sketches(vectors, left_out), cells.sketches(homes_of, left_out)
            for word in range(one.shape[1]):
                total[law] += np.bitwise_count(one[:, None, word] ^ other[None, :, word])
                if word < sketch.LONGEST_FIRST:
                    first[law, word] = total[law]
        homes = cells.homes(homes_of)
        best, there = scores.max(axis=1, keepdims=True), scores[:, homes]
        gaps = np.stack([best - (there - cells.handicap(exponent)[homes]) for exponent in EXPONENTS])
        gaps[:, there == best] = -1
        gaps = gaps.reshape(len(gaps), -1)
        order = np.argsort(gaps, axis=1, kind="stable")
        gaps = np.take_along_axis(gaps, order, axis=1)
        flat, whole = first.reshape(*first.shape[:2], -1), total.reshape(len(total), -1)
        return cls(gaps, order, flat, whole)


def visits(cells: Cells, vectors: np.ndarray, homes_of: np.ndarray) -> tuple[float, float]:
    """(share of all rows that a vector is compared with, cells it goes to) on average, by the rule of the cells.

    vectors: (q, d), homes_of: (r, d) stored vectors of two random samples.
    """
    rule = cells.rule
    assert rule is not None
    shares, handicap = _shares(cells, cells.homes(homes_of)), cells.handicap(rule.exponent)
    compared = visited = 0.0
    for _, scores in cells.scores(vectors):
        best = scores.max(axis=1, keepdims=True)
        mask = (scores - handicap >= best - np.float32(rule.reach)) | (scores == best)
        compared, visited = compared + float((mask @ shares).sum()), visited + float(mask.sum())
    return compared / max(1, len(vectors)), visited / max(1, len(vectors))


def _shares(cells: Cells, homes: np.ndarray) -> np.ndarray:
    """(c,) of all rows by home, from a sample's homes (r,)."""
    members = np.bincount(homes, minlength=len(cells)) + cells.sizes * len(homes)
    return np.asarray(members / members.sum())


@dataclass(frozen=True)
class Choice:
    """A rule and what it is expected to cost: the share of all pairs compared, nanoseconds per compared pair."""

    rule: Rule
    share: float
    nanoseconds: float


def described(
    pairs: np.ndarray, left: np.ndarray, right: np.ndarray, rows: np.ndarray, columns: np.ndarray, cells: Cells
) -> np.ndarray:
    """`pairs` (p,) SAMPLE_PAIR of left[rows] and right[columns] with `gap`, `first` and `distance` filled in.

    left, right: (n, d) vectors. rows, columns: (p,). Where the cells have a rule, only its sketches are compared.
    """
    rows_used, at_row = np.unique(rows, return_inverse=True)
    columns_used, at_column = np.unique(columns, return_inverse=True)
    for law, left_out in enumerate(LEFT_OUT):
        if cells.rule is not None and left_out != cells.rule.left_out:
            continue
        one = cells.sketches(left[rows_used], left_out)[at_row]
        other = cells.sketches(right[columns_used], left_out)[at_column]
        for word in range(sketch.LONGEST_FIRST):
            pairs["first"][:, law, word] = sketch.distances(one, other, word + 1)
        pairs["distance"][:, law] = sketch.distances(one, other, SKETCH_WORDS)
    pairs["gap"] = cells.gaps(left[rows], right[columns])
    return pairs


def imagined(vectors: np.ndarray, cosine: float, cells: Cells) -> np.ndarray:
    """(n,) SAMPLE_PAIR of (n, d) sampled vectors and, of each, a copy at `cosine` in a random direction.

    What a rule is chosen on where the sample holds next to no copies.
    """
    wide = vectors.astype(np.float32)
    away = generator(0, "imagined copies").standard_normal(wide.shape, dtype=np.float32)
    away -= np.einsum("nd,nd->n", away, wide)[:, None] * wide
    away /= np.linalg.norm(away, axis=1, keepdims=True)
    pairs = np.zeros(len(wide), SAMPLE_PAIR)
    pairs["query"], pairs["weight"] = np.arange(len(wide)), 1
    pairs["similarity"] = np.nextafter(np.float32(cosine), np.float32(2))
    copies = np.float32(cosine) * wide + np.float32(np.sqrt(1 - cosine**2)) * away
    return described(pairs, wide, copies, np.arange(len(wide)), np.arange(len(wide)), cells)


def choose(pairs: np.ndarray, threshold: float, recall: float, background: Background) -> Choice | None:
    """The cheapest rule that finds `recall` of the sampled pairs above `threshold`; None where none does.

    pairs: (p,) SAMPLE_PAIR, with some above the threshold.
    """
    above = pairs[pairs["similarity"] > np.float32(threshold)]
    weight = above["weight"].astype(np.float64)
    best: Choice | None = None
    order = np.argsort(above["gap"].T, axis=1, kind="stable")
    gaps = np.take_along_axis(above["gap"].T, order, axis=1)
    laws = itertools.product(range(len(LEFT_OUT)), FIRST_WORDS, LOSSES, FIRST_LOSSES)
    for law, words, part, first in laws:
        loss = (1 - recall) * part
        cuts = (
            _quantile(above["first"][:, law, words - 1], weight, 1 - first * loss),
            _quantile(above["distance"][:, law], weight, 1 - (1 - first) * loss),
        )
        rule = Rule(0.0, 0.0, words, cuts, LEFT_OUT[law])
        passing = _near(above, rule)
        for exponent, name in enumerate(EXPONENTS):
            reach = _reach(gaps[exponent], weight[order[exponent]], passing[order[exponent]], recall)
            if reach is None:
                continue
            found = _costing(replace(rule, exponent=name, reach=reach), background)
            if best is None or found.share * found.nanoseconds < best.share * best.nanoseconds:
                best = found
    return best


def widened(choice: Choice, background: Background) -> Choice:
    """A rule that compares more than another: an eighth more reach, and pairs a little farther apart."""
    rule = choice.rule
    first, whole = rule.cuts
    wider = replace(rule, reach=1.125 * rule.reach + 1e-3, cuts=(first + 1, whole + 2))
    return _costing(wider, background)


def _costing(rule: Rule, background: Background) -> Choice:
    law = EXPONENTS.index(rule.exponent)
    meeting = int(np.searchsorted(background.gaps[law], np.float32(rule.reach), side="right"))
    meet = background.pairs[law, :meeting]
    bits = LEFT_OUT.index(rule.left_out)
    near = background.first[bits, rule.first_words - 1][meet] <= rule.cuts[0]
    verified = near & (background.distance[bits][meet] <= rule.cuts[1])
    passed = np.array([near.sum(), verified.sum()]) / max(1, len(near))
    return Choice(
        rule, meeting / background.gaps.shape[1], NANOSECONDS[rule.first_words] + float(passed @ NANOSECONDS_PASSED)
    )


def nominated(pairs: np.ndarray, rule: Rule) -> np.ndarray:
    """(p,) bool: whether the join compares each pair and its sketches are near."""
    return np.asarray((pairs["gap"][:, EXPONENTS.index(rule.exponent)] <= np.float32(rule.reach)) & _near(pairs, rule))


def _near(pairs: np.ndarray, rule: Rule) -> np.ndarray:
    bits = LEFT_OUT.index(rule.left_out)
    first, whole = pairs["first"][:, bits, rule.first_words - 1], pairs["distance"][:, bits]
    return np.asarray((first <= rule.cuts[0]) & (whole <= rule.cuts[1]))


def margin(
    pairs: np.ndarray, threshold: float, recall: float, background: Background, queries: tuple[int, int]
) -> float:
    """How far above `recall` to aim, so that the lower end of the measured interval will reach it.

    pairs: (p,) SAMPLE_PAIR of the choosing sample. queries: how many chose, how many will measure. From the interval
    that a rule half-way between `recall` and 1 has on the choosing sample.
    """
    middle = choose(pairs, threshold, (1 + recall) / 2, background)
    if middle is None:
        return 0.0
    known = measured(pairs, nominated(pairs, middle.rule), threshold, queries[0])
    width = (known["recall"] - known["low"]) * np.sqrt(1 + queries[0] / max(1, queries[1]))
    return float(min(max(1.2 * width, 0.1 * (1 - recall)), 0.8 * (1 - recall)))


def measured(
    pairs: np.ndarray, found: np.ndarray, threshold: float, queries: int, below: float = 2.0
) -> dict[str, float]:
    """Recall over the pairs with threshold < similarity <= below, as the fields of `Recall`.

    pairs: (p,) SAMPLE_PAIR. found: (p,) bool. The interval is a bootstrap over queries; where every pair was found it
    is Wilson's for the effective number of pairs.
    """
    mask = (pairs["similarity"] > np.float32(threshold)) & (pairs["similarity"] <= np.float32(below))
    above, hit = pairs[mask], found[mask]
    if not len(above):
        return asdict(Recall(threshold, 1.0, 0.0, 1.0, 0, queries, 0))
    nodes, cluster = np.unique(pairs["query"], return_inverse=True)
    weight = above["weight"].astype(np.float64)
    total = np.bincount(cluster[mask], weight, len(nodes))
    hits = np.bincount(cluster[mask], weight * hit, len(nodes))
    share = float(hits.sum() / total.sum())
    having = int(np.count_nonzero(total))
    if share in (0.0, 1.0) or having < 2:
        low, high = wilson(share, float(total.sum() ** 2 / (total**2).sum()))
    else:
        drawn = _resamples(len(nodes))
        shares = (drawn @ hits.astype(np.float32)) / np.maximum(drawn @ total.astype(np.float32), np.float32(1e-9))
        low, high = (float(x) for x in np.quantile(shares, [0.025, 0.975]))
    return asdict(Recall(threshold, share, low, high, round(float(total.sum())), queries, having))


def by_similarity(
    pairs: np.ndarray, found: np.ndarray, together: np.ndarray, lowest: float, queries: int
) -> list[dict[str, float]]:
    """Per 0.05 of similarity: recall, its interval, and the share of the sampled pairs that are in one component."""
    edges = np.unique(np.concatenate([[lowest], np.arange(1, 21) * 0.05]))
    rows = []
    for low, high in itertools.pairwise(edges[edges >= lowest - 1e-9]):
        top = 2.0 if high > 0.999 else float(high)
        row = measured(pairs, found, float(low), queries, top)
        if row["pairs"]:
            mask = (pairs["similarity"] > np.float32(low)) & (pairs["similarity"] <= np.float32(top))
            weight = pairs["weight"][mask].astype(np.float64)
            same = float((weight * together[mask]).sum() / weight.sum())
            rows.append(
                {"above": round(float(low), 4), "up_to": round(min(top, 1.0), 4)} | row | {"same_component": same}
            )
            del rows[-1]["threshold"]
    return rows


@lru_cache(maxsize=2)
def _resamples(count: int) -> np.ndarray:
    """(RESAMPLES, count) float32: how often each query is in a resample of all, Poisson (Hanley, MacGibbon 2006)."""
    drawn = generator(0, "recall bootstrap").poisson(1.0, (RESAMPLES, count)).astype(np.float32)
    drawn.flags.writeable = False
    return drawn


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `count` trials."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, float(middle - half)), min(1.0, float(middle + half))


def _quantile(values: np.ndarray, weight: np.ndarray, share: float) -> int:
    """The least value that so large a share of the weight does not exceed."""
    order = np.argsort(values, kind="stable")
    place = int(np.searchsorted(np.cumsum(weight[order]) / weight.sum(), share - 1e-12))
    return int(values[order][min(place, len(values) - 1)])


def _reach(gaps: np.ndarray, weight: np.ndarray, passing: np.ndarray, recall: float) -> float | None:
    """The least reach at which `recall` of all weight is compared and passes; None where that is too much.

    gaps: (p,) ascending.
    """
    share = np.cumsum(weight * passing) / weight.sum()
    place = int(np.searchsorted(share, recall - 1e-12))
    return None if place >= len(share) else max(0.0, float(gaps[place]))


def thin(rows: np.ndarray, keys: np.ndarray, queries: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions of at most PAIRS_PER_QUERY of a row's pairs, those of the least keys, and how many each stands for.

    rows: (m,) ascending, below `queries`. keys: (m,) sortable. Returns ((k,) int64, (k,) float32).
    """
    order = np.lexsort((keys, rows))
    counts = np.bincount(rows, minlength=queries)
    first = np.concatenate([[0], np.cumsum(counts)[:-1]])
    place = np.arange(len(order)) - first[rows[order]]
    kept = order[place < PAIRS_PER_QUERY]
    return kept, np.asarray(counts[rows[kept]] / np.minimum(counts[rows[kept]], PAIRS_PER_QUERY), np.float32)
