"""The pages of a run whose contents are known."""

import io
import itertools
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from curation import audit
from curation.audit.run_tables import open_run
from curation.errors import UserError
from curation.schemas import DECISIONS
from pipelines.context import Context
from pipelines.description import current_parts
from pipelines.run_directory import RunDirectory
from pipelines.stages import manifest, report
from pipelines.stages.report import ReportConfig
from tests.pipelines.synthetic_run import LEAVES, SyntheticRun, build, picture

MENU = ["index", "failures", "filters", "duplicates", "decontamination", "clusters", "retrieval", "balance"]


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)

    def classes(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> SyntheticRun:
    found = build(tmp_path_factory.mktemp("run"))
    set_thresholds(found)
    with pytest.MonkeyPatch.context() as patch:
        in_process(patch)
        manifest.execute(Context(run=found.run), manifest.ManifestConfig())
        report.execute(Context(run=found.run), ReportConfig())
    return found


@pytest.fixture(scope="module")
def pages(made: SyntheticRun) -> Mapping[str, str]:
    return pages_of(made)


def set_thresholds(made: SyntheticRun) -> None:
    """Options of the stages that decide by thresholds, which the synthetic run leaves out."""
    chosen = {
        "filter": {"nsfw_threshold": 0.7, "solid_colour": 2.0},
        "dedup": {"threshold": 0.88, "against_threshold": 0.45},
    }
    for stage, options in chosen.items():
        directory = made.run.stage(stage)
        (generation,) = directory.all_generations()
        generation.fingerprint = replace(generation.fingerprint, options=options)
        directory.save(generation)


def files_of(made: SyntheticRun) -> dict[str, bytes]:
    folder = Path(made.run.path("report"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "_"}


def pages_of(made: SyntheticRun) -> dict[str, str]:
    return {n.removesuffix(".html"): d.decode() for n, d in files_of(made).items() if n.endswith(".html")}


def words_of(page: str) -> str:
    return re.sub(r"\s+", " ", " ".join(Reader(page).text))


def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray would do is done here."""
    monkeypatch.setattr(
        Context, "spread", lambda self, f, calls, shared=None, **_: ((n, f(*a, shared)) for n, a in calls)
    )


def test_there_is_a_page_per_subject_and_one_per_seed_set_and_cluster(pages: Mapping[str, str]) -> None:
    assert set(MENU) <= set(pages)
    assert set(pages) - set(MENU) == {"retrieval-01", "retrieval-02", "cluster-2-0", "cluster-2-1"}
    for page in pages.values():
        menu = [a["href"] for tag, a in Reader(page).tags if tag == "a"][1 : 1 + len(MENU)]
        assert menu == [f"{name}.html" for name in MENU]
    sections = {a["id"] for tag, a in Reader(pages["index"]).tags if tag == "section"}
    assert sections == {"inside", "flow", "warnings", "sources", "card"}


def test_every_link_leads_to_something_in_the_folder(made: SyntheticRun, pages: Mapping[str, str]) -> None:
    files = files_of(made)
    ids = {name: {a["id"] for _, a in Reader(page).tags if "id" in a} for name, page in pages.items()}
    for name, page in pages.items():
        used = [a["id"] for _, a in Reader(page).tags if "id" in a]
        assert len(used) == len(set(used)), f"{name}: an id is there twice"
        for tag, attributes in Reader(page).tags:
            target = attributes.get("href")
            if target is None:
                continue
            file, _, anchor = target.partition("#")
            assert not file or file in files, (name, target)
            where = file.removesuffix(".html") if file else name
            assert not anchor or anchor in ids[where], (name, target)
            assert tag in ("a", "link", "image")


def test_every_page_is_reached_from_the_first(pages: Mapping[str, str]) -> None:
    seen, ahead = set(), ["index"]
    while ahead:
        name = ahead.pop()
        if name not in seen:
            seen.add(name)
            links = [a.get("href") or "" for tag, a in Reader(pages[name]).tags if tag == "a"]
            ahead += [link.split("#")[0].removesuffix(".html") for link in links if ".html" in link]
    assert seen == set(pages)


def test_pages_ask_nothing_of_a_network_and_run_nothing(made: SyntheticRun, pages: Mapping[str, str]) -> None:
    for page in pages.values():
        reader = Reader(page)
        assert not [tag for tag, _ in reader.tags if tag in ("script", "img", "iframe", "form", "style")]
        assert [a["href"] for tag, a in reader.tags if tag == "link"] == ["style.css"]
        assert not any(name.startswith("on") or name == "style" for _, a in reader.tags for name in a)
        assert "default-src 'none'" in page and "unsafe" not in page.split("<body>")[0]
    assert not re.findall(rb"url\(|@import|http", files_of(made)["style.css"])


def test_every_thumbnail_has_a_name_and_every_table_a_caption(pages: Mapping[str, str]) -> None:
    thumbs = [t for page in pages.values() for t in Reader(page).classes("thumb")]
    assert len(thumbs) > 100 and all(t["role"] == "img" and t["aria-label"] for t in thumbs)
    for page in pages.values():
        tags = [tag for tag, _ in Reader(page).tags]
        assert tags.count("table") == tags.count("caption")
        assert tags.count("h1") == 1
        levels = [int(t[1]) for t in tags if re.fullmatch("h[1-6]", t)]
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_images_flagged_as_not_safe_are_veiled_everywhere_and_all_pictures_of_the_filters(
    pages: Mapping[str, str],
) -> None:
    for name, page in pages.items():
        reader = Reader(page)
        boxes = [a for tag, a in reader.tags if tag == "input" and a.get("id") != "unveil"]
        assert len(boxes) == len(reader.classes("veil")) and all(a["type"] == "checkbox" for a in boxes)
        flagged = {n for a in boxes for n in re.findall(r"web #(\d+)", str(a["aria-label"])) if "not safe" in str(a)}
        assert all(int(n) % 10 == 9 for n in flagged), name
        shown = [int(n) for t in reader.classes("thumb") for n in re.findall(r"web #(\d+)", str(t["aria-label"]))]
        assert all(str(n) in flagged for n in shown if n % 10 == 9), name
        if name == "filters":
            assert len(boxes) == len(reader.classes("thumb")) > 20
            assert [a for tag, a in reader.tags if a.get("id") == "unveil"]


def test_thumbnails_show_the_images_they_name(made: SyntheticRun, pages: Mapping[str, str]) -> None:
    files = files_of(made)
    checked = 0
    for page in pages.values():
        tags = Reader(page).tags
        for (tag, outer), (_, inner) in itertools.pairwise(tags):
            found = re.search(r"image web #(\d+)", str(outer.get("aria-label")))
            if tag != "svg" or not found:
                continue
            row = int(found[1])
            sheet = np.asarray(Image.open(io.BytesIO(files[str(inner["href"])])).convert("RGB"))
            x, y, w, h = (int(v) for v in str(outer["viewbox"]).split())
            wanted = np.asarray(Image.open(io.BytesIO(picture(row - 1 if row % 10 == 3 else row))).convert("RGB"))
            seen = sheet[y : y + h, x : x + w].astype(int)
            assert seen.shape == wanted.shape and np.abs(seen - wanted.astype(int)).mean() < 20
            assert sheet.shape[1::-1] == (int(str(inner["width"])), int(str(inner["height"])))
            checked += 1
    assert checked > 30


def test_counts_on_the_pages_are_those_of_the_tables(made: SyntheticRun, pages: Mapping[str, str]) -> None:
    run = open_run(made.run.root)
    images = pq.read_table(list(run.images))
    status = images["status"].to_pylist()
    assert f"{status.count('failed')} rows brought no usable image" in words_of(pages["failures"])
    assert f"{status.count('dropped')} images were dropped" in words_of(pages["filters"])
    duplicates = pq.read_table(list(run.duplicates))
    reasons = duplicates["reason"].to_pylist()
    assert f"{reasons.count('self')} components hold {2 * reasons.count('self')}" in words_of(pages["duplicates"])
    assert f"{reasons.count('reference')} images of pool" in words_of(pages["decontamination"])
    assert "threshold 0.88" in words_of(pages["duplicates"]) and "Just above" in words_of(pages["duplicates"])
    flagged = sum((v or 0) > 0.7 for v in images["nsfw"].to_pylist())
    around = re.search(r'id="score-nsfw".*?</section>', pages["filters"], re.S)
    assert around is not None and around[0].count('class="tile dropped"') == flagged
    kept = [i % LEAVES for i in made.kept]
    for cluster in range(2):
        inside = sum(leaf // 2 == cluster for leaf in kept)
        assert f"{inside} images in 2 leaf clusters" in words_of(pages[f"cluster-2-{cluster}"])
    assert "What each seed set brought" in words_of(pages["retrieval"])
    assert "Similarity by rank" in words_of(pages["retrieval-01"])


def test_only_sampled_images_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curation import locations

    read: list[tuple[str, int, int]] = []
    original = locations.read_ranges
    monkeypatch.setattr(locations, "read_ranges", lambda root, places: (read.extend(places), original(root, places))[1])
    in_process(monkeypatch)
    made = build(tmp_path, pool=240)
    _, summary = report.build(Context(run=made.run), open_run(made.run.root), [], 10**7)
    assert len(read) == len(set(read)) == summary["thumbnails"] < 200


def test_hidden_images_are_on_no_page_and_counted_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    made = build(tmp_path, pool=40)
    manifest_context = Context(run=made.run)
    for path in ("forgotten", "decisions"):
        Path(made.run.path(path)).mkdir()
    forgotten, dropped = 2, [0, 11, 13, 1 << 40]  # of a component, of clusters, a copy, a seed
    pq.write_table(pa.table({"image_id": pa.array([forgotten], pa.uint64())}), tmp_path / "forgotten" / "a.parquet")
    rows = [
        {"image_id": i, "action": "drop", "scope": "image", "target": str(i), "author": "a", "made_at": 0, "note": ""}
        for i in dropped
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=DECISIONS), tmp_path / "decisions" / "a.parquet")
    report.execute(manifest_context, ReportConfig())
    pages = pages_of(made)
    for name, page in pages.items():
        shown = re.findall(r"(web|flowers|animals) #(\d+)\b", page)
        assert not {("web", "0"), ("web", "2"), ("web", "11"), ("web", "13"), ("flowers", "0")} & set(shown), name
    assert "5 images are hidden (1 forgotten, 4 dropped by decisions)" in words_of(pages["index"])
    assert "1 hidden" in words_of(pages["duplicates"])
    assert "could not be read" not in words_of(pages["index"])
    assert report.execute(manifest_context, ReportConfig()).skipped
    (tmp_path / "decisions" / "a.parquet").unlink()
    assert not report.execute(manifest_context, ReportConfig()).skipped
    assert "1 image is hidden" in words_of(pages_of(made)["index"])


def test_a_second_call_does_nothing_and_extra_tables_make_the_pages_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    made = build(tmp_path, pool=20)
    run = Context(run=made.run)
    assert not report.execute(run, ReportConfig()).skipped
    before = files_of(made)
    assert report.execute(run, ReportConfig()).skipped
    extra = [
        {
            "title": "Planted <i>copies</i>",
            "text": "as told",
            "columns": ["kind", "found", ""],
            "rows": [["crop", "95 %"], {"kind": "resize"}],
        }
    ]
    Path(made.run.path("report_extra.json")).write_text(json.dumps(extra))
    assert not report.execute(run, ReportConfig()).skipped
    after = files_of(made)["more.html"].decode()
    assert "Planted &lt;i&gt;copies&lt;/i&gt;" in after and "95 %" in after
    Path(made.run.path("report_extra.json")).unlink()
    report.execute(run, ReportConfig())
    assert files_of(made) == before


def test_equal_runs_in_other_places_give_equal_pages_and_hostile_strings_are_inert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_process(monkeypatch)
    found = []
    for name in ("a", "b"):
        made = build(tmp_path / name, pool=20, hostile=True)
        report.execute(Context(run=made.run), ReportConfig())
        found.append(files_of(made))
    assert found[0] == found[1]
    pages = {name: data.decode() for name, data in found[0].items() if name.endswith(".html")}
    assert "retrieval-01.html" in pages
    for page in pages.values():
        assert str(tmp_path) not in page
        reader = Reader(page)
        assert not [tag for tag, a in reader.tags if tag in ("script", "b") and a] and "<script" not in page
        assert not any(name.startswith("on") for _, a in reader.tags for name in a)
        links = [a.get("href") or "" for tag, a in reader.tags if tag == "a"]
        assert not [link for link in links if ":" in link or "//" in link]
        assert "\u202e" not in page and len(page) < 500_000
    assert any("⟨U+202E⟩" in page for page in pages.values())


def test_the_folder_stays_below_its_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noise(source: int, row: int) -> bytes:
        sink = io.BytesIO()
        pixels = np.random.default_rng([source, row]).integers(0, 255, (136, 136, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(sink, "JPEG", quality=90)
        return sink.getvalue()

    in_process(monkeypatch)
    made = build(tmp_path, pool=120, content=noise)
    outcome = report.execute(Context(run=made.run), ReportConfig(max_megabytes=1))
    sizes = sum(len(data) for data in files_of(made).values())
    assert sizes == outcome.summary["bytes"] <= 10**6
    assert 0 < outcome.summary["thumbnails"] < outcome.summary["wanted"]
    pages = pages_of(made)
    assert all("were left out to keep the folder below 1 MB" in page for page in pages.values())
    assert any("left out to stay below 1 MB" in page for page in pages.values())


def test_a_run_that_only_fetched_has_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    made = build(tmp_path, pool=20)
    for stage in ("score", "filter", "dedup", "embed", "cluster", "retrieve", "balance", "mix"):
        shutil.rmtree(made.run.path(stage))
    report.execute(Context(run=made.run), ReportConfig())
    assert set(pages_of(made)) == {"index", "failures", "filters"}
    assert "The run has no manifest yet" in words_of(pages_of(made)["index"])


def test_unreadable_bytes_are_named_on_the_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_process(monkeypatch)
    made = build(tmp_path, pool=20, content=lambda source, row: b"no image" if row % 2 else picture(row))
    report.execute(Context(run=made.run), ReportConfig())
    page = pages_of(made)["cluster-2-0"]
    assert "not decoded: not_an_image" in page and "could not be read" in page


def test_an_empty_run_gives_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report yet"):
        report.execute(Context(run=RunDirectory(str(tmp_path))), ReportConfig())
    with pytest.raises(UserError, match="no such run directory"):
        audit.open_run(str(tmp_path / "absent"))


def test_the_audit_reads_the_parts_that_the_stages_count(made: SyntheticRun) -> None:
    found = open_run(made.run.root)
    for stage, paths in {
        "filter": found.images,
        "dedup": found.duplicates,
        "cluster": found.clusters,
        "retrieve": found.retrieval,
        "balance": found.balance,
        "manifest": found.manifest,
    }.items():
        assert list(paths) == current_parts(made.run, stage) != []


def test_a_notebook_gets_tables_and_figures(made: SyntheticRun) -> None:
    pytest.importorskip("matplotlib")
    run = audit.open_run(made.run.root)
    assert audit.components(run).num_rows == 4
    members = audit.component_members(run, audit.components(run)["component_id"][0].as_py())
    assert members["kept"].to_pylist() == [True, False]
    assert audit.flow(run).to_pylist()[0] | {"reasons": []} == {
        "role": "pool",
        "step": "listed",
        "stage": "sources",
        "images": 40,
        "lost": 0,
        "reasons": [],
    }
    assert audit.purity(run)["purity"] == 1.0  # the labels of the synthetic run are those of its leaves
    assert sum(audit.clusters(run, 2)["images"].to_pylist()) == len(made.kept)
    assert set(audit.seed_sets(run)["seed_set"].to_pylist()) == {"flowers", "animals"}
    assert audit.similarity_by_rank(run).num_rows == 8
    arguments = {"plot_scores": ["contrast"], "scores": ["nsfw"], "around_threshold": ["nsfw"], "cluster_members": [1]}
    arguments["component_members"] = [2]
    for name in audit.__all__:
        function = getattr(audit, name)
        if name in ("open_run", "RunTables", "plot_clusters"):
            continue
        made_of = function(run, *arguments.get(name, []))
        if name.startswith("plot_"):
            assert made_of.axes[0].has_data()
        elif name != "purity":
            assert isinstance(made_of, pa.Table), name
    assert audit.plot_flow(run)._repr_png_()[:4] == b"\x89PNG"
    for call in (lambda: audit.scores(run, "beauty"), lambda: audit.clusters(run, 9), lambda: audit.plot_clusters(run)):
        with pytest.raises(UserError):
            call()


def test_figures_without_matplotlib_are_one_sentence(made: SyntheticRun, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    for name in [n for n in sys.modules if n.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="pip install"):
        audit.plot_flow(audit.open_run(made.run.root))
