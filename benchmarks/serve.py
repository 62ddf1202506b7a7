"""Measures `curate serve` on synthetic runs of 1, 3 and 10 million rows, under 8 users at once.

    python -m benchmarks.serve make --rows 1000000 --folder DIR       # the run (benchmarks/serve_run.py) and its index
    python -m benchmarks.serve ask --rows 1000000 --folder DIR        # asks a server of its own; one entry of the file
    python -m benchmarks.serve words --rows 1000000 --folder DIR      # our index of words beside SQLite's FTS5

The server is a process of its own, its users are threads of this one: times are of whole answers, as a client sees
them. Every user asks for other images, hosts and words, so that no answer is asked twice. Beside the times stand the
server's CPU seconds per answer, which other work on the machine changes little, and the load average.
"""

import argparse
import json
import os
import random
import shutil
import sqlite3
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from benchmarks import machine
from benchmarks.serve_run import HOSTS, make
from pipelines.run_directory import RunDirectory
from pipelines.server import building, parts
from pipelines.server.opened import Opened

RESULTS = Path(__file__).parent / "results" / "serve.json"
USERS, PORT = 8, 8792
TARGET_ROWS = 300_000_000
LIBRARIES = ("duckdb", "fastapi", "numpy", "pyarrow", "uvicorn")


def run_of(folder: Path, rows: int) -> Path:
    return folder / f"run-{rows // 1_000_000}m"


def build(folder: Path, rows: int) -> None:
    """Make the run where it is missing, and its index; how long that took stands in the index."""
    run = run_of(folder, rows)
    if not run.exists():
        make(str(run), rows)
    opened = RunDirectory(str(run))
    root = building.index_root(opened, None)
    if building.find(opened, root) is None:
        building.build(opened, root, lambda text: print(text, flush=True))


def questions(index: Opened, rows: int) -> dict[str, Callable[[random.Random], str]]:
    """Kind -> an address drawn at random."""
    total = len(index.ids)
    components = len(index.lists["components"])
    clusters = len(index.lists["clusters_1"])
    kept = index.groups["near"].rows
    vocabulary = index.table.take(np.linspace(0, rows - 1, 2000).astype(np.int64))
    words = [word for row in vocabulary for word in (row["caption"] or "").split()]
    hashes = [row["sha256"].hex() for row in vocabulary]
    urls = [row["url"] for row in vocabulary if row["url"]]
    heads = [
        row["component_id"]
        for at in range(0, components, max(1, components // 500))
        for row in index.rows("components", at, 1)
    ]

    def held(draw: random.Random) -> int:
        at = draw.randrange(len(kept))
        return int(index.ids.read(int(kept.read(at, at + 1)[0]), int(kept.read(at, at + 1)[0]) + 1)[0])

    return {
        "image page": lambda draw: f"/image/{draw.randrange(rows)}",
        "images page": lambda draw: f"/images?after={draw.randrange(total)}",
        "filtered images page": lambda draw: (
            f"/images?status=ok&host=host-{int(HOSTS ** draw.random())}.example&after={draw.randrange(rows)}"
        ),
        "overview": lambda draw: "/",
        "failures page": lambda draw: f"/failures?start={draw.randrange(HOSTS // 2)}",
        "near copies page": lambda draw: f"/duplicates?start={draw.randrange(1, components)}",
        "component page": lambda draw: f"/component/{draw.choice(heads)}",
        "clusters page": lambda draw: f"/clusters?start={draw.randrange(1, clusters)}",
        "cluster page": lambda draw: f"/cluster/1/{draw.randrange(clusters)}",
        "retrieval page": lambda draw: f"/retrieval?start={draw.randrange(1, 190)}",
        "scores page": lambda draw: f"/scores/nsfw?value={draw.random():.6f}",
        "progress page": lambda draw: "/progress",
        "look-up by id": lambda draw: f"/api/images/{draw.randrange(rows)}",
        "look-up by sha256": lambda draw: f"/api/hash/{draw.choice(hashes)}",
        "look-up by URL": lambda draw: "/api/images?url=" + draw.choice(urls),
        "look-up by host": lambda draw: f"/api/images?host=host-{int(HOSTS ** draw.random())}.example",
        "full-size image": lambda draw: f"/api/images/{held(draw)}/bytes",
        "one word": lambda draw: "/api/images?words=" + draw.choice(words),
        "three words": lambda draw: "/api/images?words=" + "+".join(draw.sample(words, 3)),
        "two frequent words": lambda draw: "/api/images?words=" + "+".join(draw.sample(frequent(index), 2)),
        "more like this": lambda draw: f"/api/images/{held(draw)}/similar",
    }


def frequent(index: Opened) -> list[str]:
    """The words with the longest lists."""
    if not hasattr(index, "frequent"):
        seen: dict[str, int] = {}
        for row in index.table.take(np.arange(0, 200_000, 100)):
            for word in (row["caption"] or "").split():
                seen[word] = seen.get(word, 0) + 1
        index.frequent = sorted(seen, key=lambda w: -seen[w])[:40]  # type: ignore[attr-defined]
    return list(index.frequent)  # type: ignore[attr-defined]


LIMITS = {"one word": 2.0, "three words": 2.0, "two frequent words": 2.0, "more like this": 2.0}


def ask(folder: Path, rows: int, seconds: float) -> dict[str, Any]:
    """Start a server, ask it by USERS threads, kind after kind and then all mixed. Returns the entry of the file."""
    run = run_of(folder, rows)
    root = building.index_root(RunDirectory(str(run)), None)
    folder_of_index = building.find(RunDirectory(str(run)), root)
    assert folder_of_index is not None, "make it first"
    index = Opened(folder_of_index)
    kinds = questions(index, rows)
    command = [sys.executable, "-m", "cli.main", "serve", str(run), "--port", str(PORT)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    base = f"http://127.0.0.1:{PORT}"
    try:
        _wait(base)
        by_kind = {}
        for kind, draw in kinds.items():
            before = _cpu_seconds(server.pid)
            found = _users(base, {kind: draw}, seconds)[kind]
            cpu = (_cpu_seconds(server.pid) - before) / found["answers"]
            by_kind[kind] = found | {"server_cpu_s": round(cpu, 4), "limit_s": LIMITS.get(kind, 1.0)}
            print(kind, by_kind[kind], flush=True)
        mixed = _users(base, kinds, 3 * seconds)
        scan = _scan(base)
        memory = _memory(server.pid)
    finally:
        server.terminate()
        server.wait(30)
    document = index.document
    return {
        "rows": rows,
        "users": USERS,
        "kinds": by_kind,
        "mixed": {"p95_s": max(m["p95_s"] for m in mixed.values()), "kinds": mixed},
        "scan": scan,
        "server_peak_bytes": memory,
        "index": {
            "seconds": document["seconds"],
            "cpu_seconds": document["cpu_seconds"],
            "stages_s": document["stages"],
            "bytes": sum(document["bytes"].values()),
            "bytes_by_table": _grouped(document["bytes"]),
            "peak_bytes": document["peak_bytes"],
            "spaces": document["spaces"],
        },
        "run_bytes": sum(f.stat().st_size for f in run.rglob("*") if f.is_file() and ".index" not in f.parts),
        "machine": machine.facts(),
    }


def _grouped(sizes: dict[str, int]) -> dict[str, int]:
    found: dict[str, int] = {}
    for name, size in sizes.items():
        found[name.split("/")[0]] = found.get(name.split("/")[0], 0) + size
    return found


def _wait(base: str) -> None:
    for _ in range(600):
        try:
            if httpx.get(f"{base}/api/run", timeout=10).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise TimeoutError("the server does not answer")


def _users(base: str, kinds: dict[str, Callable[[random.Random], str]], seconds: float) -> dict[str, Any]:
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    wrong: list[str] = []
    lock = threading.Lock()

    def user(number: int) -> None:
        draw = random.Random(f"{number} {list(kinds)}")
        with httpx.Client(base_url=base, timeout=60, headers={"accept": "text/html"}, verify=False) as client:
            until = time.monotonic() + seconds
            while time.monotonic() < until:
                kind = draw.choice(list(kinds))
                address = kinds[kind](draw)
                started = time.monotonic()
                answer = client.get(address)
                took = time.monotonic() - started
                with lock:
                    times[kind].append(took)
                    if answer.status_code >= 500 or (answer.status_code >= 400 and answer.status_code != 404):
                        wrong.append(f"{answer.status_code} {address}")

    users = [threading.Thread(target=user, args=(n,)) for n in range(USERS)]
    for one in users:
        one.start()
    for one in users:
        one.join()
    assert not wrong, wrong[:5]
    return {
        kind: {
            "answers": len(found),
            "p50_s": round(statistics.median(found), 4),
            "p95_s": round(float(np.quantile(found, 0.95)), 4),
            "p99_s": round(float(np.quantile(found, 0.99)), 4),
        }
        for kind, found in times.items()
        if found
    }


def _scan(base: str) -> dict[str, Any]:
    """A scan of all rows: its time, that a second one is refused meanwhile, and how soon a cancelled one ends."""
    started = time.monotonic()
    refused = None
    with httpx.stream("GET", f"{base}/api/scan", params={"text": "zzqxqzz"}, timeout=600) as answer:
        for line in answer.iter_lines():
            if refused is None:
                refused = httpx.get(f"{base}/api/scan", params={"text": "x"}, timeout=60).status_code
            last = json.loads(line)
    whole = time.monotonic() - started
    with httpx.stream("GET", f"{base}/api/scan", params={"text": "zzqxqzz"}, timeout=600) as answer:
        lines = answer.iter_lines()
        next(lines)
        cancelled = time.monotonic()
        httpx.delete(f"{base}/api/scan", timeout=60)
        for line in lines:
            end = json.loads(line)
    return {
        "seconds": round(whole, 2),
        "rows": last["rows"],
        "second_one": refused,
        "cancelled_after_s": round(time.monotonic() - cancelled, 3),
        "cancelled_rows": end["rows"],
    }


def _cpu_seconds(pid: int) -> float:
    """Of a process and its threads so far."""
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _memory(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM")


def words(folder: Path, rows: int) -> dict[str, Any]:
    """SQLite's FTS5 over the same alt texts: seconds to make, bytes, seconds to ask; and ours."""
    run = run_of(folder, rows)
    opened = RunDirectory(str(run))
    found = building.find(opened, building.index_root(opened, None))
    assert found is not None, "make it first"
    index = Opened(found)
    path = folder / "words.sqlite"
    path.unlink(missing_ok=True)
    cpu, started = time.process_time(), time.monotonic()
    db = sqlite3.connect(path)
    db.execute("CREATE VIRTUAL TABLE words USING fts5(t, content='', detail=none, tokenize='unicode61')")
    for batch in parts.stream(parts.run_parts(opened).images, ["image_id", "caption"]):
        ids, captions = batch.column(0).to_pylist(), batch.column(1).to_pylist()
        db.executemany(
            "INSERT INTO words(rowid, t) VALUES (?, ?)", [(i, c) for i, c in zip(ids, captions, strict=True) if c]
        )
    db.commit()
    db.execute("INSERT INTO words(words) VALUES ('optimize')")
    db.commit()
    made = {"seconds": round(time.monotonic() - started, 1), "cpu_seconds": round(time.process_time() - cpu, 1)}
    draw = random.Random(0)
    some = [
        w
        for r in index.table.take(np.linspace(0, rows - 1, 500).astype(np.int64))
        for w in (r["caption"] or "").split()
    ]
    asked = [draw.sample(some, 1 + n % 3) for n in range(200)] + [draw.sample(frequent(index), 2) for _ in range(50)]
    theirs, ours = [], []
    for question in asked:
        started = time.monotonic()
        query = db.execute(
            "SELECT rowid FROM words WHERE words MATCH ? ORDER BY rowid LIMIT 48", [" AND ".join(question)]
        )
        their_ids = [row[0] for row in query.fetchall()]
        theirs.append(time.monotonic() - started)
        started = time.monotonic()
        page = index.listed({"words": " ".join(question)}, None, 48)
        ours.append(time.monotonic() - started)
        if page.after is None or len(page.images) == 48:
            assert [int(i["image_id"]) for i in page.images] == their_ids, question
    size = path.stat().st_size
    path.unlink()
    quantiles = {f"p{q}_s": lambda v, q=q: round(float(np.quantile(v, q / 100)), 5) for q in (50, 95, 99)}
    return {
        "rows": rows,
        "questions": len(asked),
        "equal_answers": True,
        "fts5": {**made, "bytes": size, **{n: f(theirs) for n, f in quantiles.items()}},
        "ours": {
            "seconds_to_sort": index.document["stages"]["words"],
            "bytes": index.document["bytes"]["groups/words"],
            **{n: f(ours) for n, f in quantiles.items()},
        },
        "machine": machine.facts(),
    }


def projection(entries: list[dict[str, Any]]) -> dict[str, Any]:
    """What grows, at TARGET_ROWS: a power law through the measured sizes, its exponent beside it."""
    if len(entries) < 2:
        return {}
    rows = np.log([e["rows"] for e in entries])
    growing: dict[str, Callable[[dict[str, Any]], float]] = {
        "index bytes": lambda e: e["index"]["bytes"],
        "index CPU seconds": lambda e: e["index"]["cpu_seconds"],
        "server peak bytes": lambda e: e["server_peak_bytes"],
        "scan seconds": lambda e: e["scan"]["seconds"],
        **{
            f"CPU seconds of {kind}": lambda e, kind=kind: e["kinds"][kind]["server_cpu_s"]
            for kind in entries[0]["kinds"]
        },
    }
    found = {}
    for name, value in growing.items():
        slope, offset = np.polyfit(rows, np.log([max(1e-6, value(e)) for e in entries]), 1)
        found[name] = {
            "measured": {str(e["rows"]): value(e) for e in entries},
            "exponent": round(float(slope), 3),
            "projected": float(f"{np.exp(offset + slope * np.log(TARGET_ROWS)):.3g}"),
        }
    return {"rows": TARGET_ROWS, "figures": found}


def store(key: str, entry: dict[str, Any]) -> None:
    """Put an entry into the result file, and the projection made from all."""
    document = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"sizes": {}}
    if key == "words":
        document["words"] = entry
    else:
        document["sizes"][key] = entry
    document["sizes"] = dict(sorted(document["sizes"].items(), key=lambda item: int(item[0])))
    document["projection"] = projection(list(document["sizes"].values()))
    document["versions"] = machine.versions(LIBRARIES)
    RESULTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["make", "ask", "words", "remove"])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=10.0, help="of each kind of question")
    given = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if given.what == "make":
        build(given.folder, given.rows)
    elif given.what == "ask":
        store(str(given.rows), ask(given.folder, given.rows, given.seconds))
    elif given.what == "words":
        store("words", words(given.folder, given.rows))
    else:
        shutil.rmtree(run_of(given.folder, given.rows), ignore_errors=True)


if __name__ == "__main__":
    main()
