"""The relative graph against float64 all-pairs: references in slices, hits, both rules at any threshold."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from curation import vectors
from curation.duplicates import relative, tiles
from curation.duplicates.members import Bundle, Members, bundled, whole_set
from curation.duplicates.scratch import Scratch
from curation.duplicates.tasks import JoinOptions
from curation.vectors import embeddings_table

IMAGES, SETS, DIMENSION = 150, (700, 40), 128


@pytest.fixture
def graph(tmp_path: Path) -> tuple[np.ndarray, Members, Members, np.ndarray]:
    """(all stored vectors in node order, images, references, offsets of the spaces)."""
    random = np.random.default_rng(0)
    rows = [random.standard_normal((n, DIMENSION)) for n in (IMAGES, *SETS)]
    rows[0][:20] = rows[1][680:] + 0.9 * random.standard_normal((20, DIMENSION))
    rows[0][20:40] = rows[0][:20] + 0.9 * random.standard_normal((20, DIMENSION))
    offsets = np.cumsum([0, *map(len, rows)])
    stored, pieces = [], []
    for k, x in enumerate(rows):
        (tmp_path / str(k)).mkdir()
        pq.write_table(embeddings_table(np.arange(len(x), dtype=np.uint64), x), tmp_path / str(k) / "a.parquet")
        known = vectors.open_folder(str(tmp_path / str(k)))
        stored.append(next(iter(known.blocks()))[2])
        pieces.append(whole_set(known, 10_000, int(offsets[k])))
    count = int(offsets[-1])
    images = Members(bundled(pieces[0], 64), DIMENSION, True, count)
    references = Members(bundled([p for some in pieces[1:] for p in some], 10_000), DIMENSION, True, count)
    return np.concatenate(stored), images, references, offsets


def naive(x: np.ndarray, offsets: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """(discarded by component, discarded by direct hit) of the images."""
    table = (x.astype(np.float64) @ x.astype(np.float64).T).astype(np.float32)
    above = table > np.float32(threshold)
    label = connected_components(coo_matrix(above), directed=False)[1]
    images = int(offsets[1])
    return np.isin(label[:images], label[images:]), above[:images, images:].any(axis=1)


@pytest.mark.parametrize("size", [64, 8192])
def test_references_in_slices_give_the_exact_graph_at_every_threshold(
    tmp_path: Path, graph: tuple[np.ndarray, Members, Members, np.ndarray], monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    x, images, references, offsets = graph
    monkeypatch.setattr(tiles, "TILE_ROWS", size)
    seen: list[int] = []
    load = tiles.Tile.load
    monkeypatch.setattr(
        tiles.Tile, "load", lambda self, scratch: [found := load(self, scratch), seen.append(len(found[0]))][0]
    )
    ids = np.arange(IMAGES, dtype=np.uint64)
    joined = relative.relative_join(
        images, references, ids, offsets, JoinOptions(0.45, purpose="relative"), Scratch(str(tmp_path / "scratch"))
    )
    assert max(seen) <= max(size, 256), "a task holds one slice of the references"
    assert all(isinstance(piece, Bundle) for piece in images.pieces)
    for threshold in (0.45, 0.5, 0.6, 0.7):
        decided = relative.decontaminate(
            joined.forest, joined.hits, joined.references_hit, offsets, ("one", "two"), threshold
        )
        by_component, direct = naive(x, offsets, threshold)
        assert decided.by_component.tolist() == by_component.tolist()
        assert decided.direct.tolist() == direct.tolist()
        assert by_component.sum() >= direct.sum() > 5
