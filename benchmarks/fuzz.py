"""Fuzzes what reads strangers' bytes and counts what comes of it: inputs, outcomes, crashes.

    pip download --no-deps --no-binary pillow pillow==13.0.0 && tar xf pillow-13.0.0.tar.gz
    python -m benchmarks.fuzz --seconds 60 --pillow pillow-13.0.0/Tests/images --out benchmarks/results/fuzz.json

Each target of fuzz_targets.py gets mutated honest inputs in a process of its own, so that a crash of native code is
seen; targets written in Python also run under atheris where it is installed (`pip install '.[fuzz]'`), which looks for
inputs that reach new lines. --pillow: every file there goes through the decoder. Inputs that crash are kept in --keep.
"""

import argparse
import contextlib
import json
import mmap
import multiprocessing
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks import machine
from benchmarks.fuzz_targets import CRASH_IS_HANDLED, LIMITS, TARGETS, mutate
from embeddings.decoding import DecodeError, DecodeLimits, Decoder

GUIDED = ("header", "url", "robots", "answer", "configuration", "list", "tar")
SLOW_S = 10.0
"""A target that takes longer over one input, its decoder's own bounds aside, counts as hanging."""
_HEAD = 16


def campaign(name: str, seconds: float, seed: int, keep: Path) -> dict[str, Any]:
    """Mutated inputs for so long; a process that dies or hangs is replaced and its input kept."""
    shared = mmap.mmap(-1, _HEAD + (8 << 20))
    queue: Any = multiprocessing.SimpleQueue()
    outcomes: Counter[str] = Counter()
    crashes: Counter[str] = Counter()
    inputs, began, round_, slowest = 0, time.monotonic(), 0, 0.0
    while (left := seconds - (time.monotonic() - began)) > 0:
        process = multiprocessing.Process(target=_worker, args=(name, left, f"{seed}/{name}/{round_}", shared, queue))
        process.start()
        died = _watch(process, shared)
        if not queue.empty():
            report = queue.get()
            inputs += report["inputs"]
            outcomes.update(report["outcomes"])
            slowest = max(slowest, report["slowest_s"])
            died = report["crash"] or died
        else:
            inputs += int.from_bytes(shared[:8], "little")
        if died:
            crashes[died] += 1
            size = int.from_bytes(shared[8:16], "little")
            keep.mkdir(parents=True, exist_ok=True)
            (keep / f"{name.replace(' ', '-')}-{len(crashes)}-{sum(crashes.values())}").write_bytes(
                shared[_HEAD : _HEAD + size]
            )
        round_ += 1
        if sum(crashes.values()) >= 20:
            break
    return {
        "inputs": inputs,
        "seconds": round(time.monotonic() - began, 1),
        "outcomes": dict(outcomes.most_common()),
        "handled_decoder_deaths": sum(outcomes[reason] for reason in CRASH_IS_HANDLED),
        "slowest_s": round(slowest, 3),
        "crashes": dict(crashes),
    }


def _worker(name: str, seconds: float, seed: str, shared: mmap.mmap, queue: Any) -> None:
    target, chance = TARGETS[name], random.Random(seed)
    seeds = target.seeds()
    outcomes: Counter[str] = Counter()
    inputs, slowest, end, crash = 0, 0.0, time.monotonic() + seconds, ""
    with contextlib.redirect_stderr(open(os.devnull, "w")):
        while time.monotonic() < end and not crash:
            data = mutate(chance.choice(seeds), chance, seeds)[: 8 << 20]
            inputs += 1
            shared[:_HEAD] = inputs.to_bytes(8, "little") + len(data).to_bytes(8, "little")
            shared[_HEAD : _HEAD + len(data)] = data
            start = time.monotonic()
            try:
                outcomes[target.run(data)] += 1
            except Exception as error:
                crash = f"{type(error).__name__}: {str(error)[:120]}"
            slowest = max(slowest, time.monotonic() - start)
    queue.put({"inputs": inputs, "outcomes": outcomes, "slowest_s": slowest, "crash": crash})


def _watch(process: Any, shared: mmap.mmap) -> str:
    seen, since = b"", time.monotonic()
    while process.is_alive():
        process.join(0.5)
        if shared[:8] != seen:
            seen, since = shared[:8], time.monotonic()
        elif time.monotonic() - since > SLOW_S + 2 * LIMITS.wall_s:
            process.kill()
            process.join()
            return "hangs"
    return "" if process.exitcode == 0 else f"process ended with {process.exitcode}"


def guided(name: str, seconds: float, keep: Path) -> dict[str, Any]:
    """The same target under atheris, in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "corpus"
        corpus.mkdir()
        for number, data in enumerate(TARGETS[name].seeds()):
            (corpus / str(number)).write_bytes(data)
        keep.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", GUIDED_PROGRAM, name, str(corpus)]
        options = [f"-max_total_time={round(seconds)}", "-print_final_stats=1", f"-artifact_prefix={keep}/guided-"]
        began = time.monotonic()
        found = subprocess.run(
            [*command, *options, "-max_len=8192", "-timeout=20", "-rss_limit_mb=4096"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        if "No module named 'atheris'" in found.stderr:
            return {"inputs": 0, "note": "atheris is not installed"}
        ran = re.search(r"number_of_executed_units: (\d+)", found.stderr)
        covered = re.findall(r"cov: (\d+)", found.stderr)
        return {
            "inputs": int(ran[1]) if ran else 0,
            "seconds": round(time.monotonic() - began, 1),
            "edges_at_start": int(covered[0]) if covered else None,
            "edges_at_end": int(covered[-1]) if covered else None,
            "inputs_that_reached_new_edges": len(list(corpus.iterdir())) - len(TARGETS[name].seeds()),
            "crashes": {} if found.returncode == 0 else {found.stderr.strip()[-600:]: 1},
        }


GUIDED_PROGRAM = """
import sys, atheris
with atheris.instrument_imports(include=["pipelines", "curation", "embeddings", "protego", "yaml", "csv", "http"]):
    from benchmarks.fuzz_targets import TARGETS
    target = TARGETS[sys.argv[1]]
    target.seeds()
atheris.Setup([sys.argv[0], *sys.argv[2:]], lambda data: (target.run(data), None)[1])
atheris.Fuzz()
"""


def corpus(folder: Path) -> dict[str, Any]:
    """Every file of a folder through one decoder, as a worker of a stage does it: a verdict for each, none lost."""
    limits = DecodeLimits()
    verdicts: Counter[str] = Counter()
    slow: list[tuple[float, str, str]] = []
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    deaths: list[str] = []
    with Decoder(limits) as decoder:
        for path in files:
            start = time.monotonic()
            for what, ask in (("decode", decoder.decode), ("header", decoder.probe)):
                try:
                    ask(path.read_bytes())
                    verdict = "pixels" if what == "decode" else "read"
                except DecodeError as error:
                    verdict = error.reason
                verdicts[f"{what}: {verdict}"] += 1
                if verdict in CRASH_IS_HANDLED:
                    deaths.append(f"{path.name} ({what}: {verdict})")
            slow.append((round(time.monotonic() - start, 2), path.name, verdict))
    return {
        "folder": "/".join(folder.resolve().parts[-3:]),
        "files": len(files),
        "verdicts": dict(sorted(verdicts.items())),
        "all_handled": sum(verdicts.values()) == 2 * len(files),
        "ended_by_the_decoders_bounds": deaths,
        "slowest": sorted(slow, reverse=True)[:5],
    }


def _sum_up(found: dict[str, Any], options: argparse.Namespace) -> None:
    """Counts over what was done so far, written: a campaign may be ended early."""
    entries = [entry for engine in ("mutated", "guided") for entry in found[engine].values()]
    found["inputs"] = sum(entry["inputs"] for entry in entries)
    found["crashes"] = sum(sum(entry.get("crashes", {}).values()) for entry in entries)
    found["seconds_per_target"], found["seed"] = options.seconds, options.seed
    found["versions"] = machine.versions(["pillow", "pyarrow", "protego", "PyYAML", "numpy", "atheris"])
    found["machine"] = machine.facts()
    if options.out is not None:
        options.out.write_text(json.dumps(found, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="per target and engine")
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pillow", type=Path, help="folder of Pillow's test images")
    parser.add_argument("--keep", type=Path, default=Path(".cache/fuzz"), help="where crashing inputs go")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    multiprocessing.set_start_method("fork")  # the input in hand lies in memory that both see
    found: dict[str, Any] = {"mutated": {}, "guided": {}}
    if options.pillow is not None:
        found["pillow"] = corpus(options.pillow)
        print(json.dumps(found["pillow"], indent=1), flush=True)
    for name in options.targets:
        found["mutated"][name] = campaign(name, options.seconds, options.seed, options.keep)
        print(name, json.dumps(found["mutated"][name]), flush=True)
        if name in GUIDED:
            found["guided"][name] = guided(name, options.seconds, options.keep)
            print(name, "guided", json.dumps(found["guided"][name]), flush=True)
        _sum_up(found, options)
    print(f"{found['inputs']:,} inputs, {found['crashes']} crashes")
    sys.exit(1 if found["crashes"] else 0)


if __name__ == "__main__":
    main()
