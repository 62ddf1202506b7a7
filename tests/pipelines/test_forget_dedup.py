"""Dedup after images were forgotten: joints hold components together, nobody takes a place, copies stay out."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from curation.duplicates import chains, planning
from curation.duplicates.forest import EDGE, Nodes
from curation.duplicates.members import Members, whole_set
from curation.duplicates.tasks import JoinOptions
from curation.schemas import image_id
from curation.vectors import open_folder
from pipelines import duplicate_forests, duplicate_forgotten, forget
from pipelines.run_directory import RunDirectory
from pipelines.stages import dedup
from pipelines.stages.dedup import DedupConfig
from tests.pipelines.test_dedup import DIMENSION, Images, Reversed, near, planted, unit, write_folder


def url(i: int) -> str:
    return f"http://example.org/{i}.jpg"


def grow(images: Images, number: int, x: np.ndarray, role: str = "pool", exempt: bool = False) -> list[int]:
    """A source of these vectors, with URLs and bytes of their own; its ids."""
    images.source(f"{role}:web{number}", len(x), exempt)
    ids = [image_id(number, row) for row in range(len(x))]
    rows = [
        {"image_id": i, "source": f"{role}:web{number}", "vector": v, "url": url(i), "sha256": i.to_bytes(32, "big")}
        for i, v in zip(ids, x, strict=True)
    ]
    images.generation({f"part-{number:03d}-000000": rows})
    return ids


def forget_urls(images: Images, ids: list[int], folder: Path, **options: Any) -> forget.Forgotten:
    listed = folder / "urls.txt"
    listed.write_text("".join(url(i) + "\n" for i in ids))
    return forget.forget(images.run.root, {"urls": str(listed)}, **options)


def chained(random: np.random.Generator) -> np.ndarray:
    """a - x - b, of which a and b are no copies of each other, and a stranger."""
    middle = unit(random.standard_normal(DIMENSION))
    aside = unit(random.standard_normal(DIMENSION))
    aside = unit(aside - (aside @ middle) * middle)
    a, b = (unit(0.8 * middle + sign * 0.6 * aside) for sign in (1, -1))
    return np.stack([a, middle, b, unit(random.standard_normal(DIMENSION))])


def beyond(vector: np.ndarray, link: np.ndarray) -> np.ndarray:
    """A copy of an end of the chain that is none of the link."""
    return unit(vector - 0.25 * link)


@pytest.mark.parametrize("representative", ["earliest", pytest.param("resolution", marks=pytest.mark.long)])
def test_a_forgotten_link_still_joins_its_component(tmp_path: Path, representative: str) -> None:
    random = np.random.default_rng(1)
    images = Images(RunDirectory(str(tmp_path / "run")))
    a, x, b, other = grow(images, 0, chained(random))
    images.dedup(threshold=0.7, representative=representative)
    before = images.rows()
    stays = next(i for i in (a, x, b) if before[i]["kept"])
    forget_urls(images, [x], tmp_path)
    # Near the end of the chain at which nobody stands: only the joint leads to the representative.
    far = b if stays == a else a
    ends = {i: images.vectors[i].astype(np.float64) for i in (a, b, x)}
    (late,) = grow(images, 1, beyond(ends[far], ends[x])[None])
    images.dedup(threshold=0.7, representative=representative)
    rows = images.rows()
    assert x not in rows and rows[other]["kept"]
    assert (rows[late]["kept"], rows[late]["reason"], rows[late]["component_id"]) == (False, "self", a)


@pytest.mark.parametrize("representative", ["earliest", "medoid"])
def test_nobody_takes_the_place_of_a_forgotten_representative_unless_asked(tmp_path: Path, representative: str) -> None:
    random = np.random.default_rng(2)
    images = Images(RunDirectory(str(tmp_path / "run")))
    x = chained(random)[[1, 0, 2, 3]]  # the link first: it stands for its component
    link, a, b, other = grow(images, 0, x)
    images.dedup(threshold=0.7, representative=representative)
    assert images.rows()[link]["kept"]
    told = forget_urls(images, [link], tmp_path)
    assert (told.images, told.copies_left) == (1, 2)
    (late,) = grow(images, 1, beyond(x[2], x[0])[None])
    images.dedup(threshold=0.7, representative=representative)
    rows = images.rows()
    assert [rows[i]["kept"] for i in (a, b, late, other)] == [False, False, False, True]
    assert rows[late]["reason"] == "self"
    dedup.execute(Reversed(run=images.run, rebuild=True), DedupConfig(threshold=0.7, representative=representative))
    rows = images.rows()
    assert sum(rows[i]["kept"] for i in (a, b, late)) == 1


def test_a_later_near_copy_is_kept_out_and_an_earlier_one_is_not(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    images = Images(RunDirectory(str(tmp_path / "run")))
    x = unit(random.standard_normal((6, DIMENSION)))
    x[1] = near(x[0], 0.9, random)
    ids = grow(images, 0, x)
    images.dedup(threshold=0.7)
    forget_urls(images, [ids[0]], tmp_path)
    copies = np.stack([near(x[0], 0.75, random), unit(random.standard_normal(DIMENSION))])
    pool, seeds = grow(images, 1, copies), grow(images, 2, copies, role="seed")
    outcome = images.dedup(threshold=0.7)
    rows = images.rows()
    for copy, stranger in (pool, seeds):
        assert (rows[copy]["reason"], rows[copy]["kept"], rows[copy]["component_id"]) == ("forgotten", False, copy)
        assert rows[stranger]["kept"]
    assert outcome.summary["forgotten"] == 2
    # Kept out once, it is nobody's representative or neighbour later either.
    copy, stranger = grow(images, 3, copies, role="seed", exempt=True)
    images.dedup(threshold=0.7)
    rows = images.rows()
    assert rows[copy]["reason"] == "forgotten" and stranger not in rows, "exempt from all else"
    (again,) = grow(images, 4, near(copies[0], 0.9, random)[None])
    images.dedup(threshold=0.7)
    assert images.rows()[again]["nearest_id"] != pool[0]
    dedup.execute(Reversed(run=images.run, rebuild=True), DedupConfig(threshold=0.7))
    rows = images.rows()
    assert rows[ids[1]]["kept"], "it was there when its original was forgotten, and nobody asked for copies"
    assert rows[pool[0]]["reason"] == "forgotten" and all(row["nearest_id"] != ids[0] for row in rows.values())


def test_components_of_several_generations_are_forgotten_whole(tmp_path: Path) -> None:
    """Two older components that a later image joined are one: tables of different generations name it differently."""
    random = np.random.default_rng(4)
    images = Images(RunDirectory(str(tmp_path / "run")))
    x = chained(random)
    a, b, other = grow(images, 0, x[[0, 2, 3]])
    images.dedup(threshold=0.7)
    (link,) = grow(images, 1, x[[1]])
    images.dedup(threshold=0.7)
    assert images.rows()[b]["component_id"] == b and images.rows()[link]["component_id"] == a
    sha = tmp_path / "sha.txt"
    sha.write_text(b.to_bytes(32, "big").hex() + "\n")
    assert forget.forget(images.run.root, {"sha256": str(sha)}).images == 3
    assert set(images.rows()) == {other}


def test_what_is_told_of_components_leaves_joints_out(tmp_path: Path) -> None:
    random = np.random.default_rng(5)
    x = unit(random.standard_normal((3, DIMENSION)))
    opened = open_folder(str(write_folder(tmp_path / "x", x)))
    nodes = Nodes((np.array([10, 11, 12, 13], np.uint64),))
    pieces = whole_set(opened, 1000, order=np.array([0, 2, 3], np.uint32))
    members = Members(tuple(pieces), DIMENSION, opened.dtype == "halffloat", 4)
    forest = np.array([(0, 1, 0.9), (1, 2, 0.9)], EDGE)
    labels, kept = np.array([0, 0, 0, 3], np.uint32), np.array([False, True, False, True])
    joint = np.array([False, True, False, False])
    told = chains.report(forest, labels, kept, members, nodes, 0.7, joints=joint)
    (largest,) = told["largest"]
    assert (largest["images"], largest["members"], largest["representatives"]) == (2, [10, 12], [])
    assert largest["least_similar"] == [10, 12]


def test_joints_alone_are_no_component() -> None:
    labels = duplicate_forgotten.apart(np.array([0, 0, 2, 2, 2], np.uint32), np.array([True, True, True, False, False]))
    assert labels.tolist() == [0, 1, 2, 2, 2]
    ids, places = duplicate_forgotten.with_joints(np.array([3, 5], np.uint64), None, np.array([4], np.uint64))
    assert ids.tolist() == [3, 4, 5] and places is not None and places.tolist() == [0, 2]


def test_a_block_list_of_another_copy_model_is_said(tmp_path: Path) -> None:
    random = np.random.default_rng(6)
    images = Images(RunDirectory(str(tmp_path / "run")))
    ids = grow(images, 0, unit(random.standard_normal((3, DIMENSION))))
    images.dedup(threshold=0.7)
    forget_urls(images, [ids[0]], tmp_path)
    (path,) = (tmp_path / "run" / "forgotten" / "blocked").glob("vectors-*.parquet")
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"curate.model": b'{"name": "b"}'}), path)
    grow(images, 1, unit(random.standard_normal((2, DIMENSION))))
    with pytest.raises(dedup.UserError, match="copies of forgotten images could not be told"):
        images.dedup(threshold=0.7)


@pytest.mark.parametrize(
    "options",
    [
        {"split": "star"},
        pytest.param({"max_component": 2}, marks=pytest.mark.long),
        pytest.param({"max_edges": 4}, marks=pytest.mark.long),
        pytest.param({"split": "star", "representative": "medoid"}, marks=pytest.mark.long),
    ],
)
def test_guards_and_bounds_go_on_after_whole_components_were_forgotten(tmp_path: Path, options: Any) -> None:
    random = np.random.default_rng(7)
    images = Images(RunDirectory(str(tmp_path / "run")))
    x = np.concatenate([chained(random), chained(random)])
    first = grow(images, 0, x)
    images.dedup(threshold=0.7, **options)
    forget_urls(images, first[:3] + first[5:6], tmp_path)
    fresh = np.stack([beyond(x[4], x[5]), unit(random.standard_normal(DIMENSION))])
    copy, stranger = grow(images, 1, fresh)
    images.dedup(threshold=0.7, **options)
    rows = images.rows()
    assert set(rows) == {first[3], first[4], first[6], first[7], copy, stranger}
    # A star holds copies of its representative alone: where that was the link, this one never belonged to it.
    by_mean = options.get("representative") == "medoid"
    assert rows[stranger]["kept"] and rows[copy]["reason"] == ("kept" if by_mean else "self")


def test_a_search_through_cells_goes_on_and_what_it_kept_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duplicate_forests, "JoinOptions", partial(JoinOptions, exact_multiply_adds=0))
    monkeypatch.setattr(planning, "PRODUCT_NANOSECONDS", 1e9)  # cells, whatever they cost
    images = Images(RunDirectory(str(tmp_path / "run")))
    x = planted(600)
    ids = grow(images, 0, x[:550])
    images.dedup(recall=0.8)
    (search,) = images.run.stage("dedup-search").generations()
    assert [name for name in search.files if name.startswith("cells/")]
    before = images.rows()
    gone = [i for i in ids if not before[i]["kept"]][:20] + [i for i in ids if before[i]["kept"]][:20]
    forget_urls(images, gone, tmp_path)
    (now,) = images.run.stage("dedup-search").generations()
    assert not [name for name in now.files if name.startswith("cells/")] and now.digest == search.digest
    assert not list(Path(search.directory).rglob("*.npz"))
    late = grow(images, 1, x[550:])
    images.dedup(recall=0.8)
    rows = images.rows()
    assert set(rows) == (set(ids) | set(late)) - set(gone)
    assert [name for name in images.run.stage("dedup-search").generations()[-1].files if name.startswith("cells/0000")]
    assert all(rows[i]["kept"] == before[i]["kept"] for i in set(ids) - set(gone))
