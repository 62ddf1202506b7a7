"""`dedup` against exact float64 graphs and scipy: tables, rules, later generations, interruptions, re-thresholding."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from curation import storage, vectors
from curation.errors import UserError
from curation.schemas import DUPLICATES, IMAGES, image_id
from curation.vectors import embeddings_table
from pipelines.context import Context, Outcome
from pipelines.duplicate_forests import SWEEP
from pipelines.run_directory import Fingerprint, Generation, RunDirectory, Source
from pipelines.stages import dedup
from pipelines.stages.dedup import DedupConfig

DIMENSION = 128


class Reversed(Context):
    """A context whose tasks run in this process, last first: nothing may depend on order or on Ray."""

    calls: list[str]

    def spread(
        self,
        function: Callable[..., Any],
        calls: Iterable[tuple[str, tuple[Any, ...]]],
        *,
        shared: Any = None,
        num_cpus: float = 1,
        memory_bytes: int | None = None,
        heavy: bool = False,
    ) -> Iterable[tuple[str, Any]]:
        for name, arguments in reversed(list(calls)):
            ran.append(f"{function.__name__} {name}")
            yield name, function(*arguments, shared)


ran: list[str] = []


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def near(x: np.ndarray, cosine: float, random: np.random.Generator) -> np.ndarray:
    noise = random.standard_normal(len(x))
    noise = unit(noise - (noise @ x) * x)
    return cosine * x + np.sqrt(1 - cosine**2) * noise


def stored(x: np.ndarray) -> np.ndarray:
    """What a folder holds of (n, d) vectors: unit length, float16."""
    table = embeddings_table(np.arange(len(x), dtype=np.uint64), x)
    return table["embedding"].combine_chunks().flatten().to_numpy(zero_copy_only=False).reshape(x.shape)


def write_folder(folder: Path, x: np.ndarray, ids: Sequence[int] | None = None, parts: int = 2, **columns: Any) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    ids = range(len(x)) if ids is None else ids
    for k, rows in enumerate(np.array_split(np.arange(len(x)), parts)):
        table = embeddings_table(np.array(ids, np.uint64)[rows], x[rows])
        for name, values in columns.items():
            table = table.append_column(name, pa.array(np.asarray(values)[rows]))
        pq.write_table(table, folder / f"x{k}.parquet")
    return str(folder)


def labels_of(x: np.ndarray, threshold: float) -> np.ndarray:
    """Smallest member of each vector's component, by float64 all-pairs and scipy."""
    similarity = (x.astype(np.float64) @ x.astype(np.float64).T).astype(np.float32)
    np.fill_diagonal(similarity, 0)
    label = connected_components(coo_matrix(similarity > np.float32(threshold)), directed=False)[1]
    smallest = np.full(label.max() + 1, len(x))
    np.minimum.at(smallest, label, np.arange(len(x)))
    return smallest[label]


def planted(n: int, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    x = unit(random.standard_normal((n, DIMENSION)))
    for k in range(n // 2, n * 3 // 4):
        x[k] = near(x[k - n // 2], random.uniform(0.5, 0.99), random)
    x[-120:] = x[3]
    return x


def rows_in(folder: str) -> list[dict[str, Any]]:
    paths = storage.list_files(folder, ".parquet")
    tables = [pq.read_table(p) for p in paths]
    assert all(t.schema.equals(DUPLICATES, check_metadata=False) for t in tables)
    return [row for table in tables for row in table.to_pylist()]


def everything(folder: str) -> dict[str, bytes]:
    """Bytes of every file that is not a timing or a lock."""
    return {
        str(p.relative_to(folder)): p.read_bytes()
        for p in sorted(Path(folder).rglob("*"))
        if p.is_file() and "timings" not in p.name and p.name not in (".lock", "events.jsonl")
    }


def plain(
    out: Path | str, embeddings: str, *, rebuild: bool = False, kind: type[Context] = Reversed, **options: Any
) -> Outcome:
    context = kind(run=RunDirectory(str(out)), out=str(out), rebuild=rebuild)
    return dedup.execute(context, DedupConfig(**options), embeddings=embeddings)


# ---- plain Parquet ---------------------------------------------------------------------------------------------------


def test_components_equal_exact_search_with_a_group_of_over_100_identical_vectors(tmp_path: Path) -> None:
    x = planted(900)
    ids = np.random.default_rng(1).permutation(5000)[:900]  # rows are not in the order of ids
    outcome = plain(tmp_path / "out", write_folder(tmp_path / "e", x, ids), threshold=0.6)
    order = np.argsort(ids)
    label = labels_of(stored(x)[order], 0.6)
    expected = dict(zip(np.sort(ids).tolist(), np.sort(ids)[label].tolist(), strict=True))
    rows = rows_in(outcome.out)
    assert [r["image_id"] for r in rows] == ids.tolist(), "one row per image, in the order of the input"
    assert {r["image_id"]: r["component_id"] for r in rows} == expected
    assert all(r["kept"] == (r["image_id"] == r["component_id"]) == (r["reason"] == "kept") for r in rows)
    assert outcome.summary["largest_component"] > 120 and outcome.summary["recall"] == 1.0
    assert outcome.summary["kept"] == len(set(expected.values()))


def test_nearest_is_the_most_similar_image_above_the_stored_threshold(tmp_path: Path) -> None:
    x = planted(400)
    outcome = plain(tmp_path / "out", write_folder(tmp_path / "e", x), threshold=0.6, store_threshold=0.5)
    values = stored(x)
    for row in rows_in(outcome.out)[::7]:
        mine = vectors.similarity(np.repeat(values[[row["image_id"]]], 400, 0), values)
        mine[row["image_id"]] = -1
        best = int(mine.argmax())
        expected = (best, float(mine[best])) if mine[best] > np.float32(0.5) else (None, None)
        assert (row["nearest_id"], row["similarity"]) == expected


def relative_oracle(
    pool: np.ndarray, references: np.ndarray, kept: np.ndarray
) -> tuple[set[int], set[int], np.ndarray]:
    """(discarded by component, discarded by direct hit, smallest member of each kept image's component)."""
    everyone = np.concatenate([pool[kept], references])
    label = labels_of(everyone, 0.45)
    hit = {int(v) for v in label[len(kept) :]}
    component = {int(k) for k, v in zip(kept, label, strict=False) if int(v) in hit}
    cosine = (pool[kept].astype(np.float64) @ references.astype(np.float64).T).astype(np.float32)
    direct = set(kept[(cosine > np.float32(0.45)).any(axis=1)].tolist())
    return component, direct, label[: len(kept)]


def chained(tmp_path: Path) -> tuple[np.ndarray, np.ndarray, str, str]:
    """A pool, and a reference set that is reached directly and through chains of kept images."""
    random = np.random.default_rng(5)
    x = planted(500)
    references = unit(random.standard_normal((30, DIMENSION)))
    for k in range(8):
        x[10 + k] = near(references[k], 0.5, random)
        x[40 + k] = near(x[10 + k], 0.55, random)
    return x, references, write_folder(tmp_path / "e", x), write_folder(tmp_path / "r", references, parts=1)


@pytest.mark.parametrize("drop", ["component", "direct"])
def test_references_discard_components_whole_or_direct_hits(tmp_path: Path, drop: str) -> None:
    x, references, pool, against = chained(tmp_path)
    outcome = plain(tmp_path / "out", pool, against=[f"ev={against}"], drop=drop)
    rows = rows_in(outcome.out)
    kept = np.array([r["image_id"] for r in rows if r["reason"] != "self"])
    component, direct, label = relative_oracle(stored(x), stored(references), kept)
    assert len(component) > len(direct) > 5
    expected = component if drop == "component" else direct
    assert {r["image_id"] for r in rows if r["reason"] == "reference"} == expected
    summary = outcome.summary
    assert (summary["discarded_by_component"], summary["discarded_by_direct_hit"]) == (len(component), len(direct))
    (figures,) = summary["reference_sets"]
    assert (figures["reference_set"], figures["direct"], figures["component"]) == ("ev", len(direct), len(component))
    assert figures["largest_component"] == summary["largest_discarded_component"] > 1
    assert [r["reference_component_id"] for r in rows if r["reason"] != "self"] == kept[label].tolist()
    for row in rows:
        cosine = vectors.similarity(np.repeat(stored(x)[[row["image_id"]]], 30, 0), stored(references))
        best = [k for k in np.argsort(-cosine, kind="stable").tolist() if cosine[k] > np.float32(0.45)][:8]
        found = [(h["reference_id"], h["similarity"]) for h in row["references"]]
        assert found == ([] if row["reason"] == "self" else [(k, float(cosine[k])) for k in best])


def test_same_ids_in_two_reference_sets_are_two_images(tmp_path: Path) -> None:
    x, _, pool, against = chained(tmp_path)
    other = write_folder(tmp_path / "s", x[[100, 101]] * 1.0, parts=1)
    outcome = plain(tmp_path / "out", pool, against=[f"ev={against}", other])
    one, two = outcome.summary["reference_sets"]
    assert two["reference_set"] == "s" and two["direct"] >= 2 and one["direct"] > 5
    hits = [h for r in rows_in(outcome.out) for h in r["references"] if h["reference_set"] == "s"]
    assert {h["reference_id"] for h in hits} == {0, 1}
    forest = pq.read_table(storage.list_files(f"{outcome.out}/relative_forest", ".parquet")[0])
    assert set(forest["high_space"].to_pylist()) == {0, 1, 2}


def test_the_image_that_stays_is_chosen_as_asked(tmp_path: Path) -> None:
    x = planted(300)
    random = np.random.default_rng(2)
    width, height, score = random.integers(1, 9, 300), random.integers(1, 9, 300), random.random(300)
    folder = write_folder(tmp_path / "e", x, width=width, height=height, score=score, text=["a"] * 300)
    label = labels_of(stored(x), 0.6)
    values = stored(x).astype(np.float64)
    means = np.array([values[label == v].sum(axis=0) for v in label])
    wanted = {
        "resolution": (width * height).astype(float),
        "earliest": -np.arange(300.0),
        "column:score": score,
        "medoid": np.einsum("nd,nd->n", values, means),
    }
    for name, value in wanted.items():
        outcome = plain(tmp_path / name.replace(":", "-"), folder, representative=name)
        for row in rows_in(outcome.out):
            group = np.flatnonzero(label == label[row["image_id"]])
            assert row["kept"] == (row["image_id"] == group[np.argmax(value[group])]), (name, row)
        assert outcome.summary["representative"] == name
    for name, message in (("column:nothing", "no column `nothing`"), ("column:text", "not a number")):
        with pytest.raises(UserError, match=message):
            plain(tmp_path / "bad", folder, representative=name)


def test_without_sizes_the_earliest_stays_and_it_is_said(tmp_path: Path) -> None:
    outcome = plain(tmp_path / "out", write_folder(tmp_path / "e", planted(300)))
    assert outcome.summary["representative"] == "earliest"


def test_higher_threshold_rereads_the_forest_and_searches_nothing(tmp_path: Path) -> None:
    x, _, pool, against = chained(tmp_path)
    plain(tmp_path / "out", pool, against=[against])
    with pytest.raises(UserError, match=r"threshold: was 0\.6, now 0\.7"):
        plain(tmp_path / "out", pool, against=[against], threshold=0.7)
    ran.clear()
    outcome = plain(tmp_path / "out", pool, against=[against], threshold=0.7, rebuild=True)
    assert not any(name.startswith("forest") and "relative" not in name for name in ran)
    label = labels_of(stored(x), 0.7)
    assert [r["component_id"] for r in rows_in(outcome.out)] == label.tolist()
    fresh = plain(tmp_path / "new", pool, against=[against], threshold=0.7)
    assert [r["reason"] for r in rows_in(fresh.out)] == [r["reason"] for r in rows_in(outcome.out)]
    again = plain(tmp_path / "out", pool, against=[against], threshold=0.3, rebuild=True)
    assert again.summary["store_threshold"] == 0.3
    assert [r["component_id"] for r in rows_in(again.out)] == labels_of(stored(x), 0.3).tolist()


def test_sweep_of_thresholds_equals_a_run_at_each(tmp_path: Path) -> None:
    x, _, pool, against = chained(tmp_path)
    outcome = plain(tmp_path / "out", pool, against=[against])
    document = json.loads(Path(outcome.out, "thresholds.json").read_text())
    assert [row["threshold"] for row in document["self"]] == list(SWEEP)
    for row in document["self"]:
        label = labels_of(stored(x), row["threshold"])
        sizes = np.bincount(label)
        assert (row["components"], row["largest"]) == (int((sizes > 0).sum()), int(sizes.max()))
        assert row["duplicates"] == len(x) - row["components"]
    at = {row["threshold"]: row for row in document["relative"]}
    assert at[0.45]["component"] == outcome.summary["discarded_by_component"]
    assert at[0.5]["direct"] <= at[0.45]["direct"]


def test_largest_components_are_described_with_their_weakest_pair_and_chain(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    x = unit(random.standard_normal((200, DIMENSION)))
    for k in range(51, 60):
        x[k] = near(x[k - 1], 0.7, random)
    x[100:112] = x[99]
    outcome = plain(tmp_path / "out", write_folder(tmp_path / "e", x))
    first, second = json.loads(Path(outcome.out, "components.json").read_text())["largest"][:2]
    values, label = stored(x), labels_of(stored(x), 0.6)
    assert first["images"] == int(np.bincount(label).max()) and first["least_similarity"] > 0.99
    group = np.flatnonzero(label == second["component_id"])
    cosine = (values[group].astype(np.float64) @ values[group].astype(np.float64).T).astype(np.float32)
    assert second["least_similarity"] == float(cosine.min()) < 0.5
    assert [s["image_id"] for s in second["chain"]][:: len(second["chain"]) - 1] == second["least_similar"]
    assert all(s["similarity"] > 0.6 for s in second["chain"][1:])
    far = (cosine[0] <= np.float32(0.6)).mean()
    assert second["not_above_threshold_to_representative"] == pytest.approx(far, abs=1e-6)


@pytest.mark.usefixtures("ray_session")
def test_same_bytes_on_ray_and_in_one_process_in_any_order(tmp_path: Path) -> None:
    _, _, pool, against = chained(tmp_path)
    plain(tmp_path / "one", pool, against=[against], representative="medoid")
    plain(tmp_path / "two", pool, against=[against], representative="medoid", kind=Context)
    assert everything(str(tmp_path / "one")) == everything(str(tmp_path / "two"))


def interrupt(stage: Path, keep: int) -> None:
    """As if the driver had died after `keep` parts of its last generation."""
    document = json.loads((stage / "_stage.json").read_text())
    last = document["generations"][-1]
    folder = (
        stage if not (stage / f"gen-{last['generation']:04d}").exists() else stage / f"gen-{last['generation']:04d}"
    )
    for part in last["parts"][keep:]:
        (folder / f"{part['name']}.parquet").unlink()
    last |= {"complete": False, "parts": [], "files": {}, "summary": {}}
    (stage / "_stage.json").write_text(json.dumps(document))


def test_interrupted_runs_end_with_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, _, pool, against = chained(tmp_path)
    out = tmp_path / "out"
    plain(out, pool, against=[against])
    whole = everything(str(out))
    interrupt(out, 1)
    plain(out, pool, against=[against])
    assert everything(str(out)) == whole
    interrupt(out, 0)
    interrupt(out / "dedup-search", 0)
    plain(out, pool, against=[against])
    assert everything(str(out)) == whole
    assert plain(out, pool, against=[against]).skipped
    other = tmp_path / "other"
    calls = 0

    def dying(self: Context, *arguments: Any, **more: Any) -> Iterable[tuple[str, Any]]:
        nonlocal calls
        for item in Reversed.spread(self, *arguments, **more):
            calls += 1
            if calls in (2, 4, 8):
                raise KeyboardInterrupt
            yield item

    dies = type("Dies", (Context,), {"spread": dying})
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            plain(other, pool, against=[against], kind=dies)
    plain(other, pool, against=[against])
    assert everything(str(other)) == whole


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass
class Images:
    """A run made by hand: what `filter` and `score` would have left."""

    run: RunDirectory
    vectors: dict[int, np.ndarray] = field(default_factory=dict)

    def source(self, name: str, rows: int, exempt: bool = False) -> int:
        number = len(self.run.sources())
        self.run.register(Source(number, name, "folder", "/x", rows, f"d{number}", "import", number, None, exempt))
        return number

    def generation(self, parts: Mapping[str, Sequence[dict[str, Any]]]) -> None:
        """rows: image_id, source, vector or None, and columns of IMAGES that are not as usual."""
        for stage in ("score", "filter"):
            directory = self.run.stage(stage)
            number = len(directory.all_generations())
            generation = Generation(
                number, directory.generation_directory(number), Fingerprint(stage, 1, {"n": number}, {}, {}), {}
            )
            for name, rows in sorted(parts.items()):
                table = pa.Table.from_pylist(
                    [
                        dict.fromkeys(IMAGES.names)
                        | {"status": "ok", "width": 8, "height": 8}
                        | {k: v for k, v in row.items() if k != "vector"}
                        for row in rows
                    ],
                    schema=IMAGES,
                )
                files = {}
                if stage == "score":
                    embedded = [row for row in rows if row.get("vector") is not None]
                    x = np.array([row["vector"] for row in embedded]).reshape(-1, DIMENSION)
                    ids = np.array([row["image_id"] for row in embedded], np.uint64)
                    self.vectors |= dict(zip(ids.tolist(), stored(x), strict=True))
                    files[f"copy_embedding/{name}.parquet"] = storage.table_bytes(
                        embeddings_table(ids, x), {"curate.model": '{"name": "copies"}'}
                    )
                generation.parts.append(generation.writer.write(name, table, files=files))
            generation.complete = True
            directory.save(generation)

    def dedup(self, **options: Any) -> Outcome:
        return dedup.execute(Reversed(run=self.run), DedupConfig(**options))

    def rows(self) -> dict[int, dict[str, Any]]:
        paths = self.run.stage("dedup").part_paths()
        return {row["image_id"]: row for path in paths for row in pq.read_table(path).to_pylist()}


def a_run(root: Path) -> tuple[Images, np.ndarray]:
    """pool 0 (two parts), seeds 1 (exempt) and 2, references 3."""
    random = np.random.default_rng(7)
    images = Images(RunDirectory(str(root)))
    for name, exempt in (("pool:web", False), ("seed:exempt", True), ("seed:birds", False), ("reference:test", False)):
        images.source(name, 40, exempt)
    x = unit(random.standard_normal((60, DIMENSION)))
    x[5] = near(x[4], 0.9, random)  # copy of 4, larger
    x[11] = near(x[10], 0.8, random)
    x[12] = near(x[11], 0.8, random)
    x[52] = near(x[50], 0.9, random)  # a reference image near reference image 0
    x[20] = near(x[50], 0.7, random)  # a leak
    x[21] = near(x[20], 0.5, random)  # reached through the leak
    x[42] = near(x[51], 0.6, random)  # a seed that is a leak
    x[43] = near(x[20], 0.97, random)  # another, near the leak
    x[33] = near(x[42], 0.9, random)  # exempt seed: takes no part
    pool = [{"image_id": image_id(0, k), "source": "pool:web", "vector": x[k]} for k in range(30)]
    pool[5] |= {"width": 20}
    pool[7] |= {"status": "failed", "error": "http_404", "vector": None}
    pool[8] |= {"status": "dropped", "error": "duplicate_bytes: of 11", "duplicate_of": image_id(0, 11)}
    pool[9] |= {"status": "dropped", "error": "duplicate_pca_hash: 2", "duplicate_of": image_id(0, 8)}
    pool[13] |= {"status": "dropped", "error": "solid_colour: 1"}
    exempt = [{"image_id": image_id(1, k), "source": "seed:exempt", "vector": x[30 + k]} for k in range(5)]
    birds = [{"image_id": image_id(2, k), "source": "seed:birds", "vector": x[40 + k]} for k in range(5)]
    tests = [{"image_id": image_id(3, k), "source": "reference:test", "vector": x[50 + k]} for k in range(5)]
    images.generation(
        {
            "part-000-000000": pool[:16],
            "part-000-000001": pool[16:],
            "part-001-000000": exempt,
            "part-002-000000": birds,
            "part-003-000000": tests,
        }
    )
    return images, x


def test_run_has_a_row_for_each_pool_image_copy_and_seed_that_is_not_exempt(tmp_path: Path) -> None:
    images, _ = a_run(tmp_path)
    outcome = images.dedup()
    rows = images.rows()
    pool = [image_id(0, k) for k in range(30) if k not in (7, 13)]
    assert sorted(rows) == pool + [image_id(2, k) for k in range(5)]
    names = [p.name for p in images.run.stage("dedup").generations()[0].parts]
    assert names == [p.name for p in images.run.stage("filter").generations()[0].parts]

    def told(k: int, source: int = 0) -> tuple[str, bool, int]:
        row = rows[image_id(source, k)]
        return row["reason"], row["kept"], row["component_id"] - image_id(source, 0)

    assert told(5) == ("kept", True, 4) and told(4) == ("self", False, 4), "the larger image stays"
    assert told(10) == ("kept", True, 10) and told(12) == ("self", False, 10)
    assert told(8) == ("exact", False, 10) and told(9) == ("hash", False, 10), "copies of copies join the component"
    assert told(20) == ("reference", False, 20) and told(21) == ("reference", False, 21)
    assert told(2, 2) == ("reference", False, 2) and told(3, 2) == ("reference", False, 3)
    assert told(0, 2) == ("kept", True, 0)
    leak = rows[image_id(0, 20)]
    assert leak["references"][0]["reference_id"] == image_id(3, 0)
    assert leak["references"][0]["reference_set"] == "test"
    assert rows[image_id(2, 3)]["reference_component_id"] == image_id(0, 20)
    assert rows[image_id(0, 8)]["reference_component_id"] is None
    summary = outcome.summary
    assert (summary["exact"], summary["hash"], summary["seeds"], summary["seeds_discarded"]) == (1, 1, 5, 2)
    assert images.dedup().skipped


def test_later_generation_writes_rows_for_new_images_and_leaves_older_ones(tmp_path: Path) -> None:
    images, x = a_run(tmp_path)
    images.dedup()
    before = everything(str(tmp_path / "dedup" / "gen-0000"))
    random = np.random.default_rng(8)
    bridge = unit(x[0] + x[1])  # above 0.6 to both
    late = [
        {"image_id": image_id(0, 7), "source": "pool:web", "vector": near(x[5], 0.95, random), "width": 99},
        {"image_id": image_id(4, 0), "source": "pool:more", "vector": bridge},
        {"image_id": image_id(4, 1), "source": "pool:more", "vector": near(x[51], 0.8, random)},
        {"image_id": image_id(4, 2), "source": "pool:more", "vector": unit(random.standard_normal(DIMENSION))},
        {"image_id": image_id(4, 3), "source": "pool:more", "vector": near(x[20], 0.9, random)},
    ]
    late.append({"image_id": image_id(4, 4), "source": "pool:more", "vector": near(late[3]["vector"], 0.9, random)})
    images.source("pool:more", 5)
    images.generation({"part-000-000000-r1": late[:1], "part-004-000000": late[1:]})
    ran.clear()
    outcome = images.dedup()
    assert everything(str(tmp_path / "dedup" / "gen-0000")) == before
    assert [p.name for p in images.run.stage("dedup").generations()[1].parts] == [
        "part-000-000000-r1",
        "part-004-000000",
    ]
    rows = images.rows()
    told = {k: (rows[k]["reason"], rows[k]["component_id"]) for k in (r["image_id"] for r in late)}
    assert told == {
        image_id(0, 7): ("self", image_id(0, 4)),  # larger than its older representative, which stays
        image_id(4, 0): ("self", image_id(0, 0)),
        image_id(4, 1): ("reference", image_id(4, 1)),
        image_id(4, 2): ("kept", image_id(4, 2)),
        image_id(4, 3): ("self", image_id(0, 20)),  # of a representative that a reference image discarded
        image_id(4, 4): ("self", image_id(4, 2)),
    }
    assert outcome.summary["older_components_bridged"] == 1
    bridged = json.loads(Path(outcome.out, "bridged.json").read_text())
    assert bridged == [{"component_id": image_id(0, 0), "representatives": [image_id(0, 0), image_id(0, 1)]}]
    # The merged forest is that of one search over everything.
    forest = images.run.stage("dedup-search").generations()[-1].part_paths
    dedup.execute(Reversed(run=images.run, rebuild=True), DedupConfig())
    (tmp_path / "dedup-search" / "_stage.json").unlink()
    dedup.execute(Reversed(run=images.run, rebuild=True), DedupConfig())
    again = images.run.stage("dedup-search").generations()
    assert len(again) == 1
    assert pq.read_table(again[0].part_paths[0]).equals(pq.read_table(forest[0]))


def test_missing_copy_embeddings_are_said(tmp_path: Path) -> None:
    images, _ = a_run(tmp_path)
    path = next((tmp_path / "score" / "gen-0000" / "copy_embedding").glob("part-000-000001*"))
    ids, x = vectors.read_vectors(str(path), DIMENSION)
    path.write_bytes(storage.table_bytes(embeddings_table(ids[1:], x[1:]), {"curate.model": '{"name": "copies"}'}))
    with pytest.raises(UserError, match="no copy embedding of image 16"):
        images.dedup()
    with pytest.raises(UserError, match="--against goes with --embeddings"):
        images.dedup(against=["x"])


def test_run_without_pool_images_still_decontaminates_seeds(tmp_path: Path) -> None:
    images = Images(RunDirectory(str(tmp_path)))
    x = np.eye(3, DIMENSION)
    for name in ("seed:birds", "reference:test"):
        images.source(name, 2)
    seeds = [{"image_id": image_id(0, k), "source": "seed:birds", "vector": x[k]} for k in range(2)]
    tests = [{"image_id": image_id(1, 0), "source": "reference:test", "vector": x[0]}]
    images.generation({"part-000-000000": seeds, "part-001-000000": tests})
    outcome = images.dedup(representative="medoid")
    assert [row["reason"] for row in images.rows().values()] == ["reference", "kept"]
    assert outcome.summary["images"] == 0 and outcome.summary["seeds_discarded"] == 1
