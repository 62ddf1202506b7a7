"""Figures of the report against naive ones, and the page against hostile strings."""

from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from curation.audit import charts, figures, funnel, retrieval_tables, scans, site, tables
from curation.audit.run_tables import RunTables
from curation.audit.sections import filters as filters_section
from curation.errors import UserError
from curation.schemas import DUPLICATES, EDGES, IMAGES, MANIFEST, RETRIEVAL


def write(folder: Path, name: str, rows: list[dict], schema: pa.Schema) -> str:
    path = folder / f"{name}.parquet"
    full = [dict.fromkeys(schema.names) | row for row in rows]
    pq.write_table(pa.Table.from_pylist(full, schema=schema), path)
    return str(path)


def image(i: int, status: str = "ok", error: str | None = None, **more: object) -> dict:
    return {"image_id": i, "source": "pool:web", "status": status, "error": error, **more}


def test_a_retried_row_counts_once_as_its_last_attempt(tmp_path: Path) -> None:
    paths = [
        write(
            tmp_path, "part-000-000000", [image(0), *(image(i, "transient", f"timeout: {i} s") for i in (1, 2))], IMAGES
        ),
        write(tmp_path, "part-000-000000-r1", [image(1, "transient", "http_503: x"), image(2)], IMAGES),
        write(tmp_path, "part-000-000000-r2", [image(1, "failed", "http_404")], IMAGES),
    ]
    found = {(r["status"], r["reason"]): r["images"] for r in tables.status_counts(paths).to_pylist()}
    assert found == {("ok", ""): 2, ("failed", "http_404"): 1}


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("http://a.example/x", "a.example"),
        ("https://user:pw@B.Example:8080/x?y#z", "b.example:8080"),
        ("http://c.example", "c.example"),
        (None, ""),
    ],
)
def test_failures_are_counted_by_host(tmp_path: Path, url: str | None, host: str) -> None:
    path = write(tmp_path, "part", [image(0, "failed", "http_404: gone\nfor good", url=url), image(1, url=url)], IMAGES)
    found, uncertain = tables.host_failures([path], 5)
    assert found.to_pylist() == [{"host": host, "status": "failed", "reason": "http_404", "images": 1}]
    assert uncertain == 0
    assert tables.failing_hosts([path], 5).to_pylist() == [{"host": host, "images": 1, "rows": 2}]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 4), st.integers(0, 4))
def test_components_are_counted_and_chosen_as_a_naive_count_does(
    tmp_path_factory: pytest.TempPathFactory, labels: list[int], largest: int, random: int
) -> None:
    groups = defaultdict(list)
    for i, label in enumerate(labels):
        groups[label].append(i)
    component = {i: min(members) for members in groups.values() for i in members}
    rows = [
        {"image_id": i, "component_id": c, "kept": i == c, "reason": "kept" if i == c else "self"}
        for i, c in component.items()
    ]
    rows.sort(key=lambda row: row["image_id"])
    path = write(tmp_path_factory.mktemp("c"), "part", rows, DUPLICATES)
    sizes = {min(m): len(m) for m in groups.values() if len(m) > 1}
    patch = pytest.MonkeyPatch()
    patch.setattr(scans, "GROUPS_PER_PASS", 4)  # several passes
    chosen, histogram = tables.components([path], "component_id", largest, random, seed=0)
    patch.undo()
    assert {r["images"]: r["components"] for r in histogram.to_pylist()} == Counter(sizes.values())
    assert all(sizes[r["group"]] == r["images"] for r in chosen.to_pylist())
    wanted = sorted(sizes, key=lambda c: (-sizes[c], c))[:largest]
    assert [r["group"] for r in chosen.to_pylist() if r["choice"] == "largest"] == wanted
    assert sum(r["choice"] == "random" for r in chosen.to_pylist()) == min(random, len(sizes) - len(wanted))
    members = tables.component_members([path], "component_id", chosen["group"].combine_chunks())
    assert Counter(members["group"].to_pylist()) == {g: sizes[g] for g in chosen["group"].to_pylist()}


def test_the_weakest_link_joins_two_members_of_one_component(tmp_path: Path) -> None:
    edges = [(1, 2, 0.9), (2, 3, 0.7), (3, 4, 0.5), (5, 6, 0.8)]
    rows = [{"low_space": 0, "low": a, "high_space": 0, "high": b, "similarity": s} for a, b, s in edges]
    path = write(tmp_path, "forest", rows, EDGES)
    members = pa.table(
        {"image_id": pa.array([1, 2, 3, 5, 6, 4], pa.uint64()), "group": pa.array([1, 1, 1, 5, 5, 4], pa.uint64())}
    )
    found = [(r["group"], r["edges"], r["low"], r["high"]) for r in tables.weakest_edges([path], members).to_pylist()]
    assert found == [(1, 2, 2, 3), (5, 1, 5, 6)]  # 3 - 4 lies below the threshold: two components


def test_reference_hits_count_an_image_once_per_set(tmp_path: Path) -> None:
    def hit(name: str, reference: int, similarity: float) -> dict:
        return {"reference_set": name, "reference_id": reference, "similarity": similarity}

    rows = [
        {"image_id": 1, "reason": "reference", "references": [hit("a", 9, 0.9), hit("a", 8, 0.7), hit("b", 7, 0.5)]},
        {"image_id": 2, "reason": "kept", "references": [hit("a", 9, 0.6)]},
        {"image_id": 3, "reason": "reference", "references": []},
    ]
    for row in rows:
        row |= {"component_id": row["image_id"], "kept": row["reason"] == "kept"}
    path = write(tmp_path, "part", rows, DUPLICATES)
    found = {r["reference_set"]: r for r in tables.reference_summary([path], (0.5, 0.6, 0.8)).to_pylist()}
    assert (found["a"]["images"], found["a"]["dropped"], found["a"]["at"]) == (2, 1, [2, 1, 1])  # strictly above
    assert (found["b"]["images"], found["b"]["at"]) == (1, [0, 0, 0])
    shown = {(r["reference_set"], r["image_id"], r["reference_id"]): r["choice"] for r in samples(path)}
    assert shown == {("a", 1, 9): "best", ("a", 2, 9): "weakest", ("b", 1, 7): "best"}
    assert not [r for r in samples(path, hidden=np.array([1], np.uint64)) if r["image_id"] == 1]


def samples(path: str, hidden: np.ndarray = scans.NOTHING) -> list[dict]:
    return tables.reference_samples([path], 1, 0, hidden)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5)), max_size=6, unique=True), max_size=10))
def test_seed_set_counts_equal_naive_ones(
    tmp_path_factory: pytest.TempPathFactory, drawn: list[list[tuple[str, int]]]
) -> None:
    rows = [
        {
            "image_id": i,
            "source": "pool:web",
            "sources": [],
            "weight": 1.0,
            "retrieved_by": [{"seed_set": s, "seed_id": n} for s, n in by],
        }
        for i, by in enumerate(drawn)
    ]
    path = write(tmp_path_factory.mktemp("m"), "part", rows, MANIFEST)
    found = {r.pop("seed_set"): r for r in tables.seed_set_counts([path]).to_pylist()}
    names = {s for by in drawn for s, _ in by}
    assert set(found) == names
    for name in names:
        times = [sum(s == name for s, _ in by) for by in drawn]
        shared = sum(t > 0 and len({s for s, _ in by}) > 1 for t, by in zip(times, drawn, strict=True))
        unique = sum(t > 0 for t in times)
        wanted = {"nominal": sum(times), "unique": unique, "colliding": sum(t > 1 for t in times)}
        assert found[name] == wanted | {"shared": shared, "alone": unique - shared}


def test_seed_samples_show_the_best_of_each_seed(tmp_path: Path) -> None:
    rows = [
        {"image_id": i, "seed_set": s, "seed_id": seed, "mode": "sample", "rank": i, "similarity": 1 - i / 100}
        for s in "ab"
        for seed in range(6)
        for i in range(10)
    ]
    found = retrieval_tables.seed_samples([write(tmp_path, "part", rows, RETRIEVAL)], 2, 3, 0).to_pylist()
    shown = defaultdict(list)
    for row in found:
        shown[row["seed_set"], row["seed_id"]].append(row["image_id"])
    assert Counter(s for s, _ in shown) == {"a": 2, "b": 2}
    assert all(ids == [0, 1, 2] for ids in shown.values())


def test_samples_do_not_depend_on_how_rows_are_cut_into_parts(tmp_path: Path) -> None:
    rows = [image(i, "dropped", f"reason{i % 3}") for i in range(90)]
    whole = [write(tmp_path, "whole", rows, IMAGES)]
    cut = [write(tmp_path, f"cut{i}", rows[i : i + 30], IMAGES) for i in (60, 0, 30)]
    shown = [filters_section.section(RunTables(images=paths)) for paths in (whole, cut)]
    assert shown[0] is not None and shown[1] is not None
    assert shown[0]["images"] == shown[1]["images"] and len(shown[0]["images"]) == 36


def test_locations_take_the_usable_row_and_cut_long_strings(tmp_path: Path) -> None:
    paths = [
        write(tmp_path, "part-000-000000", [image(1, "transient", url="x" * 100_000), image(2)], IMAGES),
        write(
            tmp_path, "part-000-000000-r1", [image(1, "ok", url="y" * 100_000, shard="s", offset=3, length=4)], IMAGES
        ),
        write(tmp_path, "part-001-000000", [image(1 << 40)], IMAGES),
    ]
    found = {r["image_id"]: r for r in tables.locations(paths, np.array([1, 1 << 40], np.uint64)).to_pylist()}
    assert set(found) == {1, 1 << 40}
    assert found[1]["offset"] == 3 and found[1]["url"] == "y" * scans.TEXT_CHARACTERS


def test_histogram_clips_and_leaves_null_out(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "part",
        [image(i, contrast=v) for i, v in enumerate([-1.0, 0.5, 1.5, 99.0, None, float("nan")])],
        IMAGES,
    )
    assert scans.histogram([path], pc.field("contrast"), np.array([0.0, 1.0, 2.0])).tolist() == [2, 2]


def test_funnel_explains_every_loss() -> None:
    fetched = [
        {"source": "pool:web", "status": s, "reason": r, "images": n}
        for s, r, n in (("ok", "", 80), ("failed", "http_404", 15))
    ]
    filtered = [
        {"source": "pool:web", "status": s, "reason": r, "images": n}
        for s, r, n in (("ok", "", 70), ("failed", "http_404", 15), ("failed", "truncated", 4), ("dropped", "nsfw", 6))
    ]
    duplicates = [
        {"source_number": 0, "kept": k, "reason": r, "images": n}
        for k, r, n in ((True, "kept", 60), (False, "self", 10))
    ]
    embedded = {"m": [{"source_number": 0, "images": 59}]}
    manifest = [{"source_number": 0, "images": 9}]
    steps = funnel.funnel(
        [{"number": 0, "name": "pool:web", "rows": 100}], fetched, filtered, duplicates, embedded, manifest
    )["pool"]
    assert [s["images"] for s in steps] == [100, 80, 70, 60, 59, 9]
    lost = [{e["reason"]: e["images"] for e in s["lost"]} for s in steps]
    assert lost[1] == {"failed: http_404": 15, "not tried": 5}
    assert lost[2] == {"not safe for work": 6, "failed: truncated": 4}
    assert lost[5] == {"not chosen": 50}


def test_thumbnails_lie_in_the_sheet_where_the_boxes_say() -> None:
    from PIL import Image

    random = np.random.default_rng(0)
    colours = random.integers(0, 255, (11, 3), dtype=np.uint8)
    shapes = [(300, 200), (20, 30), (1, 500), *[(64, 64)] * 8]
    tiles = [figures.thumbnail(np.broadcast_to(c, (*s, 3)).copy()) for c, s in zip(colours, shapes, strict=True)]
    assert all(max(t.shape[:2]) <= figures.CELL for t in tiles) and tiles[1].shape == (20, 30, 3)
    data, boxes, size = figures.sheet(tiles)
    sheet = np.asarray(Image.open(__import__("io").BytesIO(data)).convert("RGB"))
    assert sheet.shape[1::-1] == size
    for colour, (x, y, w, h) in zip(colours, boxes, strict=True):
        middle = sheet[y + h // 2, x + w // 2].astype(int)
        if min(w, h) > 8:
            assert np.abs(middle - colour.astype(int)).max() < 12
    assert figures.sheet(tiles)[0] == data


HOSTILE = [
    "</style><script>alert(1)</script>",
    '" onload="x',
    "' onclick='x",
    "\u202egpj.exe\u2066",
    "\x00\x1b[31m",
    "{{ 7*7 }}",
    "x" * 10**6,
]


@pytest.mark.parametrize("words", HOSTILE)
def test_hostile_words_are_cut_escaped_and_made_visible(words: str) -> None:
    row = {
        "image_id": 1,
        "source": words,
        "url": words,
        "label": words,
        "caption": words,
        "error": words,
        "width": 1,
        "height": 1,
    }
    picture = site.picture(row, {0: f"pool:{words}"}, None, words)
    extras = site.extra_sections(
        [{"title": words, "text": [words], "columns": [words], "rows": [[words]], "notes": words}], "x"
    )
    step = {"step": words, "stage": words, "images": 1, "lost": [{"reason": words, "images": 1}]}
    loss = {"status": words, "reason": words, "host": words, "when": words, "images": 1}
    failures = {
        "total": 1,
        "reasons": [loss],
        "hosts": [{**loss, "rows": 1}],
        "pairs": [loss],
        "uncertain": 0,
        "examples": {words: [words]},
        "images": [],
    }
    seeds = {
        "name": "retrieval-01",
        "seed_set": words,
        "row": None,
        "median": None,
        "charts": [],
        "seeds": [(1, [])],
        "rule": dict.fromkeys(("mode", "neighbours", "per_cluster", "min_seeds", "cap", "seeds", "seeds_in_clusters")),
        "chosen": None,
        "images": [1],
    }
    retrieval = {"rows": [], "more_rows": 0, "more_pages": 0, "pages": [seeds], "images": []}
    source = {"name": words, "kind": words, "rows": 1, "usable": 1, "manifest": 1, "licence": words, "exempt": False}
    overview = {
        "lead": "",
        "images": [],
        "facts": [],
        "funnel": charts.funnel([step, {**step, "images": 0}]),
        "funnels": {"pool": [step, {**step, "images": 0}]},
        "warnings": [{"level": "warning", "words": words, "detail": words, "page": "failures"}],
        "sources": [source],
        "more_sources": 0,
        "card": site.card_texts({"manifest": {"rows": 1, "x": words}, "models": {words: words}}),
        "hidden": {"all": 1, "forgotten": 1, "dropped": 0},
    }
    pages = site.plan(overview, {"failures": failures, "retrieval": retrieval}, extras)
    sampled = {"wanted": 1, "shown": 0, "unreadable": 0, "left_out": 0, "megabytes": 1}
    made = {page.name: site.render(page, pages, {1: picture}, sampled).decode() for page in pages}
    assert list(made) == ["index", "failures", "retrieval", "retrieval-01", "more"]
    for page in made.values():
        check_inert(page)


def check_inert(page: str) -> None:
    assert len(page) < 100_000
    body = page.split("</head>")[1]
    assert "<script" not in page and "</style>" not in body and "49" not in body.replace("&#39;", "")
    assert page.count("<!doctype") == 1 and page.rstrip().endswith("</html>")
    assert 'onload="' not in page and "onclick='" not in page
    assert not any(c in page for c in "\u202e\u2066\x00\x1b")


def test_extra_sections_of_the_wrong_shape_are_refused() -> None:
    for wrong in ({"a": 1}, [1], [{"title": "x", "rows": 3}]):
        with pytest.raises(UserError, match="here"):
            site.extra_sections(wrong, "here")


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_text_has_the_contrast_of_wcag_aa_in_light_and_dark() -> None:
    style = (Path(site.__file__).parent / "templates" / "style.css").read_text()
    light, dark = (
        dict(pair.split(": ") for pair in _colours(part))
        for part in style.split("@media (prefers-color-scheme: dark)")[:2]
    )
    for theme in (light, light | dark):
        for ground in ("--paper", "--ground", "--field"):
            for ink in ("--ink", "--soft", "--accent", "--lost", "--good", "--bad"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground)
        assert contrast(theme["--chip-ink"], theme["--chip"]) >= 4.5
        for mark in ("--flow", "--warn"):
            assert contrast(theme[mark], theme["--paper"]) >= 3, mark


def _colours(part: str) -> list[str]:
    import re

    block = part[part.index(":root") : part.index("}", part.index(":root"))]
    return re.findall(r"--[a-z-]+: #[0-9a-f]{6}", block)
