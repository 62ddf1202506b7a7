"""`import`: folders, tars and Parquet become rows that point at bytes as they lie."""

import hashlib
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation.errors import UserError
from curation.locations import read_ranges
from curation.schemas import IMAGES
from pipelines.context import Context
from pipelines.run_directory import RunDirectory
from pipelines.stages import importing
from pipelines.tars import read_index
from tests.pipelines.test_download import Alone
from tests.pipelines.web import jpeg


def run_import(run: Path, kind: Any, origin: Path | str, role: str = "pool", **options: Any) -> list[dict[str, Any]]:
    outcome = importing.execute(Alone(RunDirectory(str(run))), kind=kind, origin=str(origin), role=role, **options)
    tables = [pq.read_table(part) for part in sorted(Path(outcome.out).glob("part-*.parquet"))]
    assert all(table.schema.names == IMAGES.names for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == outcome.rows
    return rows


def png(seed: int) -> bytes:
    sink = io.BytesIO()
    Image.open(io.BytesIO(jpeg(seed))).save(sink, "PNG")
    return sink.getvalue()


def add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    tar.addfile(member, io.BytesIO(data))


def make_tar(path: Path, numbers: range, *, texts: bool = True) -> Path:
    with tarfile.open(path, "w") as tar:
        for n in numbers:
            if texts:
                about = {"url": f"http://a.example/{n}", "caption": f"number {n}", "kind": n % 2}
                add(tar, f"{n:05d}.json", json.dumps(about).encode())
                add(tar, f"{n:05d}.cls", str(n % 3).encode())
            add(tar, f"{n:05d}.jpg", jpeg(n))
    return path


def test_a_folder_is_read_in_name_order_with_its_sub_folders_as_labels(tmp_path: Path) -> None:
    names = ["a.jpg", "b/c.JPG", "b/d/e.png", "b.png", "z/é\n.jpg", "z/notes.txt"]
    for n, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(png(n) if name.endswith("png") else jpeg(n))
    rows = run_import(tmp_path / "run", "folder", tmp_path / "in", "seed:s")
    expected = sorted(name for name in names if not name.endswith("txt"))
    assert [os.path.relpath(row["shard"], tmp_path / "in") for row in rows] == expected
    assert [row["label"] for row in rows] == [None, None, "b", "d", "z"]
    assert [row["image_id"] for row in rows] == list(range(5))
    for row in rows:
        data = Path(row["shard"]).read_bytes()
        assert (row["offset"], row["length"], row["status"]) == (0, len(data), "ok")
        assert row["sha256"] == row["stored_sha256"] == hashlib.sha256(data).digest()
        assert (row["width"], row["height"]) == (48, 36)


def test_what_cannot_be_an_image_is_a_row_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "outside.jpg").write_bytes(jpeg(1))
    (folder / "good.jpg").write_bytes(jpeg(2))
    (folder / "html.jpg").write_bytes(b"<html></html>")
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "x::y.jpg").write_bytes(jpeg(3))
    (folder / "link-out.jpg").symlink_to(tmp_path / "outside.jpg")
    (folder / "link-in.jpg").symlink_to("good.jpg")
    (folder / "link-broken.jpg").symlink_to("absent.jpg")
    (folder / "loop").symlink_to(folder)
    with open(os.path.join(os.fsencode(folder), b"\xff.jpg"), "wb") as file:
        file.write(jpeg(4))
    found = {
        os.path.basename(row["shard"] or "-"): (row["status"], row["error"])
        for row in run_import(tmp_path / "run", "folder", folder)
    }
    assert found["good.jpg"] == found["link-in.jpg"] == ("ok", None)
    assert found["html.jpg"][1] == "not_an_image: by its first bytes"
    assert found["empty.jpg"][1] == "not_an_image: an empty body"
    outcome = importing.execute(
        Alone(RunDirectory(str(tmp_path / "run"))), kind="folder", origin=str(folder), role="pool"
    )
    assert outcome.skipped and outcome.summary["errors"] == {"link": 1, "not_an_image": 2, "unreadable": 3}


def test_files_inside_the_run_are_named_relative_to_it(tmp_path: Path) -> None:
    (tmp_path / "run/inside").mkdir(parents=True)
    (tmp_path / "run/inside/a.jpg").write_bytes(jpeg(1))
    rows = run_import(tmp_path / "run", "folder", tmp_path / "run/inside")
    assert [row["shard"] for row in rows] == ["inside/a.jpg"]


def test_tars_are_read_by_offset_with_what_their_samples_say(tmp_path: Path, ray_session: None) -> None:
    (tmp_path / "in").mkdir()
    make_tar(tmp_path / "in/00001.tar", range(5, 8))
    make_tar(tmp_path / "in/00000.tar", range(5))
    context = Context(RunDirectory(str(tmp_path / "ray")))
    importing.execute(context, kind="tars", origin=str(tmp_path / "in"), role="pool", label_column="kind")
    rows = run_import(tmp_path / "alone", "tars", tmp_path / "in", label_column="kind")
    for part in ("part-000-000000.parquet", "part-000-000001.parquet"):
        same = [(tmp_path / run / "import/gen-0000" / part).read_bytes() for run in ("ray", "alone")]
        assert same[0] == same[1]
    places = [(row["shard"], row["offset"], row["length"]) for row in rows]
    assert list(read_ranges(str(tmp_path), places)) == [jpeg(n) for n in range(8)]
    assert [row["url"] for row in rows] == [f"http://a.example/{n}" for n in range(8)]
    assert [row["caption"] for row in rows] == [f"number {n}" for n in range(8)]
    assert [row["label"] for row in rows] == [str(n % 2) for n in range(8)]


def test_a_sample_without_a_label_column_takes_its_class(tmp_path: Path) -> None:
    rows = run_import(tmp_path / "run", "tars", make_tar(tmp_path / "a.tar", range(3)))
    assert [row["label"] for row in rows] == ["0", "1", "2"]


def test_the_parquet_of_img2dataset_beside_a_tar_is_used(tmp_path: Path) -> None:
    make_tar(tmp_path / "0.tar", range(2), texts=False)
    table = {
        "key": ["00001", "00000", "00009"],
        "url": ["http://x/1", "http://x/0", "http://x/9"],
        "caption": ["one", None, "x"],
    }
    pq.write_table(pa.table(table), tmp_path / "0.parquet")
    rows = run_import(tmp_path / "run", "tars", tmp_path / "0.tar")
    assert [(row["url"], row["caption"]) for row in rows] == [("http://x/0", None), ("http://x/1", "one")]


def test_a_run_of_ours_can_be_imported_again(tmp_path: Path) -> None:
    from pipelines.download.shard_writer import ShardTar

    tar = ShardTar()
    tar.add_sample("000-000000000000", "jpg", jpeg(1), {"url": "http://a.example/", "caption": None, "label": "x"})
    (tmp_path / "part-000-000000.tar").write_bytes(tar.close())
    rows = run_import(tmp_path / "run", "tars", tmp_path)
    assert [(row["url"], row["caption"], row["label"]) for row in rows] == [("http://a.example/", None, "x")]


def test_a_tar_that_ends_early_gives_its_whole_members(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "a.tar", range(4), texts=False)
    whole = read_index(str(path))
    assert len(whole.images) == 4 and not whole.damaged
    path.write_bytes(path.read_bytes()[: whole.images[3].offset + 100])
    cut = read_index(str(path))
    assert cut.images == whole.images[:3] and cut.damaged
    assert len(run_import(tmp_path / "run", "tars", path)) == 3


def test_members_that_are_no_files_or_climb_out_are_only_offsets(tmp_path: Path) -> None:
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "../../etc/evil.jpg", jpeg(1))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
        add(tar, "n" * 150 + ".jpg", jpeg(2))
    rows = run_import(tmp_path / "run", "tars", path)
    assert [row["status"] for row in rows] == ["ok", "ok"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "run"]


def test_a_parquet_of_paths_is_relative_to_itself(tmp_path: Path) -> None:
    (tmp_path / "in/photos").mkdir(parents=True)
    (tmp_path / "in/photos/a.jpg").write_bytes(jpeg(1))
    (tmp_path / "b.jpg").write_bytes(jpeg(2))
    paths = [
        "photos/a.jpg",
        str(tmp_path / "b.jpg"),
        "absent.jpg",
        None,
        "http://127.0.0.1/a.jpg",
        "zip://a.jpg::b.zip",
    ]
    table = pa.table({"path": paths, "species": ["x"] * 6, "caption": [f"c{n}" for n in range(6)]})
    pq.write_table(table, tmp_path / "in/list.parquet")
    rows = run_import(tmp_path / "run", "parquet", tmp_path / "in/list.parquet", label_column="species")
    assert [row["status"] for row in rows] == ["ok", "ok", "failed", "failed", "failed", "failed"]
    assert [(row["error"] or "").split(":")[0] for row in rows[2:]] == ["missing", "unreadable", "scheme", "unreadable"]
    assert rows[0]["shard"] == str(tmp_path / "in/photos/a.jpg")
    assert rows[0]["label"] == "x" and rows[5]["caption"] == "c5"


def test_sources_number_on_over_download_and_import(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.jpg").write_bytes(jpeg(1))
    run_import(tmp_path / "run", "folder", tmp_path / "a", "reference:a")
    rows = run_import(tmp_path / "run", "folder", tmp_path / "b", "seed:b", exempt=True, licence="CC0")
    assert rows[0]["image_id"] == 1 << 40 and rows[0]["source"] == "seed:b"
    sources = RunDirectory(str(tmp_path / "run")).sources()
    assert [(s.name, s.rows, s.exempt, s.licence, s.generation) for s in sources] == [
        ("reference:a", 1, False, None, 0),
        ("seed:b", 1, True, "CC0", 1),
    ]
    (tmp_path / "b/2.jpg").write_bytes(jpeg(2))
    with pytest.raises(UserError, match=r"seed:b is registered .* with other content"):
        run_import(tmp_path / "run", "folder", tmp_path / "b", "seed:b", exempt=True)
    with pytest.raises(UserError, match="only a seed set can be exempt"):
        run_import(tmp_path / "run", "folder", tmp_path / "a", "pool:x", exempt=True)


@pytest.mark.parametrize(
    ("kind", "name", "sentence"),
    [
        ("folder", "absent", "no such folder"),
        ("folder", "empty", "no images"),
        ("tars", "empty", "no tar there"),
        ("tars", "bad.tar", "not a plain tar"),
        ("parquet", "absent.parquet", "no such file"),
        ("parquet", "bad.parquet", "cannot be read"),
        ("parquet", "columns.parquet", "no column `path`; there are: file"),
    ],
)
def test_sources_that_cannot_be_right_are_refused(
    tmp_path: Path, kind: str, name: str, sentence: str, ray_session: None
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.tar").write_bytes(b"no tar at all" * 100)
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pa.table({"file": ["x"]}), tmp_path / "columns.parquet")
    with pytest.raises(UserError, match=sentence) as caught:
        importing.execute(
            Context(RunDirectory(str(tmp_path / "run"))),
            kind=kind,
            origin=str(tmp_path / name),
            role="pool:x",  # type: ignore[arg-type]
        )
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
