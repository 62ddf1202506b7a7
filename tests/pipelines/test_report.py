"""The page of a run whose contents are known."""

import itertools
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from curation.errors import UserError
from pipelines.context import Context
from pipelines.run_directory import RunDirectory
from pipelines.stages import manifest, report
from pipelines.stages.report import ReportConfig
from tests.pipelines.synthetic_run import SyntheticRun, build, picture


class Reader(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def classes(self, name: str) -> list[dict[str, str | None]]:
        return [a for _, a in self.tags if name in (a.get("class") or "").split()]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> SyntheticRun:
    found = build(tmp_path_factory.mktemp("run"))
    manifest.execute(Context(run=found.run), manifest.ManifestConfig())
    report.execute(Context(run=found.run), ReportConfig())
    return found


@pytest.fixture(scope="module")
def page(made: SyntheticRun) -> str:
    return Path(made.run.path("report", "index.html")).read_text()


def files_of(made: SyntheticRun) -> dict[str, bytes]:
    folder = Path(made.run.path("report"))
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name[0] != "_"}


def test_page_has_a_section_for_every_stage(page: str) -> None:
    ids = {a["id"] for tag, a in Reader(page).tags if tag == "section"}
    wanted = "flow sources failures filters duplicates decontamination clusters seeds balance card"
    assert ids == set(wanted.split())


def test_page_asks_nothing_of_a_network(made: SyntheticRun, page: str) -> None:
    reader = Reader(page)
    assert not [tag for tag, _ in reader.tags if tag in ("script", "img", "link", "iframe", "form")]
    assert all((a.get("href") or "#").startswith("#") for _, a in reader.tags)
    sheets = re.findall(r"url\(([^)]*)\)", page)
    assert sheets and all(name in files_of(made) for name in sheets)
    assert "default-src 'none'" in page


def test_every_thumbnail_has_a_name_and_every_table_a_caption(page: str) -> None:
    reader = Reader(page)
    thumbs = reader.classes("thumb")
    assert len(thumbs) > 60 and all(t["role"] == "img" and t["aria-label"] for t in thumbs)
    tags = [tag for tag, _ in reader.tags]
    assert tags.count("table") == tags.count("caption") > 4
    assert tags.count("h1") == 1
    levels = [int(t[1]) for t in tags if re.fullmatch("h[1-6]", t)]
    assert all(after <= before + 2 for before, after in itertools.pairwise(levels))


def test_images_flagged_as_not_safe_are_veiled(page: str) -> None:
    reader = Reader(page)
    veiled = [a for tag, a in reader.tags if tag == "input"]
    assert veiled and all(a["type"] == "checkbox" and "not safe" in str(a["aria-label"]) for a in veiled)
    assert len(veiled) == len(reader.classes("veil"))
    shown = {n for a in veiled for n in re.findall(r"web #(\d+)", str(a["aria-label"]))}
    assert shown and all(int(n) % 10 == 9 for n in shown)


def test_thumbnails_show_the_images_they_name(made: SyntheticRun, page: str) -> None:
    import io

    import numpy as np
    from PIL import Image

    sheets = [
        np.asarray(Image.open(io.BytesIO(files_of(made)[n])).convert("RGB"))
        for n in re.findall(r"url\(([^)]*)\)", page)
    ]
    checked = 0
    for attributes in Reader(page).classes("thumb"):
        found = re.search(r"web #(\d+)", str(attributes["aria-label"]))
        if not found:
            continue
        row = int(found[1])
        box = {k: int(v) for k, v in re.findall(r"--(x|y|w|h):(\d+)", str(attributes["style"]))}
        sheet = int(re.search(r"\bs(\d+)\b", str(attributes["class"]))[1])
        seen = sheets[sheet][box["y"] : box["y"] + box["h"], box["x"] : box["x"] + box["w"]].astype(int)
        wanted = np.asarray(Image.open(io.BytesIO(picture(row - 1 if row % 10 == 3 else row))).convert("RGB")).astype(
            int
        )
        assert seen.shape == wanted.shape and np.abs(seen - wanted).mean() < 20
        checked += 1
    assert checked > 30


def test_only_sampled_images_are_read(made: SyntheticRun, monkeypatch: pytest.MonkeyPatch) -> None:
    from curation import locations

    read: list[tuple[str, int, int]] = []
    original = locations.read_ranges
    monkeypatch.setattr(locations, "read_ranges", lambda root, places: (read.extend(places), original(root, places))[1])
    monkeypatch.setattr(
        Context, "spread", lambda self, f, calls, shared=None, **_: ((n, f(*a, shared)) for n, a in calls)
    )
    monkeypatch.setattr(
        report.sections, "SAMPLING", report.sections.Sampling(seeds=1, retrieved=1, nearest=1, random_members=0)
    )
    _, _, summary = report.build(Context(run=made.run), report._images(made.run), [], 10**7)
    assert len(read) == len(set(read)) == summary["thumbnails"] < 44


def test_a_second_call_does_nothing_and_extra_tables_make_the_page_again(tmp_path: Path, ray_session: None) -> None:
    made = build(tmp_path, pool=20)
    run = Context(run=made.run)
    assert not report.execute(run, ReportConfig()).skipped
    before = files_of(made)
    assert report.execute(run, ReportConfig()).skipped
    extra = [
        {
            "title": "Planted <i>copies</i>",
            "text": "as told",
            "columns": ["kind", "found"],
            "rows": [["crop", "95 %"], {"kind": "resize"}],
        }
    ]
    Path(made.run.path("report_extra.json")).write_text(json.dumps(extra))
    assert not report.execute(run, ReportConfig()).skipped
    after = files_of(made)["index.html"].decode()
    assert "Planted &lt;i&gt;copies&lt;/i&gt;" in after and "95 %" in after
    Path(made.run.path("report_extra.json")).unlink()
    report.execute(run, ReportConfig())
    assert files_of(made) == before


def test_equal_runs_in_other_places_give_equal_pages(tmp_path: Path, ray_session: None) -> None:
    pages = []
    for name in ("a", "b"):
        made = build(tmp_path / name, pool=20, hostile=True)
        manifest.execute(Context(run=made.run), manifest.ManifestConfig())
        report.execute(Context(run=made.run), ReportConfig())
        pages.append(files_of(made))
    assert pages[0] == pages[1]
    page = pages[0]["index.html"].decode()
    assert str(tmp_path) not in page
    reader = Reader(page)
    assert not [tag for tag, a in reader.tags if tag in ("script", "b") and a] and "<script" not in page
    assert not any(name.startswith("on") for _, a in reader.tags for name in a)
    assert "\u202e" not in page and "⟨U+202E⟩" in page and len(page) < 500_000


def test_the_folder_stays_below_its_bound(tmp_path: Path, ray_session: None) -> None:
    import io

    import numpy as np
    from PIL import Image

    def noise(source: int, row: int) -> bytes:
        sink = io.BytesIO()
        pixels = np.random.default_rng([source, row]).integers(0, 255, (136, 136, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(sink, "JPEG", quality=90)
        return sink.getvalue()

    made = build(tmp_path, pool=120, content=noise)
    outcome = report.execute(Context(run=made.run), ReportConfig(max_megabytes=1))
    sizes = sum(len(data) for data in files_of(made).values())
    assert sizes == outcome.summary["bytes"] <= 10**6
    assert 0 < outcome.summary["thumbnails"] < outcome.summary["wanted"]
    page = files_of(made)["index.html"].decode()
    assert "were left out to keep the folder below 1 MB" in page and "left out to stay below 1 MB" in page


def test_a_run_that_only_fetched_has_a_page(tmp_path: Path, ray_session: None) -> None:
    import shutil

    made = build(tmp_path, pool=20)
    for stage in ("score", "filter", "dedup", "embed", "cluster", "retrieve", "balance", "mix"):
        shutil.rmtree(made.run.path(stage))
    report.execute(Context(run=made.run), ReportConfig())
    ids = {a["id"] for tag, a in Reader(files_of(made)["index.html"].decode()).tags if tag == "section"}
    assert ids == {"flow", "sources", "failures", "filters", "card"}


def test_unreadable_bytes_are_named_on_the_page(tmp_path: Path, ray_session: None) -> None:
    made = build(tmp_path, pool=20, content=lambda source, row: b"no image" if row % 2 else picture(row))
    report.execute(Context(run=made.run), ReportConfig())
    page = files_of(made)["index.html"].decode()
    assert "not decoded: not_an_image" in page and "could not be read" in page


def test_an_empty_run_gives_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to report yet"):
        report.execute(Context(run=RunDirectory(str(tmp_path))), ReportConfig())
