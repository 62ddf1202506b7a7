"""Opt-out and takedown of a whole run over HTTP: what is forgotten is nowhere but on the block list, and stays away."""

import functools
import http.server
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests.e2e.pictures import folder, picture, write_config


@contextmanager
def served(root: Path) -> Iterator[int]:
    """A folder over HTTP on loopback; the port."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()


def curate(*arguments: str | Path, code: int = 0) -> dict[str, Any]:
    command = [str(Path(sys.executable).parent / "curate"), *map(str, arguments), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == code, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def rows(run: Path, stage: str) -> dict[int, dict[str, Any]]:
    """Rows of all generations of a stage by id; the newest row of an id."""
    paths = sorted((run / stage).glob("gen-*/part-*.parquet"))
    return {row["image_id"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def holders(run: Path, needles: dict[str, bytes]) -> list[str]:
    """Files of a run in which one of these bytes stands, decompressed columns included; not those of the block list."""
    found = []
    for path in sorted(p for p in run.rglob("*") if p.is_file() and "forgotten/blocked" not in str(p)):
        data = path.read_bytes()
        if path.suffix == ".parquet":
            data += repr(pq.read_table(path).to_pylist()).encode() + repr(pq.read_schema(path).metadata).encode()
        found += [f"{name} in {path.relative_to(run)}" for name, needle in needles.items() if needle in data]
    return found


def needles(row: dict[str, Any], data: bytes) -> dict[str, bytes]:
    """What must not be found any more of an image: row of score, bytes of the file."""
    made = {
        "url": row["url"].encode(),
        "path of the url": row["url"].split("/", 3)[3].encode(),
        "bytes": data[len(data) // 2 :][:64],
    }
    for name in ("sha256", "stored_sha256", "pixel_sha256"):
        made[name], made[f"{name} in hex"] = row[name], row[name].hex().encode()
        made[f"{name} as written by python"] = repr(row[name]).encode()
    return made


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_forgotten_image_is_gone_stays_away_and_the_run_goes_on(tmp_path: Path) -> None:
    web, run = tmp_path / "web", tmp_path / "run"
    web.mkdir()
    config = write_config(tmp_path, run, detectors=False)
    (tmp_path / "pool").rename(web / "pool")
    with served(web) as port:
        names = sorted(path.name for path in (web / "pool").iterdir())
        urls = {name: f"http://127.0.0.1:{port}/pool/{name}" for name in names}
        listed = tmp_path / "urls.txt"
        listed.write_text("\n".join([*urls.values(), urls[names[0]]]) + "\n")
        text = config.read_text().replace(f"folder: {tmp_path}/pool", f"urls: {listed}")
        config.write_text(text + f"download: {{allow_hosts: ['127.0.0.1:{port}'], shard_rows: 10, attempts: 1}}\n")
        curate("run", config)
        before = rows(run, "score")
        filtered, duplicates = rows(run, "filter"), rows(run, "dedup")
        kept = [i for i, row in duplicates.items() if row["kept"] and before[i]["url"]]
        # An image with copies by bytes and by likeness, asked for by its hash; one without, by its URL.
        original = next(i for i in before if before[i]["url"] == urls["0004.jpg"])
        component = {i for i, row in duplicates.items() if row["component_id"] == duplicates[original]["component_id"]}
        assert len(component) >= 3
        alone = next(i for i in kept if i not in component and before[i]["url"].split("/")[-1] == "0003.jpg")
        sha, opted = tmp_path / "sha.txt", tmp_path / "opted-out.txt"
        sha.write_text(before[original]["sha256"].hex() + "  what sha256sum prints.jpg\n" + 64 * "0" + "\n")
        opted.write_text(before[alone]["url"] + "\n")
        looked_for: dict[str, bytes] = {}
        vectors = {}
        for path in (run / "score/gen-0000/copy_embedding").glob("*.parquet"):
            table = pq.read_table(path)
            vectors |= dict(zip(table["image_id"].to_pylist(), table["embedding"].to_pylist(), strict=True))
        for i in [*component, alone]:
            data = (web / "pool" / before[i]["url"].split("/")[-1]).read_bytes()
            looked_for |= {f"{what} of {i}": needle for what, needle in needles(before[i], data).items()}
            looked_for[f"embedding of {i}"] = np.array(vectors[i], np.float16).tobytes()
        assert len({line.split(" of ")[0] for line in holders(run, looked_for)}) >= 7, "what is looked for is there now"

        planned = curate("forget", run, "--sha256", sha, "--urls", opted, "--plan")
        assert planned["images"] == len(component) + 1 and not (run / "forgotten").exists()
        found = curate("forget", run, "--sha256", sha, "--urls", opted)
        assert found["images"] == len(component) + 1 and found["unknown"] == {"urls": 0, "sha256": 1}
        assert holders(run, looked_for) == []
        told = (run / "forgotten" / "0001.json").read_text()
        assert not any(word in told for word in ("http://", before[original]["sha256"].hex()))
        again = curate("forget", run, "--sha256", sha, "--urls", opted)
        assert again["images"] == 0 and again["certificates"] == [] and again["known"] == {"urls": 1, "sha256": 2}

        gone = component | {alone}
        outcomes = {o["stage"]: o for o in curate("run", config)["stages"]}
        assert {s for s, o in outcomes.items() if not o["skipped"]} == {"mix", "manifest", "report"}
        newest = sorted((run / "manifest").glob("gen-*"))[-1]
        inside = [i for path in newest.glob("part-*.parquet") for i in pq.read_table(path)["image_id"].to_pylist()]
        assert inside and not gone & set(inside)
        assert holders(run, looked_for) == []

        # The same URL, the same bytes under another one, the same pixels in another format, and a near copy.
        more = web / "more"
        folder(more, 3, family=1, first=900)
        data = (web / "pool" / "0004.jpg").read_bytes()
        (more / "moved.jpg").write_bytes(data)
        Image.open(web / "pool" / "0004.jpg").save(more / "lossless.png")
        picture(3, family=1).resize((150, 112)).crop((5, 4, 145, 108)).save(more / "near.jpg", quality=70)
        relisted = [
            urls["0004.jpg"],
            before[alone]["url"],
            *(f"http://127.0.0.1:{port}/more/{p.name}" for p in more.iterdir()),
        ]
        (tmp_path / "more.txt").write_text("\n".join(relisted) + "\n")
        curate("add", run, tmp_path / "more.txt", "--as", "pool:more")
        new = {i: row for i, row in rows(run, "filter").items() if i >> 40 == 4}
        downloaded = {i: row for i, row in rows(run, "download").items() if i >> 40 == 4}
        assert [downloaded[i]["error"] for i in sorted(downloaded)[:2]] == ["forgotten: by its URL"] * 2
        by_name = {row["url"].split("/")[-1]: row for row in new.values() if row["url"]}
        assert (by_name["moved.jpg"]["status"], by_name["moved.jpg"]["error"]) == (
            "excluded",
            "forgotten: by its bytes",
        )
        assert (by_name["lossless.png"]["status"], by_name["lossless.png"]["error"]) == ("dropped", "forgotten")
        near = by_name["near.jpg"]
        caught = (near["status"], near["error"]) == ("dropped", "forgotten")
        assert caught or rows(run, "dedup")[near["image_id"]]["reason"] == "forgotten"
        late = sorted((run / "manifest").glob("gen-*"))[-1]
        inside = [i for path in late.glob("part-*.parquet") for i in pq.read_table(path)["image_id"].to_pylist()]
        assert not {
            row["image_id"] for name, row in by_name.items() if name in ("moved.jpg", "lossless.png", "near.jpg")
        } & set(inside)
        # The same pixels have the same hash and the same vector, until what was caught is swept out.
        assert holders(run, {k: v for k, v in looked_for.items() if not k.startswith(("pixel", "embedding"))}) == []
        swept = curate("forget", run, "--caught")
        assert swept["images"] >= 2 and filtered
        assert holders(run, looked_for) == []

        # A representative alone is asked for by its URL, and another is to stand for its component.
        first = next(i for i in kept if i not in gone and before[i]["url"].split("/")[-1].startswith("0012"))
        others = {i for i, row in duplicates.items() if row["component_id"] == duplicates[first]["component_id"]}
        opted.write_text(before[first]["url"] + "\n")
        found = curate("forget", run, "--urls", opted, "--re-elect")
        assert (found["images"], found["copies_left"]) == (1, len(others) - 1) and len(others) > 1
        elected = rows(run, "dedup")
        assert first not in elected and sum(elected[i]["kept"] for i in others - {first}) == 1
        late = sorted((run / "manifest").glob("gen-*"))[-1]
        inside = [i for path in late.glob("part-*.parquet") for i in pq.read_table(path)["image_id"].to_pylist()]
        assert inside and not (gone | {first}) & set(inside)
        curate("dedup", run, "--threshold", "0.85", "--rebuild")
        assert not (gone | {first}) & set(rows(run, "dedup"))
