"""Forests and components against naive versions and scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from curation.duplicates import components as comp
from curation.duplicates import forest as f

graphs = st.integers(2, 24).flatmap(
    lambda n: st.tuples(
        st.just(n),
        st.lists(
            st.tuples(st.integers(0, n - 1), st.integers(0, n - 1), st.sampled_from([0.45, 0.5, 0.6, 0.7, 0.71, 1.0])),
            max_size=80,
        ),
    )
)


def make(edges: list[tuple[int, int, float]]) -> np.ndarray:
    rows = [e for e in edges if e[0] != e[1]]
    one, other, value = (np.array([r[k] for r in rows]) for k in range(3)) if rows else (np.empty(0),) * 3
    return f.edges(one.astype(np.uint32), other.astype(np.uint32), value.astype(np.float32))


def oracle_labels(rows: np.ndarray, n: int, threshold: float) -> np.ndarray:
    """Smallest node per component, by scipy."""
    kept = rows[rows["similarity"] > np.float32(threshold)]
    matrix = coo_matrix((np.ones(len(kept)), (kept["low"], kept["high"])), shape=(n, n))
    label = connected_components(matrix, directed=False)[1]
    smallest = np.full(label.max() + 1, n)
    np.minimum.at(smallest, label, np.arange(n))
    return smallest[label]


def kruskal(rows: np.ndarray) -> list[tuple[int, int, float]]:
    """Ten-line naive version: sort, then add what joins two sets."""
    sets: dict[int, set[int]] = {}
    result = []
    for edge in sorted(set(rows.tolist()), key=lambda e: (-e[2], e[0], e[1])):
        low, high, value = edge
        a, b = sets.setdefault(low, {low}), sets.setdefault(high, {high})
        if a is not b:
            a |= b
            for node in b:
                sets[node] = a
            result.append((low, high, value))
    return result


@settings(max_examples=200, deadline=None)
@given(graphs)
def test_forest_is_kruskals_and_has_the_components_of_the_graph_at_every_threshold(graph) -> None:
    n, edges = graph
    rows = make(edges)
    forest = f.maximum_spanning_forest(rows)
    assert forest.tolist() == kruskal(rows)
    for threshold in (0.0, 0.45, 0.5, 0.6, 0.7, 0.71, 1.0):
        assert comp.components(forest, n, threshold).tolist() == oracle_labels(rows, n, threshold).tolist()


@settings(max_examples=100, deadline=None)
@given(graphs, st.integers(0, 80), st.randoms(use_true_random=False))
def test_forests_of_parts_merge_to_the_forest_of_the_whole_in_any_order(graph, at, random) -> None:
    n, edges = graph
    whole = f.maximum_spanning_forest(make(edges), n)
    random.shuffle(edges)
    merger = f.ForestMerger(n, buffer_edges=3)
    for part in (edges[at:], edges[: at // 2], edges[at // 2 : at], edges[:3]):
        merger.add(f.maximum_spanning_forest(make(part)))
    assert merger.result().tobytes() == whole.tobytes()


@settings(max_examples=100, deadline=None)
@given(graphs)
def test_nearest_neighbours_of_the_graph_are_read_from_its_forest(graph) -> None:
    n, edges = graph
    rows = make(edges)
    best, similarity = f.nearest(f.maximum_spanning_forest(rows), n)
    for node in range(n):
        around = [(-e[2], e[1] if e[0] == node else e[0]) for e in rows.tolist() if node in (e[0], e[1])]
        expected = min(around) if around else None
        assert (best[node] == f.NOBODY) if expected is None else ((-similarity[node], best[node]) == expected)


@settings(max_examples=50, deadline=None)
@given(graphs, st.integers(1, 4))
def test_pruning_keeps_each_nodes_best_edges(graph, k) -> None:
    rows = np.unique(make(graph[1]))
    wanted = set()
    for node in range(graph[0]):
        around = sorted((-e[2], e[1] if e[0] == node else e[0], e) for e in rows.tolist() if node in (e[0], e[1]))
        wanted |= {e for _, _, e in around[:k]}
    assert set(f.prune(rows, k).tolist()) == wanted


def test_forest_survives_a_table_with_two_spaces() -> None:
    nodes = f.Nodes((np.array([5, 9, 1 << 41], np.uint64), np.array([5, 7], np.uint64)))
    forest = f.ordered(f.edges(np.array([0, 3, 4]), np.array([2, 0, 1]), np.array([0.9, 0.8, 0.7], np.float32)))
    table = f.to_table(forest, nodes)
    assert table["high_space"].to_pylist() == [0, 1, 1] and table["high"].to_pylist() == [1 << 41, 5, 7]
    assert f.from_table(table, nodes).tobytes() == forest.tobytes()
    fewer = f.Nodes((np.array([5, 9], np.uint64), np.array([5, 7], np.uint64)))
    assert len(f.from_table(table, fewer)) == 2


def test_chain_between_two_images_is_their_path_in_the_forest() -> None:
    rows = f.ordered(f.edges(np.array([0, 1, 2, 7]), np.array([1, 2, 3, 8]), np.float32([0.9, 0.7, 0.8, 0.9])))
    assert f.path(rows, 0, 3) == [
        (0, None),
        (1, pytest.approx(0.9)),
        (2, pytest.approx(0.7)),
        (3, pytest.approx(0.8)),
    ]
    assert f.path(rows, 0, 8) == []


def test_representative_is_the_largest_value_and_ties_go_to_the_smallest_id() -> None:
    labels = np.array([0, 0, 2, 0, 2, 5], np.uint32)
    kept = comp.best_members(labels, np.array([3, 8, 4, 8, 4, 1]))
    assert np.flatnonzero(kept).tolist() == [1, 2, 5]
    kept = comp.best_members(labels, np.array([np.nan, 0.5, np.nan, 0.1, 0.2, np.nan]))
    assert np.flatnonzero(kept).tolist() == [1, 4, 5]
    assert np.flatnonzero(comp.earliest_members(labels)).tolist() == [0, 2, 5]


def test_sweep_counts_what_each_threshold_would_drop() -> None:
    forest = f.ordered(f.edges(np.array([0, 1, 3]), np.array([1, 2, 4]), np.float32([0.9, 0.7, 0.6])))
    first, second, third = comp.sweep(forest, 6, [0.5, 0.6, 0.8])
    assert first == {"threshold": 0.5, "components": 3, "components_of_several": 2, "largest": 3, "duplicates": 3}
    assert (second["components"], second["duplicates"]) == (4, 2)  # 0.6 is not above 0.6
    assert (third["components"], third["largest"]) == (5, 2)
