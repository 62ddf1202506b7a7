"""The index holds what the manifest says, is made once, and says in one sentence what cannot be a source."""

import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from curation.errors import UserError
from tests.training.data.manifests import picture, write_manifest
from training.data import reading
from training.data.index import open_index
from training.data.reading import Reader, check_locations


@pytest.mark.parametrize("place", ["disk", "memory://index-test"])
def test_rows_and_bytes_are_those_of_the_manifest(place: str, tmp_path: Path) -> None:
    images = [picture(i) for i in range(23)]
    weights = np.linspace(0, 2, 23).tolist()
    root = write_manifest(tmp_path / "m" if place == "disk" else place, images, weight=weights)
    index = open_index(root, str(tmp_path / "index"))
    assert index.rows["image_id"].tolist() == list(range(100, 123))
    assert index.weights is not None
    np.testing.assert_allclose(index.weights, weights, rtol=1e-6)
    assert index.shards == 3
    check_locations(index)
    reader = Reader(index, 4)
    assert [read.result() for read in reader.submit(range(23))] == images
    assert reader.requests == 23
    reader.close()
    again = pickle.loads(pickle.dumps(index))
    np.testing.assert_array_equal(again.rows, index.rows)
    assert len(pickle.dumps(index)) < 2000


def test_a_second_start_makes_nothing(tmp_path: Path) -> None:
    root = write_manifest(tmp_path / "m", [b"x"] * 9)
    first = open_index(root, str(tmp_path / "index"))
    made = (first.folder / "rows.bin").stat().st_mtime_ns
    assert first.weights is None
    assert (open_index(root, str(tmp_path / "index")).folder / "rows.bin").stat().st_mtime_ns == made
    write_manifest(tmp_path / "m", [b"x"] * 12)
    assert len(open_index(root, str(tmp_path / "index"))) == 12


def test_a_folder_of_images_in_order_of_names(tmp_path: Path) -> None:
    for name in ("b/2.jpg", "b/1.PNG", "a/9.webp", "a/notes.txt", ".hidden/1.jpg"):
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(name.encode())
    index = open_index(str(tmp_path / "tree"), str(tmp_path / "index"))
    assert [index.shard(int(row["shard"])) for row in index.rows] == ["a/9.webp", "b/1.PNG", "b/2.jpg"]
    reader = Reader(index, 1)
    assert reader.read(1) == b"b/1.PNG"
    reader.close()
    (tmp_path / "tree/c.jpg").write_bytes(b"c")
    assert len(open_index(str(tmp_path / "tree"), str(tmp_path / "index"))) == 4


def test_what_cannot_be_a_source_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/run.yaml").write_text("{}")
    nothing = write_manifest(tmp_path / "none", [])
    unlocated = write_manifest(tmp_path / "unlocated", [b"x"] * 3, shard=[None] * 3)
    (tmp_path / "none/part-0.parquet").write_bytes(Path(unlocated, "part-000000.parquet").read_bytes())
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "part-0.parquet").write_bytes(b"no")
    for source, sentence in (
        (str(tmp_path / "gone"), "not there"),
        (str(tmp_path / "empty"), "no image files in this folder"),
        (str(tmp_path / "run"), "a run without a manifest"),
        (nothing, "none of its 3 rows has a location"),
        (str(broken), "not a readable Parquet file"),
        (write_manifest(tmp_path / "zero", [b"x"] * 2, weight=[0.0, 0.0]), "every weight is 0"),
        (write_manifest(tmp_path / "nan", [b"x"] * 2, weight=[1.0, float("nan")]), "weights must be finite"),
    ):
        with pytest.raises(UserError, match=sentence) as caught:
            open_index(source, str(tmp_path / "index"))
        assert "\n" not in str(caught.value)


def test_moved_and_cut_shards_are_noticed_before_anything_starts(tmp_path: Path) -> None:
    root = write_manifest(tmp_path / "m", [b"x" * 50] * 20)
    index = open_index(root, str(tmp_path / "index"))
    shard = Path(root) / "shard-1.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(UserError, match="too short for image"):
        check_locations(index)
    shard.unlink()
    with pytest.raises(UserError, match="were the images moved"):
        check_locations(index)


def test_a_hiccup_of_the_network_is_no_broken_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    index = open_index(write_manifest("memory://hiccup-test", [b"abc", b"defg"]), str(tmp_path / "index"))
    memory = type(fsspec.filesystem("memory"))
    real, failures = memory.cat_file, iter([True, True])

    def failing(self: Any, *arguments: Any, **options: Any) -> Any:
        if next(failures, False):
            raise TimeoutError
        return real(self, *arguments, **options)

    monkeypatch.setattr(memory, "cat_file", failing)
    monkeypatch.setattr(reading, "PAUSES_S", (0.0, 0.0))
    reader = Reader(index, 1)
    assert reader.read(1) == b"defg"
    reader.close()
