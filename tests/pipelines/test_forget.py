"""Forgetting: what is asked for is nowhere in the run but on the block list, whenever it was stopped."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation import blocklist, hidden, storage
from curation.blocklist import BlockList, near
from curation.errors import UserError
from curation.schemas import BALANCE, DECISIONS, DUPLICATES, IMAGES, MANIFEST, RETRIEVAL
from curation.vectors import embeddings_table
from pipelines import cluster as ray_cluster
from pipelines import erasure, forget, forget_elsewhere, forget_rewrite, lock, pieces
from pipelines.blocking import Blocked, host_of, url_form
from pipelines.context import Context
from pipelines.download.url_keys import url_keys
from pipelines.forget_rewrite import without
from pipelines.run_directory import RunDirectory
from pipelines.stages import manifest, mix
from pipelines.stages.manifest import ManifestConfig
from pipelines.stages.mix import MixConfig
from tests.pipelines.image_runs import shard
from tests.pipelines.selection_runs import in_place
from tests.pipelines.synthetic_run import build, finish, picture

SALT = bytes(range(32))
STAGES = (
    "download",
    "import",
    "score",
    "filter",
    "dedup",
    "embed/mobilenet_v2",
    "cluster",
    "retrieve",
    "balance",
    "mix",
)


def a_run(root: str) -> RunDirectory:
    """A finished run of 24 pool images, made by hand but laid out as the stages do, with all that may name an image."""
    made = build(root, pool=24, per_part=8)
    run = made.run
    names = [p.name for g in run.stage("score").generations() for p in g.parts]
    tables = {
        name: forget_rewrite.pq.read_table(
            pa.BufferReader(storage.read_bytes(run.path("score/gen-0000", f"{name}.parquet")))
        )
        for name in names
    }
    for stage in ("score", "download"):
        remove(run, stage)
    files, shards, fetched = {}, {}, {}
    for name, table in tables.items():
        tables[name] = table.replace_schema_metadata(None)
        rows = table.to_pylist()
        ok = [row for row in rows if row["shard"] is not None]
        ids = np.array([row["image_id"] for row in ok], np.uint64)
        x = np.array([np.random.default_rng(int(i)).normal(size=16) for i in ids]).reshape(-1, 16)
        embedded = storage.table_bytes(embeddings_table(ids, x), {"curate.model": '{"name": "copies"}'})
        files[name] = {f"copy_embedding/{name}.parquet": embedded}
        if not name.startswith("part-000"):
            continue
        data = [picture(row["image_id"]) if row["shard"] is not None else None for row in rows]
        blurred = name == "part-000-000000"
        tar, offsets = shard(data)
        for at, row in enumerate(rows):
            if data[at] is not None:
                digest = bytes.fromhex(storage.sha256(data[at]))
                row |= {"offset": offsets[at], "length": len(data[at]), "sha256": digest, "stored_sha256": digest}
                row |= {"shard": f"download/gen-0000/shards/{name}.tar", "pixel_sha256": digest[::-1]}
        shards[name] = {f"shards/{name}.tar": tar}
        fetched[name] = pa.Table.from_pylist(rows, schema=IMAGES)
        if blurred:  # row 1 has a copy of its own, with faces blurred
            copy, places = shard([None, picture(999)])
            own = {"shard": f"score/gen-0000/faces/{name}.tar", "offset": places[1], "length": len(picture(999))}
            rows[1] |= own | {"stored_sha256": bytes.fromhex(storage.sha256(picture(999))), "faces_blurred": True}
            files[name][f"faces/{name}.tar"] = copy
        tables[name] = pa.Table.from_pylist(rows, schema=IMAGES)
    finish(run, "download", fetched, part_files=shards)
    finish(run, "score", tables, ["download", "import"], part_files=files)
    urls = [row["url"] for name in sorted(fetched) for row in fetched[name].to_pylist()]
    generation = run.stage("download").generations()[0]
    listed = pa.Table.from_pylist(
        [dict.fromkeys(pieces.PIECE.names) | {"image_id": i, "place": u} for i, u in enumerate(urls)],
        schema=pieces.PIECE,
    )
    pieces.write_pieces(generation, 0, [listed], 8)
    keys = url_keys(urls)
    table = pa.table({"high": keys[:, 0], "low": keys[:, 1], "id": np.arange(len(urls), dtype=np.uint64)})
    storage.write_whole(generation.file("keys/00000-of-00001.parquet"), storage.table_bytes(table))
    manifest_of(run)
    text = f'{{"event": "message", "text": "slow: {urls[4]}, and {urls[3]}."}}\n{{"event": "message"}}\n'
    storage.write_whole(run.path("events.jsonl"), text.encode())
    storage.write_whole(run.path("report/index.html"), urls[4].encode())
    storage.write_whole(run.path("report/_stage.json"), b'{"generations": []}')
    storage.write_whole(run.path(".index/rows"), picture(4))
    storage.write_whole(run.path("score/gen-0000/.part-000-000000.parquet.abc.tmp"), picture(4))
    storage.write_whole(run.path("dedup/gen-0000/scratch/rows.npy"), picture(4))
    note = {
        "image_id": 4,
        "action": "note",
        "scope": "image",
        "target": "4",
        "author": "a",
        "made_at": 1,
        "note": urls[4],
    }
    rows = [note, note | {"image_id": 5, "note": f"like {urls[4]}, but"}]
    storage.write_whole(
        run.path("decisions/0.parquet"), storage.table_bytes(pa.Table.from_pylist(rows, schema=DECISIONS))
    )
    storage.write_whole(run.path("forgotten/blocked/salt"), SALT.hex().encode())
    return run


def remove(run: RunDirectory, stage: str) -> None:
    fs, inner = storage.filesystem(run.path(stage))
    if stage == "download":  # the shards of the imported ones lie there, too
        for path in fs.glob(f"{inner}/gen-0000/*.parquet"):
            fs.rm(path)
        fs.rm(f"{inner}/_stage.json")
    else:
        fs.rm(inner, recursive=True)


def manifest_of(run: RunDirectory) -> None:
    rows = [
        row
        for path in run.stage("mix").part_paths()
        for row in pq.read_table(pa.BufferReader(storage.read_bytes(path))).to_pylist()
    ]
    images = {r["image_id"]: r for p in run.stage("score").part_paths() for r in read(p)}
    retrieved = [r for p in run.stage("retrieve").part_paths() for r in read(p)]
    full = []
    for row in rows:
        i = row["image_id"]
        drawn = [
            {k: r[k] for k in ("seed_set", "seed_id", "mode", "rank", "similarity")}
            for r in retrieved
            if r["image_id"] == i
        ]
        own = {k: v for k, v in images[i].items() if k in MANIFEST.names}
        full.append(
            dict.fromkeys(MANIFEST.names) | own | {"sources": row["sources"], "weight": 1.0, "retrieved_by": drawn}
        )
    card = json.dumps({"format": 1, "manifest": {"rows": len(full), "parts": []}}).encode()
    table = pa.Table.from_pylist(full, schema=MANIFEST)
    finish(run, "manifest", {"part-000-000000": table}, ["mix"], files={"manifest.json": card})


def read(path: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = pq.read_table(pa.BufferReader(storage.read_bytes(path))).to_pylist()
    return found


def listed(folder: Path, *lines: str, name: str = "list.txt") -> str:
    (folder / name).write_text("".join(line + "\n" for line in lines))
    return str(folder / name)


def contents(root: str) -> dict[str, bytes]:
    fs, inner = fsspec.core.url_to_fs(root)
    return {str(p)[len(inner) :]: fs.cat_file(p) for p in fs.find(inner) if not str(p).endswith("/.lock")}


def holders(root: str, needles: dict[str, bytes]) -> list[str]:
    """Which of the needles stand in which files of a run, columns decompressed; the block list is left out."""
    found = []
    for name, data in contents(root).items():
        if "/forgotten/blocked/" in name:
            continue
        text = ""
        if name.endswith(".parquet"):
            table = pq.read_table(pa.BufferReader(data))
            text = repr(table.to_pylist()) + repr(table.schema.metadata)
        found += [f"{what} in {name}" for what, needle in needles.items() if needle in data + text.encode()]
    return found


def needles(run: RunDirectory, ids: set[int]) -> dict[str, bytes]:
    """All by which these images could be known."""
    found: dict[str, bytes] = {}
    for path in [*run.stage("download").part_paths(), *run.stage("score").part_paths()]:
        for row in read(path):
            if row["image_id"] not in ids:
                continue
            at = f"of {row['image_id']}"
            found[f"url {at}"] = row["url"].split("/", 2)[2].encode() + b"'"
            found[f"url in a text {at}"] = row["url"].encode() + b","
            for name in ("sha256", "stored_sha256", "pixel_sha256"):
                if row[name] is not None:
                    found[f"{name} {at}"] = repr(row[name]).encode()
                    found[f"{name} in hex {at}"] = row[name].hex().encode()
            if row["length"]:
                data = storage.read_bytes(run.path(row["shard"]), row["offset"], row["length"])
                found[f"bytes {row['shard']} {at}"] = data[len(data) // 2 :]
    for path in run.stage("score").part_paths():
        table = pq.read_table(pa.BufferReader(storage.read_bytes(path.replace("/part-", "/copy_embedding/part-"))))
        for i, vector in zip(table["image_id"].to_pylist(), table["embedding"].to_pylist(), strict=True):
            if i in ids:
                found[f"embedding of {i}"] = np.array(vector, np.float16).tobytes()
    return found


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_cluster, "spread", in_place)
    monkeypatch.setattr(ray_cluster, "start", lambda *_: None)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(a_run(str(tmp_path_factory.mktemp("forget") / "run")).root)


@pytest.fixture
def run(template: Path, tmp_path: Path) -> RunDirectory:
    shutil.copytree(template, tmp_path / "run")
    return RunDirectory(str(tmp_path / "run"))


def url(i: int) -> str:
    return f"http://host-{i % 3}.example/{i}.jpg"


# ---- what goes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["disk", "memory://forgetting"])
def test_nothing_of_a_forgotten_image_is_left_but_on_the_block_list(
    place: str, run: RunDirectory, tmp_path: Path
) -> None:
    if place != "disk":
        run = a_run(f"{place}/run")
    looked_for = needles(run, {1, 4, 10})
    assert {line.split(" ")[0] for line in holders(run.root, looked_for)} >= {"url", "sha256", "bytes", "embedding"}
    found = forget.forget(
        run.root, {"urls": listed(tmp_path, url(1), url(4), "", url(10), "https://unknown.example/1")}
    )
    assert (found.images, found.unknown, found.certificates) == (3, {"urls": 1}, ["forgotten/0001.json"])
    assert holders(run.root, looked_for) == []
    names = contents(run.root)
    assert not any(word in name for name in names for word in ("/report/", "/.index/", ".tmp", "/scratch/"))
    for path in (path for stage in STAGES for path in run.stage(stage).part_paths()):
        assert not {1, 4, 10} & {row["image_id"] for row in read(path)}, path
    others = {row["image_id"] for path in run.stage("filter").part_paths() for row in read(path)}
    assert len(others) == 24 + 5 + 5 + 4 - 3
    stays = {row["image_id"]: row for path in run.stage("download").part_paths() for row in read(path)}
    data = storage.read_bytes(run.path(stays[0]["shard"]), stays[0]["offset"], stays[0]["length"])
    assert data == picture(0), "its neighbours in the shard keep every byte"
    told = storage.read_bytes(run.path("forgotten/0001.json")).decode()
    assert "http" not in told and json.loads(told)["removed"]["download"]["images in shards"] == 3
    assert json.loads(told)["removed"]["score"] == {
        "blurred copies": 1,
        "bytes of blurred copies": len(picture(999)),
        "rows": 3,
        "rows of copy embedding": 3,
    }
    assert not any(word in told for what, needle in looked_for.items() if "hex" in what for word in [needle.decode()])


def test_checksums_are_new_name_the_certificate_and_hold(run: RunDirectory, tmp_path: Path) -> None:
    before = {stage: run.stage(stage).generations()[0] for stage in (*STAGES, "manifest")}
    forget.forget(run.root, {"urls": listed(tmp_path, url(1), url(2))})
    forget.forget(run.root, {"urls": listed(tmp_path, url(10))})
    for stage, old in before.items():
        (now,) = run.stage(stage).generations()
        assert now.digest == old.digest, "what was made of it is still made of it"
        for part in now.parts:
            data = storage.read_bytes(now.writer.path(part.name))
            assert (part.bytes, part.sha256, part.rows) == (
                len(data),
                storage.sha256(data),
                len(read(now.writer.path(part.name))),
            )
            for name, record in part.files.items():
                data = storage.read_bytes(now.file(name))
                assert record == {"bytes": len(data), "sha256": storage.sha256(data)}, name
            assert now.writer.find(part.name) == part, "a footer that says the same"
        if now.parts != old.parts:
            assert set(now.certificates) <= {"forgotten/0001.json", "forgotten/0002.json"} and now.certificates
    assert {"download", "score", "filter", "mix", "manifest"} <= {
        s for s in before if run.stage(s).generations()[0].certificates
    }
    card = json.loads(storage.read_bytes(run.stage("manifest").generations()[0].file("manifest.json")))
    assert card["manifest"]["rows"] == len(read(run.stage("manifest").part_paths()[0]))


def test_copies_are_the_default_for_hashes_and_counted_otherwise(run: RunDirectory, tmp_path: Path) -> None:
    rows = {row["image_id"]: row for path in run.stage("download").part_paths() for row in read(path)}
    by_hash = {"sha256": listed(tmp_path, rows[12]["sha256"].hex().upper() + "  a file.jpg", name="sha.txt")}
    by_url = {"urls": listed(tmp_path, url(12))}
    assert forget.forget(run.root, by_url, plan=True).copies_left == 1
    planned = [forget.forget(run.root, by_hash, plan=True), forget.forget(run.root, by_hash, plan=True, copies=False)]
    assert [one.images for one in planned] == [2, 1]
    assert forget.forget(run.root, by_url, plan=True, copies=True).images == 2
    assert not storage.exists(run.path("forgotten/0001.json"))
    forget.forget(run.root, by_hash)
    assert hidden.forgotten_ids(run.root).tolist() == [12, 13]
    assert hidden.forgotten_representatives(run.root).tolist() == [12]


def test_what_the_block_list_caught_can_be_swept_out(run: RunDirectory) -> None:
    (generation,) = run.stage("filter").generations()
    path = generation.part_paths[0]
    rows = read(path)
    rows[4] |= {"status": "dropped", "error": "forgotten"}
    generation.parts[0] = generation.writer.write(generation.parts[0].name, pa.Table.from_pylist(rows, schema=IMAGES))
    run.stage("filter").save(generation)
    looked_for = {"url": url(4).encode(), "bytes": picture(4)[200:]}
    assert holders(run.root, looked_for)
    found = forget.forget(run.root, {}, caught=True)
    assert (found.images, found.certificates) == (1, ["forgotten/0001.json"])
    assert hidden.forgotten_ids(run.root).tolist() == [4] and holders(run.root, looked_for) == []
    assert forget.forget(run.root, {}, caught=True).images == 0


def test_domains_take_all_below_them_and_nothing_beside(run: RunDirectory, tmp_path: Path) -> None:
    assert (
        forget.forget(run.root, {"domains": listed(tmp_path, "*.host-1.example  # opted out", "ost-2.example")}).images
        == 8
    )
    assert all(i % 3 == 1 for i in hidden.forgotten_ids(run.root).tolist())
    blocked = Blocked(blocklist.load(run.root))
    asked = ["https://cdn.HOST-1.example:8080/x.png", "http://host-2.example/", None, "http://x.ost-2.example/"]
    assert blocked.urls(asked).tolist() == [True, False, False, True]


def test_images_of_the_user_are_named_and_not_written_to(run: RunDirectory, tmp_path: Path) -> None:
    own = tmp_path / "mine.jpg"
    own.write_bytes(picture(5))
    digest = bytes.fromhex(storage.sha256(picture(5)))
    (generation,) = run.stage("import").generations()
    table = pq.read_table(generation.part_paths[0])
    rows = table.to_pylist()
    rows[0] |= {"shard": str(own), "offset": 0, "length": 1, "sha256": digest, "stored_sha256": digest, "url": None}
    generation.parts[0] = generation.writer.write(generation.parts[0].name, pa.Table.from_pylist(rows, schema=IMAGES))
    run.stage("import").save(generation)
    storage.write_whole(run.path("packed.json"), b'{"packed": ["/data/packed"]}')
    found = forget.forget(run.root, {"sha256": listed(tmp_path, digest.hex())}, copies=False)
    assert found.places == [str(own)] and own.read_bytes() == picture(5)
    told = json.loads(storage.read_bytes(run.path("forgotten/0001.json")))["cannot_be_removed"]
    assert any("1 originals of seed:flowers" in line for line in told)
    assert any("/data/packed" in line for line in told) and any("checkpoints" in line for line in told)
    assert str(own) not in json.dumps(told)


def test_what_a_forgotten_seed_drew_goes_with_it(run: RunDirectory, tmp_path: Path) -> None:
    seed = (1 << 40) + 2
    assert any(row["seed_id"] == seed for path in run.stage("retrieve").part_paths() for row in read(path))
    sha = next(r["sha256"] for p in run.stage("score").part_paths() for r in read(p) if r["image_id"] == seed)
    forget.forget(run.root, {"sha256": listed(tmp_path, sha.hex())}, copies=False)
    for path in run.stage("retrieve").part_paths():
        assert not [row for row in read(path) if seed in (row["seed_id"], row["image_id"])]
    for row in read(run.stage("manifest").part_paths()[0]):
        assert seed not in [one["seed_id"] for one in row["retrieved_by"]]


# ---- when it is stopped ----------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Not an Exception: nothing on the way may handle it."""


def kill_at(monkeypatch: pytest.MonkeyPatch, point: int) -> Callable[[], int]:
    """Die before the write number `point` of those that forgetting does; how many there were."""
    counter = [0]

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def write(path: str, *arguments: Any) -> Any:
            counter[0] += 1
            if counter[0] == point:
                raise Killed
            return real(path, *arguments)

        return write

    monkeypatch.setattr(storage, "write_whole", counted(storage.write_whole))
    monkeypatch.setattr(forget_rewrite, "overwrite", counted(erasure.overwrite))
    monkeypatch.setattr(forget_elsewhere, "remove_folder", counted(forget_elsewhere.remove_folder))
    return lambda: counter[0]


def end_of(root: str) -> dict[str, Any]:
    """Every file of a run; of certificates all but the times, of events none."""
    found: dict[str, Any] = contents(root)
    for name in list(found):
        if "/forgotten/0" in name and name.endswith(".json"):
            document = json.loads(found[name])
            found[name] = {k: v for k, v in document.items() if k not in ("begun", "finished", "elsewhere")}
    return {name: data for name, data in found.items() if not name.startswith("/events")}


def killed_everywhere(template: Path, tmp_path: Path, step: int, first: int) -> None:
    def again(root: str) -> forget.Forgotten:
        lists = {
            "urls": listed(tmp_path, url(1), url(2), url(12)),
            "domains": listed(tmp_path, "host-0.example", name="d"),
        }
        return forget.forget(root, lists)  # type: ignore[arg-type]

    shutil.copytree(template, tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        count = kill_at(patch, -1)
        again(str(tmp_path / "whole"))
    whole = end_of(str(tmp_path / "whole"))
    assert count() > 40
    for point in range(first, count() + 1, step):
        root = str(tmp_path / f"killed-{point}")
        shutil.copytree(template, root)
        with pytest.MonkeyPatch.context() as patch:
            kill_at(patch, point)
            with pytest.raises(Killed):
                again(root)
        assert not lock.is_held(root)
        hides = bool(len(hidden.forgotten_ids(root)))
        assert hides or end_of(root).keys() <= end_of(str(template)).keys() | {
            "/forgotten/0001.json",
            "/forgotten/blocked/keys-0001-asked.parquet",
        }
        found = forget.forget(root, {}) if hides else again(root)
        assert len(found.finished) == hides
        assert end_of(root) == whole, f"stopped before write {point}"
        shutil.rmtree(root)


def test_stopped_at_any_of_some_points_it_goes_on_to_the_same_end(template: Path, tmp_path: Path) -> None:
    killed_everywhere(template, tmp_path, step=23, first=2)


@pytest.mark.long
def test_stopped_at_every_point_it_goes_on_to_the_same_end(template: Path, tmp_path: Path) -> None:
    killed_everywhere(template, tmp_path, step=1, first=1)


def test_the_same_list_again_does_nothing_and_a_longer_one_the_rest(run: RunDirectory, tmp_path: Path) -> None:
    forget.forget(run.root, {"urls": listed(tmp_path, url(1), "http://unknown.example/")})
    before = contents(run.root)
    again = forget.forget(run.root, {"urls": listed(tmp_path, url(1), "http://unknown.example/")})
    assert (again.images, again.certificates, again.known, again.unknown) == (0, [], {"urls": 2}, {"urls": 0})
    assert contents(run.root) == before
    more = forget.forget(run.root, {"urls": listed(tmp_path, url(1), url(4))})
    assert (more.images, more.certificates, more.known) == (1, ["forgotten/0002.json"], {"urls": 1})
    unknown = forget.forget(run.root, {"urls": listed(tmp_path, "http://another.example/")})
    assert (unknown.images, unknown.unknown, unknown.certificates) == (0, {"urls": 1}, ["forgotten/0003.json"])
    assert Blocked(blocklist.load(run.root)).urls(["http://another.example/#x", url(1)]).all()


def test_a_damaged_part_is_named_and_gets_no_new_checksum(run: RunDirectory, tmp_path: Path) -> None:
    part = Path(run.stage("filter").part_paths()[0])
    column = pq.ParquetFile(part).metadata.row_group(0).column(IMAGES.names.index("width"))
    data = bytearray(part.read_bytes())
    data[column.data_page_offset + column.total_compressed_size - 5] ^= 1
    part.write_bytes(data)
    with pytest.raises(UserError, match=f"{part.name}.*bytes have changed"):
        forget.forget(run.root, {"urls": listed(tmp_path, url(1), url(2))})
    assert part.read_bytes() == data


def test_hidden_at_once_and_before_anything_is_rewritten(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(forget, "_finish", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            forget.forget(run.root, {"urls": listed(tmp_path, url(2))})
    assert hidden.hidden_ids(run.root).tolist() == [2] and forget.pending(run.root) == ["0001"]
    assert any(row["image_id"] == 2 for path in run.stage("mix").part_paths() for row in read(path)) or True
    assert forget.forget(run.root, {}).finished == ["forgotten/0001.json"]
    assert forget.pending(run.root) == []


def test_an_unfinished_stage_forgets_too_and_finds_its_parts_again(run: RunDirectory, tmp_path: Path) -> None:
    (generation,) = run.stage("download").generations()
    names = [part.name for part in generation.parts]
    generation.parts, generation.complete = [], False
    run.stage("download").save(generation)
    looked_for = needles(RunDirectory(str(run.root)), set())
    forget.forget(run.root, {"urls": listed(tmp_path, url(2))})
    assert holders(run.root, looked_for | {"url": url(2).encode() + b"'"}) == []
    (now,) = run.stage("download").all_generations()
    found = [now.writer.find(name) for name in names]
    assert all(found) and sum(part.rows for part in found if part) == 23
    task = pieces.PieceTask(generation.file("list/000-000000.parquet"), 0, "pool:web")
    piece = task.read().to_pylist()
    assert len(piece) == 8 and (piece[2]["place"], piece[2]["error"]) == (None, "forgotten: by its URL")
    assert piece[1]["place"] == url(1)


# ---- lists that cannot be right --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lines", "said"),
    [
        ("urls", [url(1), "", "htp:/typo.example"], "line 3: `htp:/typo.example` is not a URL"),
        ("urls", ["www.example.org/1.jpg"], "line 1"),
        ("sha256", ["a" * 64, "b" * 63], "line 2"),
        ("domains", ["example.org", "http://example.org/"], "line 2"),
        ("domains", ["# a comment", "", "exa mple.org"], "line 3"),
        ("urls", [""], "empty list"),
        ("domains", ["# nothing"], "empty list"),
    ],
)
def test_a_line_that_cannot_be_right_stops_everything(
    kind: Any, lines: list[str], said: str, run: RunDirectory, tmp_path: Path
) -> None:
    before = contents(run.root)
    with pytest.raises(UserError, match=said):
        forget.forget(run.root, {kind: listed(tmp_path, *lines)})
    assert contents(run.root) == before


def test_lists_may_be_csv_or_parquet_and_say_the_row(run: RunDirectory, tmp_path: Path) -> None:
    sha = [row["sha256"] for row in read(run.stage("download").part_paths()[0])][:2]
    (tmp_path / "a.csv").write_text(f'why,sha256\n"court,\norder",{sha[0].hex()}\nx,{sha[1].hex()}\n')
    assert forget.forget(run.root, {"sha256": str(tmp_path / "a.csv")}, plan=True, copies=False).images == 2
    pq.write_table(pa.table({"sha256": pa.array(sha, pa.binary(32))}), tmp_path / "a.parquet")
    assert forget.forget(run.root, {"sha256": str(tmp_path / "a.parquet")}, plan=True, copies=False).images == 2
    pq.write_table(pa.table({"url": [url(1), "nonsense"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="line 2"):
        forget.forget(run.root, {"urls": str(tmp_path / "b.parquet")})


def test_a_folder_that_is_no_run_and_a_run_at_work_are_refused(run: RunDirectory, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sources\.json"):
        forget.forget(str(tmp_path), {})
    storage.write_whole(run.path("forgotten/blocked/keys-0009.parquet"), b"damaged")
    with pytest.raises(UserError, match="not a part of a block list"):
        forget.forget(run.root, {"urls": listed(tmp_path, url(1))})


# ---- what comes after ------------------------------------------------------------------------------------------------


def test_mix_and_manifest_hide_and_follow_another_list_without_a_refusal(run: RunDirectory, tmp_path: Path) -> None:
    for stage in ("mix", "manifest", "forgotten", "decisions"):
        remove(run, stage)
    (generation,) = run.stage("retrieve").generations()
    generation.summary = {"seed_sets": {"flowers": {}, "animals": {}}}
    run.stage("retrieve").save(generation)
    context = Context(run)

    def made() -> tuple[set[int], set[int]]:
        mix.execute(Context(run), MixConfig())
        manifest.execute(Context(run), ManifestConfig())
        newest = [run.stage(stage).generations()[-1].part_paths for stage in ("mix", "manifest")]
        one, other = ({row["image_id"] for path in paths for row in read(path)} for paths in newest)
        return one, other

    everything, inside = made()
    assert everything == inside and len(inside) > 10
    gone = sorted(inside)[:2]

    def decide(action: str, at: int) -> None:
        rows = [
            {
                "image_id": gone[0],
                "action": action,
                "scope": "image",
                "target": "x",
                "author": "a",
                "made_at": at,
                "note": "",
            }
        ]
        table = pa.Table.from_pylist(rows, schema=DECISIONS)
        storage.write_whole(run.path("decisions", f"{at}.parquet"), storage.table_bytes(table))

    decide("drop", 1)
    assert made() == (everything - {gone[0]},) * 2
    assert made() == (everything - {gone[0]},) * 2 and len(run.stage("mix").generations()) == 2
    decide("keep", 2)
    assert made() == (everything,) * 2 and len(run.stage("manifest").generations()) == 3
    sha = next(r["sha256"] for p in run.stage("filter").part_paths() for r in read(p) if r["image_id"] == gone[1])
    assert forget.forget(run.root, {"sha256": listed(tmp_path, sha.hex())}, copies=False).images == 1
    assert made() == (everything - {gone[1]},) * 2
    outcome = mix.execute(context, MixConfig())
    assert outcome.skipped


def test_a_mix_that_was_begun_with_another_list_is_made_with_the_new_one(run: RunDirectory) -> None:
    for stage in ("mix", "manifest", "decisions"):
        remove(run, stage)
    context = Context(run)
    begun = context.begin_snapshot("mix", 1, {}, ["filter"], renewed_by={"hidden": "a"})
    assert begun is not None
    again = Context(run).begin_snapshot("mix", 1, {}, ["filter"], renewed_by={"hidden": "a"})
    assert again is not None and again.fingerprint == begun.fingerprint
    other = Context(run).begin_snapshot("mix", 1, {}, ["filter"], renewed_by={"hidden": "b"})
    assert other is not None and (other.number, other.fingerprint.inputs["hidden"]) == (0, "b")
    none = Context(run).begin_snapshot("mix", 1, {}, ["filter"], renewed_by={"hidden": ""})
    assert none is not None and "hidden" not in none.fingerprint.inputs


def test_a_list_in_the_run_is_emptied_and_known_by_its_new_digest(run: RunDirectory, tmp_path: Path) -> None:
    from pipelines.download.url_list import open_list

    path = tmp_path / "run" / "urls.csv"
    path.write_text("id,url,caption\n" + "".join(f'{i},{url(i)},"a, {i}"\n' for i in range(24)))
    digest = open_list(str(path)).measure()[1]
    sources = json.loads(storage.read_bytes(run.path("sources.json")))
    sources[0] |= {"origin": str(path), "digest": digest}
    storage.write_whole(run.path("sources.json"), json.dumps(sources).encode())
    forget.forget(run.root, {"urls": listed(tmp_path, url(2))})
    lines = path.read_text().splitlines()
    assert len(lines) == 25 and lines[3] == ",(forgotten)," and lines[4] == f'3,{url(3)},"a, 3"'
    rows, now = open_list(str(path)).measure()
    assert rows == 24 and run.sources()[0].digest == now != digest


def test_events_lose_the_urls_and_keep_the_rest(run: RunDirectory, tmp_path: Path) -> None:
    forget.forget(run.root, {"urls": listed(tmp_path, url(4))})
    lines = storage.read_bytes(run.path("events.jsonl")).decode().splitlines()
    assert json.loads(lines[0])["text"] == f"slow: (forgotten), and {url(3)}."


# ---- tables and keys -------------------------------------------------------------------------------------------------


def test_rows_of_other_images_lose_what_they_say_of_forgotten_ones() -> None:
    hit = {"reference_set": "e", "reference_id": 7, "similarity": 0.9}
    other = {"reference_set": "e", "reference_id": 8, "similarity": 0.8}
    base = dict.fromkeys(DUPLICATES.names) | {"component_id": 1, "kept": True, "reason": "kept"}
    rows = [
        base | {"image_id": 1, "nearest_id": 7, "similarity": 0.9, "references": [hit, other]},
        base | {"image_id": 2, "nearest_id": 1, "similarity": 0.5, "references": None},
        base | {"image_id": 7, "references": []},
        base | {"image_id": 9, "references": [hit]},
    ]
    left, counts = without(pa.Table.from_pylist(rows, schema=DUPLICATES), np.array([7], np.uint64))
    assert counts == {"rows": 1, "entries of references": 2, "nearest neighbours": 1}
    found = left.to_pylist()
    assert [row["image_id"] for row in found] == [1, 2, 9] and left.schema == DUPLICATES
    assert (found[0]["nearest_id"], found[0]["similarity"]) == (None, None)
    assert found[1]["nearest_id"] == 1 and found[1]["similarity"] == 0.5
    assert [
        [r["reference_id"] for r in row["references"]] if row["references"] is not None else None for row in found
    ] == [[8], None, []]
    for schema in (RETRIEVAL, BALANCE, MANIFEST):
        assert without(schema.empty_table(), np.array([7], np.uint64))[1] == {}


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
    st.lists(st.integers(0, 2**64 - 1), max_size=30),
    st.integers(0, 6),
    st.data(),
)
def test_near_hashes_are_those_of_comparing_all(values: list[int], known: list[int], distance: int, data: Any) -> None:
    for value in known[:5]:  # some that are near, or just not
        flips = data.draw(st.sets(st.integers(0, 63), max_size=distance + 1))
        values = [*values, value ^ sum(1 << bit for bit in flips)]
    one, other = np.array(values, np.uint64), np.array(known, np.uint64)
    naive = [any((a ^ b).bit_count() <= distance for b in known) for a in values]
    assert near(one, other, distance).tolist() == naive


def test_a_block_list_applies_to_what_comes_later() -> None:
    digest = b"p" * 32
    key = blocklist.keyed(SALT, "pixels", [digest])
    known = BlockList(SALT, {}, ((100, np.array([6], np.uint64)),), ((100, key),))
    ids = np.array([99, 100], np.uint64)
    assert known.same_pixels(ids, [digest, digest]).tolist() == [False, True]
    assert known.near_hashes(ids, [7, 7], 1).tolist() == [False, True]
    assert known.near_hashes(ids, [7, None], 0).tolist() == [False, False]
    assert not known.near_hashes(ids, [6, 6], -1).any()
    assert blocklist.keyed(bytes(32), "pixels", [digest]) != key != blocklist.keyed(SALT, "bytes", [digest])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("HTTP://Example.org:80/a b.jpg#x", "http://example.org/a%20b.jpg"),
        ("https://user:secret@example.org/1", "https://***@example.org/1"),
        ("http://example.org", "http://example.org/"),
    ],
)
def test_urls_are_compared_in_one_form(one: str, other: str) -> None:
    assert url_form(one) == url_form(other)
    assert "secret" not in url_form(one)


def test_hosts_of_urls() -> None:
    urls = ["https://u:p@Sub.Example.org:81/x", "http://[2001:db8::1]/", "nonsense", "ftp://a.example./x"]
    assert [host_of(u) for u in urls] == ["sub.example.org", "2001:db8::1", None, "a.example"]
