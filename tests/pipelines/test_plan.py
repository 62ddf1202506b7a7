"""The plan: counts that add up to the papers', arithmetic that can be checked by hand, nothing done."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.errors import UserError
from pipelines import configuration, plan, plan_counts
from pipelines.configuration import RunConfig, SourceConfig
from pipelines.hardware import CLUSTERS, KNOWN, hardware, this_machine

CONFIGS = Path(__file__).parents[2] / "configs"
PAPER = {"as is": 17_211_818, "retrieved, sample mode": 104_107_568, "retrieved, cluster mode": 20_790_000}


def planned(name: str) -> plan.Plan:
    return plan.plan(configuration.load(str(CONFIGS / name)), CLUSTERS["v100x160"])


def small(**blocks: Any) -> RunConfig:
    sources = [
        {"as": "pool", "urls": "nowhere.parquet", "images": 1000},
        {"as": "seed:birds", "folder": "nowhere", "images": 40},
        {"as": "reference:tests", "folder": "nowhere", "images": 10},
    ]
    return RunConfig.model_validate({"run": "r", "sources": sources} | blocks)


def test_lvd142m_adds_up_to_the_papers_counts_without_any_data() -> None:
    found = planned("lvd142m.yaml")
    assert found.nominal == PAPER | {"nominal": 142_109_386}
    assert sum(PAPER.values()) == 142_109_386
    by_name = {entry.name: entry for entry in found.seed_sets}
    assert len(by_name) == 25
    assert by_name["imagenet-1k"].retrieved == 1_281_167 * 32 and by_name["imagenet-1k"].as_is == 0
    assert by_name["amstertime-old"].retrieved == 830_000
    stages = {stage.stage: stage for stage in found.stages}
    assert stages["cluster"].rows_in == 744_000_000
    assert stages["embed"].flop == pytest.approx(763_105_933 * 334e9)


def test_lvd142m_seed_sets_have_the_modes_numbers_and_caps_of_the_paper() -> None:
    config = configuration.load(str(CONFIGS / "lvd142m.yaml"))
    assert config.retrieve is not None and config.cluster is not None
    sets = config.retrieve.seed_sets
    assert {name for name, entry in sets.items() if entry.mode == "sample"} == {
        "imagenet-22k", "imagenet-1k", "google-landmarks-v2",
    }  # fmt: skip
    by_cluster = [entry for entry in sets.values() if entry.mode == "cluster"]
    assert len(by_cluster) == 21
    assert {(e.per_cluster, e.min_seeds, e.cap) for e in by_cluster} == {(10_000, 4, 1_000_000)}
    assert config.cluster.levels == [100_000]
    assert (config.dedup.threshold, config.dedup.against_threshold) == (0.6, 0.45)


def test_lvd1689m_has_five_levels_balance_and_retrieval() -> None:
    config = configuration.load(str(CONFIGS / "lvd1689m.yaml"))
    assert config.cluster is not None
    assert config.cluster.levels == [200_000_000, 8_000_000, 800_000, 100_000, 25_000]
    found = planned("lvd1689m.yaml")
    assert found.nominal["balanced"] == 1_689_000_000
    assert found.nominal["nominal"] == sum(n for name, n in found.nominal.items() if name != "nominal")
    assert any(note.startswith("cluster needs") for note in found.notes)


def test_rows_flow_from_stage_to_stage_and_the_plan_is_json() -> None:
    found = plan.plan(small(), hardware("this", cores_per_node=2, gpus_per_node=0))
    stages = {stage.stage: stage for stage in found.stages}
    assert list(stages) == [
        "download", "import", "filter", "dedup", "embed", "cluster", "retrieve", "mix", "manifest", "report",
    ]  # fmt: skip
    kept = round(round(1000 * 1.1 / 1.3) * 0.744 / 1.1)
    assert stages["filter"].rows_in == 1050 and stages["dedup"].rows_out == kept
    assert stages["embed"].rows_in == kept + 40
    document = json.loads(json.dumps(found.document()))
    assert document["hours"] == pytest.approx(sum(stage["hours"] for stage in document["stages"]))
    assert all(stage["arithmetic"] for stage in document["stages"])


def test_dedup_arithmetic_above_the_exact_bound_can_be_done_by_hand() -> None:
    config = small()
    config.sources[0].images, config.sources[2].images = 1_300_000_000, 0
    config.sources.pop(2)
    config.resources.memory_per_worker = "64GiB"
    stage = next(s for s in plan.plan(config, CLUSTERS["v100x160"]).stages if s.stage == "dedup")
    n, d, p = 1_300_000_000, 512, 128
    cells = round(2 * math.sqrt(n))
    sample = 48 * cells
    nanoseconds = {
        "store": n * d,
        "train": sample * (d * d + 2 * d * p + 5 * cells * p),
        "truth": KNOWN["queries_hard"] * n,
        "choose": KNOWN["queries_hard"],
        "assign": n * p * (d + cells),
        "visit": n * cells,
        "scan_hard": n * n * KNOWN["share_hard"],
        "open": n * KNOWN["visits_hard"],
        "verify": n,
        "driver": n,
    }
    assert stage.cpu_seconds == pytest.approx(sum(KNOWN[name] * units for name, units in nanoseconds.items()) / 1e9)
    assert stage.serial_seconds == pytest.approx(KNOWN["driver"] * n / 1e9)
    assert stage.hours == pytest.approx(
        ((stage.cpu_seconds - stage.serial_seconds) / 800 + stage.serial_seconds) / 3600
    )
    assert stage.flop == 0


def test_lvd142m_shows_the_arithmetic_of_every_stage_that_costs_cpu_time() -> None:
    for stage in planned("lvd142m.yaml").stages:
        lines = [line for line in stage.arithmetic if line.endswith("CPU s") and " = " in line]
        assert bool(lines) == bool(stage.cpu_seconds)
        shown = sum(float(line.rsplit("= ", 1)[1].removesuffix(" CPU s").replace(",", "")) for line in lines)
        assert shown == pytest.approx(stage.cpu_seconds, rel=0.02)


def test_twice_the_machines_halve_the_hours() -> None:
    one, two = (plan.plan(small(), hardware("h100x8", nodes=n)) for n in (1, 2))
    assert one.hours > two.hours >= one.hours / 2


def test_this_machine_has_cores_and_memory() -> None:
    found = this_machine()
    assert found.cores >= 1 and found.memory_per_node > 1 << 28 and found.flop_s > 0


def test_stage_that_is_left_out_or_outside_the_bounds_is_not_planned() -> None:
    found = plan.plan(small(cluster=None, retrieve=None), CLUSTERS["h100x8"], last="mix")
    assert [stage.stage for stage in found.stages][-2:] == ["embed", "mix"]
    assert found.nominal["nominal"] == 40


@pytest.fixture
def files(tmp_path: Path) -> Path:
    urls = {"url": ["http://example.test/1"] * 7}
    pq.write_table(pa.table(urls), tmp_path / "urls.parquet")
    (tmp_path / "urls.csv").write_text("url,caption\nhttp://a.test/1,one\nhttp://a.test/2,two")
    (tmp_path / "urls.txt").write_text("http://a.test/1\nhttp://a.test/2\nhttp://a.test/3\n")
    (tmp_path / "folder" / "class").mkdir(parents=True)
    for name in ("a.jpg", "class/b.PNG", "notes.md"):
        (tmp_path / "folder" / name).write_bytes(b"x")
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "0.tar").write_bytes(b"x" * 1_000_000)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [
        ("urls", "urls.parquet", 7),
        ("urls", "urls.csv", 2),
        ("urls", "urls.txt", 3),
        ("urls", "*.parquet", 7),
        ("parquet", "urls.parquet", 7),
        ("folder", "folder", 2),
        ("tars", "tars", 10),
    ],
)
def test_sources_without_a_given_count_are_counted_from_their_files(
    files: Path, kind: str, name: str, rows: int
) -> None:
    source = SourceConfig.model_validate({"as": "pool", kind: str(files / name)})
    notes: list[str] = []
    assert plan_counts.count_rows("sources.0", source, notes) == rows
    assert bool(notes) == (kind == "tars")


def test_source_that_is_neither_there_nor_counted_is_refused(tmp_path: Path) -> None:
    config = small()
    config.sources[0].images = None
    with pytest.raises(UserError, match=r"sources.0.urls: nowhere.parquet is not there, and no `images:`"):
        plan.plan(config, CLUSTERS["h100x8"])
    assert not any(tmp_path.iterdir())


def test_shipped_configurations_are_valid_and_what_run_yaml_comments_out_is_the_default(tmp_path: Path) -> None:
    for path in CONFIGS.glob("*.yaml"):
        assert configuration.load(str(path)).sources, path
    text = (CONFIGS / "run.yaml").read_text()
    lines = [re.sub(r"^( *)# ( *[a-z_]+:( |$))", r"\1\2", line) for line in text.splitlines()]
    uncommented = tmp_path / "run.yaml"
    uncommented.write_text("\n".join(lines))
    config = configuration.load(str(uncommented))
    assert config.balance is not None and config.sources[1].exempt is False
    examples = {"contact", "seed_sets", "shares"}
    for name in ("resources", "download", "filter", "dedup", "embed", "cluster", "retrieve", "mix", "report"):
        block = getattr(config, name)
        shown = block.model_dump(exclude=examples)
        assert shown == type(block)().model_dump(exclude=examples), "what is commented out is the default"
        assert block.model_fields_set
