"""fastdup, imagededup and cleanvision on a folder of real images with planted copies, beside this project's demo run.

    python -m benchmarks.image_rivals --run demo-run --web demo-web --out benchmarks/results/image_rivals.json \
        --python fastdup=/tmp/env-fastdup/bin/python --python imagededup=/tmp/env-imagededup/bin/python

Each tool runs in an environment of its own (`python -m venv`, `pip install TOOL`), which runs this very file with
`--tool`. The folder: the demo's originals and their planted copies, as many as the demo's filters let through. The
originals were chosen so that no two have a SSCD similarity above 0.6, which is this project's own criterion: its
precision between originals is favoured by that, recall is not. True are the pairs (copy, its original); a tool's
pairs are counted as it reports them, and as its components, where every two images of one are taken for copies.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Pairs = set[tuple[str, str]]
HASH_DISTANCES = (0, 4, 8, 10, 12, 16)
COMPONENT_THRESHOLDS = (0.80, 0.85, 0.90, 0.93, 0.96, 0.98)


def pair(one: str, other: str) -> tuple[str, str]:
    first, second = sorted((Path(one).name, Path(other).name))
    return first, second


# ---- in a tool's own environment: nothing of this project is imported ---------------------------------------------


def imagededup(images: str, method: str) -> dict[str, Pairs]:
    """Hashes at several distances, its default 10 among them; the CNN at its default 0.9."""
    from imagededup import methods

    tool = getattr(methods, method)()
    found = {}
    encodings = tool.encode_images(image_dir=images, num_enc_workers=0)
    if method == "CNN":
        answer = tool.find_duplicates(encoding_map=encodings, min_similarity_threshold=0.9, num_sim_workers=0)
        return {"0.9": {pair(a, b) for a, near in answer.items() for b in near if a != b}}
    for distance in HASH_DISTANCES:
        answer = tool.find_duplicates(encoding_map=encodings, max_distance_threshold=distance, num_dist_workers=0)
        found[str(distance)] = {pair(a, b) for a, near in answer.items() for b in near if a != b}
    return found


def cleanvision(images: str, _: str) -> dict[str, Pairs]:
    """Exact and near duplicates with its defaults, which are sets: every two of one are a pair."""
    from cleanvision import Imagelab

    lab = Imagelab(data_path=images)
    lab.find_issues({"exact_duplicates": {}, "near_duplicates": {}}, n_jobs=1, verbose=False)
    sets = [s for kind in ("exact_duplicates", "near_duplicates") for s in lab.info[kind]["sets"]]
    return {"default": {pair(a, b) for s in sets for a in s for b in s if a < b}}


def fastdup(images: str, _: str) -> dict[str, Pairs]:
    """The similar pairs it lists (two neighbours of each image, its default) at several thresholds of its cosine."""
    import fastdup as tool

    with tempfile.TemporaryDirectory() as work:
        run = tool.create(work_dir=work, input_dir=images)
        run.run(num_threads=1, threshold=min(COMPONENT_THRESHOLDS), ccthreshold=0.96, overwrite=True, verbose=False)
        table = run.similarity()
        rows = list(zip(table["filename_from"], table["filename_to"], table["distance"], strict=True))
    return {f"{t:g}": {pair(a, b) for a, b, near in rows if near >= t and a != b} for t in COMPONENT_THRESHOLDS}


TOOLS: dict[str, tuple[str, Callable[[str, str], dict[str, Pairs]], str]] = {
    "imagededup PHash": ("imagededup", imagededup, "PHash"),
    "imagededup DHash": ("imagededup", imagededup, "DHash"),
    "imagededup WHash": ("imagededup", imagededup, "WHash"),
    "imagededup AHash": ("imagededup", imagededup, "AHash"),
    "imagededup CNN": ("imagededup", imagededup, "CNN"),
    "cleanvision": ("cleanvision", cleanvision, ""),
    "fastdup": ("fastdup", fastdup, ""),
}


def as_tool(name: str, images: str, out: str) -> None:
    """Write what a tool finds: {setting: pairs}."""
    from importlib.metadata import version

    package, function, argument = TOOLS[name]
    found = function(images, argument)
    document = {"version": version(package), "found": {key: sorted(pairs) for key, pairs in found.items()}}
    Path(out).write_text(json.dumps(document))


# ---- here ---------------------------------------------------------------------------------------------------------


def folder_of_images(run: Path, web: Path, folder: Path) -> tuple[Pairs, dict[str, str], Pairs]:
    """Link the images into `folder`. Returns (true pairs, the transformation of each copy, this project's pairs)."""
    import pyarrow.parquet as pq

    from demo.evaluation import Run

    curated = Run(run, pq.read_table(web / "truth.parquet"))
    site = json.loads((web / "site.json").read_text())
    files = {
        f"http://{address}:{port}{path}": page["file"]
        for host, (address, port) in site["places"].items()
        for path, page in site["pages"].get(host, {}).items()
        if "file" in page
    }
    moved = {
        f"http://{address}:{port}{path}": page["to"]
        for host, (address, port) in site["places"].items()
        for path, page in site["pages"].get(host, {}).items()
        if page.get("do") == "redirect"
    }
    names: dict[str, str] = {}
    component: dict[str, int] = {}

    def link(truth: dict[str, Any], letter: str) -> str | None:
        image = curated.image(truth)
        where = curated.component(image)
        file = files.get(moved.get(truth["url"], truth["url"]))
        if where is None or file is None:
            return None
        name = f"{letter}{truth['row']:05d}{Path(file).suffix.lower()}"
        (folder / name).symlink_to(Path(file).absolute())
        component[name] = where
        return name

    for original in curated.of("original"):
        if (name := link(original, "o")) is not None:
            names[original["sha256"]] = name
    true: Pairs = set()
    kinds: dict[str, str] = {}
    for copy in curated.of("copy"):
        if copy["of"] in names and (name := link(copy, "c")) is not None:
            true.add(pair(name, names[copy["of"]]))
            kinds[name] = copy["copy"]
    groups: dict[int, list[str]] = {}
    for name, number in component.items():
        groups.setdefault(number, []).append(name)
    return true, kinds, {pair(a, b) for members in groups.values() for a in members for b in members if a < b}


def marked(pairs: Pairs, true: Pairs, kinds: dict[str, str]) -> dict[str, Any]:
    """Recall and precision of the pairs, and of the pairs of their components; the largest component."""
    groups = components(pairs)
    joined = {pair(a, b) for members in groups for a in members for b in members if a < b} if groups else set()
    found = true & pairs
    by_kind = {
        kind: round(
            sum(1 for p in found if kinds[p[0]] == kind) / max(1, sum(1 for p in true if kinds[p[0]] == kind)), 4
        )
        for kind in sorted(set(kinds.values()))
    }
    return {
        "pairs": len(pairs),
        "recall": _share(len(found), len(true)),
        "precision": _share(len(found), len(pairs)),
        "recall_by_transformation": by_kind,
        "pairs_of_components": len(joined),
        "recall_of_components": _share(len(true & joined), len(true)),
        "precision_of_components": _share(len(true & joined), len(joined)),
        "largest_component": max((len(members) for members in groups), default=1),
    }


def components(pairs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Connected components of several images."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        parent.setdefault(name, name)
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for one, other in pairs:
        parent[root(one)] = root(other)
    groups: dict[str, list[str]] = {}
    for name in parent:
        groups.setdefault(root(name), []).append(name)
    return [sorted(members) for members in groups.values()]


def _share(part: int, whole: int) -> float | None:
    return round(part / whole, 4) if whole else None


def measured(python: str, name: str, images: Path, timeout: float) -> dict[str, Any]:
    """Run a tool in its environment; what it found and what it cost, or its error."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "found.json"
        command = [python, str(Path(__file__).absolute()), "--tool", name, "--images", str(images), "--out", str(out)]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=timeout, cwd=folder, check=False
            )
            error = done.stderr.strip().splitlines()[-1:] if done.returncode or not out.exists() else []
        except subprocess.TimeoutExpired:
            error = [f"not done after {timeout:g} s"]
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        document: dict[str, Any] = {
            "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
            "wall_seconds": round(time.perf_counter() - begin, 1),
        }
        if error or not out.exists():
            return document | {"error": error[0] if error else "no result"}
        answer = json.loads(out.read_text())
        return document | answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", choices=list(TOOLS), help="run one, in its environment")
    parser.add_argument("--images")
    parser.add_argument("--run", type=Path, default=Path("demo-run"))
    parser.add_argument("--web", type=Path, default=Path("demo-web"))
    parser.add_argument("--python", action="append", default=[], help="PACKAGE=interpreter of its environment")
    parser.add_argument("--timeout", type=float, default=900.0)
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    if arguments.tool:
        as_tool(arguments.tool, arguments.images, arguments.out)
        return
    from benchmarks import machine

    interpreters = dict(text.split("=", 1) for text in arguments.python)
    images = Path(tempfile.mkdtemp(prefix="image-rivals-"))
    true, kinds, ours = folder_of_images(arguments.run, arguments.web, images)
    document: dict[str, Any] = {
        "program": "benchmarks/image_rivals.py",
        "machine": machine.facts(),
        "images": len(list(images.iterdir())),
        "true_pairs": len(true),
        "copies": {kind: list(kinds.values()).count(kind) for kind in sorted(set(kinds.values()))},
        "this project": {
            "what": "components of the demo run: exact, pixel and PCA-hash duplicates and SSCD above 0.6",
            "found": {"0.6": marked(ours, true, kinds)},
        },
    }
    for name, (package, _, _) in TOOLS.items():
        if package not in interpreters:
            continue
        answer = measured(interpreters[package], name, images, arguments.timeout)
        if "found" in answer:
            answer["found"] = {
                key: marked({(a, b) for a, b in pairs}, true, kinds) for key, pairs in answer["found"].items()
            }
        document[name] = answer
        Path(arguments.out).write_text(json.dumps(document, indent=1) + "\n")
        print(name, json.dumps(answer), flush=True)
    shutil.rmtree(images)


if __name__ == "__main__":
    sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).parent.resolve()]
    main()
