"""Guards against chains against naive versions: components that fit, and stars."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curation import vectors
from curation.duplicates import forest as f
from curation.duplicates import split
from curation.duplicates.components import components
from curation.duplicates.members import Members, bundled, whole_set
from curation.duplicates.scratch import Scratch
from curation.vectors import embeddings_table

LEVELS = [0.5, 0.6, 0.7, 0.8, 1.0]
graphs = st.integers(2, 24).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), st.sampled_from(LEVELS)), max_size=60),
    )
)


def make(edges: list[tuple[int, int, float]]) -> np.ndarray:
    rows = [e for e in edges if e[0] != e[1]]
    one, other, value = (np.array([r[k] for r in rows]) for k in range(3)) if rows else (np.empty(0),) * 3
    return f.edges(one.astype(np.uint32), other.astype(np.uint32), value.astype(np.float32))


def naive_fitting(rows: np.ndarray, n: int, threshold: float, most: int) -> list[int]:
    """Labels, by cutting again and again at the weakest edge of each component that is too large."""
    above = f.cut(rows, threshold)
    labels = components(above, n).astype(np.int64)
    for label in np.unique(labels).tolist():
        mine = above[labels[above["low"]] == label]
        if (labels == label).sum() > most and len(np.unique(mine["similarity"])) > 1:
            inside = naive_fitting(mine, n, float(mine["similarity"].min()), most)
            labels[labels == label] = np.array(inside)[labels == label]
    return labels.tolist()


@settings(max_examples=100, deadline=None)
@given(graphs, st.integers(1, 8))
def test_components_that_fit_are_those_of_cutting_again_and_again(graph, most) -> None:
    n, edges = graph
    forest = f.maximum_spanning_forest(make(edges), n)
    fits, cuts = split.fitting(forest, n, 0.5, most)
    labels = components(fits, n)
    assert labels.tolist() == naive_fitting(forest, n, 0.5, most)
    whole = components(forest, n, 0.5)
    sizes = np.bincount(whole, minlength=n)
    told = {c["label"]: c for c in cuts}
    for label in np.flatnonzero(sizes > most).tolist():
        pieces = labels[whole == label]
        one = told.pop(label)
        assert (one["images"], one["pieces"]) == (sizes[label], len(np.unique(pieces)))
        assert one["largest"] == np.bincount(pieces).max() and one["uncut"] == (one["largest"] > most)
        assert (one["cut_at"] is None) == (one["pieces"] == 1)
        again = components(forest, n, one["cut_at"] or 0.5)[whole == label]
        assert one["uncut"] or np.bincount(again).max() <= most
    assert not told


def test_equal_images_stay_together_whatever_their_number() -> None:
    rows = f.ordered(f.edges(np.array([0, 1, 2, 3, 9]), np.array([1, 2, 3, 4, 0]), np.float32([1, 1, 1, 1, 0.7])))
    fits, cuts = split.fitting(rows, 10, 0.6, 2)
    assert components(fits, 10).tolist() == [0, 0, 0, 0, 0, 5, 6, 7, 8, 9]
    assert cuts == [{"label": 0, "images": 6, "cut_at": pytest.approx(0.7), "pieces": 2, "largest": 5, "uncut": True}]


def members_of(folder: Path, x: np.ndarray, pieces: int) -> tuple[Members, np.ndarray]:
    stored = []
    for k, rows in enumerate(np.array_split(np.arange(len(x)), pieces)):
        pq.write_table(embeddings_table(rows.astype(np.uint64), x[rows]), folder / f"{k:03d}.parquet")
    known = vectors.open_folder(str(folder))
    stored = [rows for _, _, rows in known.blocks()]
    return Members(bundled(whole_set(known, 7), 7), known.dimension, True, known.rows), np.concatenate(stored)


def naive_stars(x, labels, key, rank, threshold) -> tuple[list[int], list[int]]:
    result, elected = labels.copy(), set()
    for label in np.unique(labels).tolist():
        left = sorted(np.flatnonzero(labels == label).tolist(), key=lambda i: (-int(rank[i]), -key(i, labels), i))
        while left:
            one, left = left[0], left[1:]
            elected.add(one)
            near = [
                i
                for i in left
                if rank[i] < split.STAYS and vectors.similarity(x[[one]], x[[i]])[0] > np.float32(threshold)
            ]
            left = [i for i in left if i not in near]
            result[[one, *near]] = min([one, *near])
    return result.tolist(), sorted(elected)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.sampled_from(["value", "earliest", "mean"]), st.sampled_from([1, 4 << 30]))
def test_stars_are_those_of_electing_one_after_the_other(tmp_path_factory, seed, rule, memory) -> None:
    random = np.random.default_rng(seed)
    n = int(random.integers(2, 40))
    centres = random.standard_normal((3, 8))
    x = centres[random.integers(0, 3, n)] + random.uniform(0, 1.2) * random.standard_normal((n, 8))
    members, stored = members_of(tmp_path_factory.mktemp("stars"), x, int(random.integers(1, 4)))
    table = (stored.astype(np.float64) @ stored.astype(np.float64).T).astype(np.float32)
    one, other = np.nonzero(np.triu(table > np.float32(0.6), 1))
    forest = f.maximum_spanning_forest(f.edges(one, other, table[one, other]), n)
    labels = components(forest, n)
    value = random.integers(0, 4, n).astype(float)
    value[random.random(n) < 0.2] = np.nan
    rank = random.choice([0, 1, split.STAYS], n, p=[0.4, 0.45, 0.15]).astype(np.uint8)
    election = split.Election(value if rule == "value" else None, rank, rule == "mean")
    scratch = Scratch(str(tmp_path_factory.mktemp("scratch")))
    found, elected = split.stars(members, labels, forest, election, 0.6, scratch, memory_bytes=memory)

    def key(i: int, labels: np.ndarray) -> float:
        if rule == "mean":
            total = np.add.reduce(stored[labels == labels[i]].astype(np.float64), axis=0)
            return float(stored[i].astype(np.float64) @ total)
        return 0.0 if rule == "earliest" else -np.inf if np.isnan(value[i]) else value[i]

    expected, stay = naive_stars(stored, labels.astype(np.int64), key, rank, 0.6)
    assert found.tolist() == expected and np.flatnonzero(elected).tolist() == stay


def test_a_component_that_does_not_fit_into_memory_is_elected_in_batches(tmp_path, monkeypatch) -> None:
    random = np.random.default_rng(0)
    x = np.cumsum(random.standard_normal((400, 16)) * 0.35, axis=0)
    members, stored = members_of(tmp_path, x, 5)
    table = (stored.astype(np.float64) @ stored.astype(np.float64).T).astype(np.float32)
    one, other = np.nonzero(np.triu(table > np.float32(0.6), 1))
    forest = f.maximum_spanning_forest(f.edges(one, other, table[one, other]), 400)
    labels = components(forest, 400)
    assert np.bincount(labels).max() > 300
    whole = split.stars(members, labels, forest, split.Election(), 0.6, Scratch(str(tmp_path / "a")))
    monkeypatch.setattr(split, "TABLE_MEMBERS", 0)
    for memory in (1, 1 << 20):
        pieces = split.stars(
            members, labels, forest, split.Election(), 0.6, Scratch(str(tmp_path / f"b{memory}")), memory_bytes=memory
        )
        assert all((a == b).all() for a, b in zip(whole, pieces, strict=True))
