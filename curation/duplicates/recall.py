"""Which rule reaches the recall asked for at the least cost, and what recall it has.

Sampled queries are compared with everything: not cell by cell, but by sketches with so wide a cut that a true pair is
passed over less than once in a hundred thousand, and the definition of similarity decides. For each pair found so it is
known at which reach of the visits and at which cuts of the sketches the join nominates it. One sample chooses the rule,
another measures it; intervals are bootstraps over queries, whose pairs are found and missed together.
"""

import itertools
from dataclasses import asdict, dataclass
from functools import lru_cache

import numpy as np

from curation import sketch
from curation.duplicates.cells import EXPONENTS, Cells, Rule
from curation.order import generator

CHOICE_QUERIES = 2048
MEASURE_QUERIES = 2048
QUERIES_WITH_COPIES = 2048
MOST_QUERIES = 8192
"""Queries measured with at most, while fewer than QUERIES_WITH_COPIES of them have a copy."""
PAIRS_PER_QUERY = 256
"""Kept of one query in one piece, by node hash; the others count through the weight of those."""
TRUTH_DEVIATIONS = 4.0
RESAMPLES = 1000
ATTEMPTS = 10
LEARNING_ATTEMPTS = 5
NANOSECONDS = {2: 1.0, 3: 1.3, 4: 1.6}
"""Of a pair of sketches by the words that are compared first: measured, one core with AVX2."""
NANOSECONDS_PASSED = np.array([5.0, 8.0, 400.0])
"""Further ones of a pair that is near in its first words, in half of them, in all."""
FIRST_WORDS = (2, 3, 4)
LOSSES = (0.15, 0.3, 0.45, 0.6)
"""Shares of the permitted loss that the sketches may take."""

SAMPLE_PAIR = np.dtype(
    [
        ("query", "<u4"),
        ("node", "<u4"),
        ("similarity", "<f4"),
        ("weight", "<f4"),
        ("gap", "<f4", (len(EXPONENTS),)),
        ("first", "<u2", (sketch.LONGEST_FIRST,)),
        ("half", "<u2"),
        ("distance", "<u2"),
    ]
)
"""A true pair: the query's node, the other's, how many pairs it stands for, the reach at which it is compared for each
of EXPONENTS, and the distance of the sketches in 1, 2, … words, in half and in all of them."""


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

    scores: (q, c) float32 of some vectors. homes: (r,) int32 of others. first: (LONGEST_FIRST, q, r) uint16, half and
    distance: (q, r) uint16 of their sketches. shares: (c,) of all rows by home.
    """

    scores: np.ndarray
    homes: np.ndarray
    first: np.ndarray
    half: np.ndarray
    distance: np.ndarray
    shares: np.ndarray

    @classmethod
    def of(cls, cells: Cells, vectors: np.ndarray, homes_of: np.ndarray) -> "Background":
        """vectors: (q, d), homes_of: (r, d) stored vectors of two random samples."""
        scores = np.concatenate([block for _, block in cells.scores(vectors)])
        one, other = sketch.sketches(vectors), sketch.sketches(homes_of)
        first = np.zeros((sketch.LONGEST_FIRST, len(one), len(other)), np.uint16)
        total = np.zeros((len(one), len(other)), np.uint16)
        for word in range(one.shape[1]):
            total += np.bitwise_count(one[:, None, word] ^ other[None, :, word])
            if word < sketch.LONGEST_FIRST:
                first[word] = total
            if word == sketch.HALF - 1:
                half = total.copy()
        homes = cells.homes(homes_of)
        members = np.bincount(homes, minlength=len(cells)) + cells.sizes * len(homes)
        return cls(scores, homes, first, half, total, members / members.sum())

    def visited(self, cells: Cells, exponent: float, reach: float) -> np.ndarray:
        """(q, c) bool: the cells that each vector is at home in or visits."""
        best = self.scores.max(axis=1, keepdims=True)
        return np.asarray((self.scores - cells.handicap(exponent) >= best - np.float32(reach)) | (self.scores == best))

    def visits(self, cells: Cells, rule: Rule) -> tuple[float, float]:
        """(share of all rows that a vector is compared with, cells it goes to) on average."""
        mask = self.visited(cells, rule.exponent, rule.reach)
        return float((mask @ self.shares).mean()), float(mask.sum(axis=1).mean())


@dataclass(frozen=True)
class Choice:
    """A rule and what it is expected to cost: the share of all pairs compared, nanoseconds per compared pair."""

    rule: Rule
    share: float
    nanoseconds: float


def choose(pairs: np.ndarray, threshold: float, recall: float, cells: Cells, background: Background) -> Choice | None:
    """The cheapest rule that finds `recall` of the sampled pairs above `threshold`; None where none does.

    pairs: (p,) SAMPLE_PAIR. Without pairs to learn from, what finds pairs at the threshold by the law of sketches and
    half of the visits that a random pair would take.
    """
    above = pairs[pairs["similarity"] > np.float32(threshold)]
    weight = above["weight"].astype(np.float64)
    best: Choice | None = None
    for exponent, words, part in itertools.product(range(len(EXPONENTS)), FIRST_WORDS, LOSSES):
        if len(above):
            loss = (1 - recall) * part
            cuts = (
                _quantile(above["first"][:, words - 1], weight, 1 - 0.6 * loss),
                _quantile(above["half"], weight, 1 - 0.3 * loss),
                _quantile(above["distance"], weight, 1 - 0.1 * loss),
            )
            passing = _near(above, words, cuts)
            reach = _reach(above["gap"][:, exponent], weight, passing, recall)
        else:
            first, half, whole = (sketch.distance_at(threshold, w, 3) for w in (words, sketch.HALF, sketch.WORDS))
            cuts = (first, half, whole)
            reach = float(np.median(background.scores.max(axis=1)) / 8)
        if reach is None:
            continue
        found = _costing(Rule(EXPONENTS[exponent], reach, words, cuts), cells, background)
        if best is None or found.share * found.nanoseconds < best.share * best.nanoseconds:
            best = found
    return best


def widened(choice: Choice, cells: Cells, background: Background) -> Choice:
    """A rule that compares more than another: an eighth more reach, and pairs a little farther apart."""
    rule = choice.rule
    first, half, whole = rule.cuts
    wider = Rule(rule.exponent, 1.125 * rule.reach + 1e-3, rule.first_words, (first + 1, half + 2, whole + 3))
    return _costing(wider, cells, background)


def _costing(rule: Rule, cells: Cells, background: Background) -> Choice:
    mask = background.visited(cells, rule.exponent, rule.reach)
    share, meet = float((mask @ background.shares).mean()), mask[:, background.homes]
    near = background.first[rule.first_words - 1][meet] <= rule.cuts[0]
    nearer = near & (background.half[meet] <= rule.cuts[1])
    verified = nearer & (background.distance[meet] <= rule.cuts[2])
    passed = np.array([near.sum(), nearer.sum(), verified.sum()]) / max(1, len(near))
    return Choice(rule, share, NANOSECONDS[rule.first_words] + float(passed @ NANOSECONDS_PASSED))


def nominated(pairs: np.ndarray, rule: Rule) -> np.ndarray:
    """(p,) bool: whether the join compares each pair and its sketches are near."""
    return np.asarray(
        (pairs["gap"][:, EXPONENTS.index(rule.exponent)] <= np.float32(rule.reach))
        & _near(pairs, rule.first_words, rule.cuts)
    )


def _near(pairs: np.ndarray, first_words: int, cuts: tuple[int, int, int]) -> np.ndarray:
    return np.asarray(
        (pairs["first"][:, first_words - 1] <= cuts[0]) & (pairs["half"] <= cuts[1]) & (pairs["distance"] <= cuts[2])
    )


def margin(
    pairs: np.ndarray, threshold: float, recall: float, cells: Cells, background: Background, queries: tuple[int, int]
) -> float:
    """How far above `recall` to aim, so that the lower end of the measured interval will reach it.

    pairs: (p,) SAMPLE_PAIR of the choosing sample. queries: how many chose, how many will measure. From the interval
    that a rule half-way between `recall` and 1 has on the choosing sample.
    """
    middle = choose(pairs, threshold, (1 + recall) / 2, cells, background)
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
    """The least reach at which `recall` of all weight is compared and passes; None where that is too much."""
    order = np.argsort(gaps[passing], kind="stable")
    share = np.cumsum(weight[passing][order]) / weight.sum()
    place = int(np.searchsorted(share, recall - 1e-12))
    return None if place >= len(share) else max(0.0, float(gaps[passing][order][place]))


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
