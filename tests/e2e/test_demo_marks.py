"""The demo's marks against runs written by hand, whose right answers are plain to see."""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation import storage
from curation.schemas import DUPLICATES, EDGES, IMAGES, RETRIEVAL, image_id
from demo.evaluation import Marks, evaluate
from demo.plant import TRUTH
from pipelines.run_directory import Fingerprint, Generation, RunDirectory, Source

POOL, ANIMALS, REFERENCE = 0, 1, 2


class Hand:
    """A run of a few rows: (kind, copy, of, label, filter status, error, component, kept, reason)."""

    def __init__(self, folder: Path) -> None:
        self.run = RunDirectory(str(folder / "run"))
        self.folder = folder
        self.truth: list[dict[str, Any]] = []
        self.images: list[dict[str, Any]] = []
        self.duplicates: list[dict[str, Any]] = []
        self.edges: list[tuple[int, int, float]] = []
        self.retrieved: list[tuple[int, str]] = []
        for number, name in enumerate(("pool:web", "seed:animals", "reference:evaluation")):
            stage = "download" if number == POOL else "import"
            self.run.register(Source(number, name, "urls", "list", 1, "digest", stage, 0))

    def add(
        self,
        kind: str,
        *,
        copy: str = "",
        of: int | None = None,
        label: str = "photo",
        status: str = "ok",
        error: str | None = None,
        repeats: int | None = None,
        component: int | None = None,
        kept: bool = True,
        reason: str = "kept",
        should: tuple[str, str] = ("ok", ""),
    ) -> int:
        row = len(self.truth)
        about = {"kind": kind, "copy": copy, "way": "", "of": "" if of is None else f"sha{of}", "sha256": f"sha{row}"}
        expected = {"status": should[0], "error": should[1]}
        self.truth.append(
            {
                "row": row,
                "url": f"http://x/{row}",
                "label": label,
                "package": "p",
                "path": f"p/{row}.png",
                **about,
                **expected,
            }
        )
        image = {"image_id": image_id(POOL, row), "source": "pool:web", "status": status, "error": error}
        self.images.append(image | {"duplicate_of": None if repeats is None else image_id(POOL, repeats)})
        if status == "ok":
            component = row if component is None else component
            verdict = {"image_id": image_id(POOL, row), "component_id": image_id(POOL, component)}
            self.duplicates.append(verdict | {"kept": kept, "reason": reason})
        return row

    def marks(self) -> Marks:
        pq.write_table(pa.Table.from_pylist(self.truth, schema=TRUTH), self.folder / "truth.parquet")
        edges = [
            {"low_space": 0, "low": image_id(POOL, a), "high_space": 0, "high": image_id(POOL, b), "similarity": s}
            for a, b, s in self.edges
        ]
        forest = storage.table_bytes(pa.Table.from_pylist(edges, schema=EDGES))
        self._stage("filter", self.images, IMAGES)
        self._stage("dedup", self.duplicates, DUPLICATES, {"self_forest/part-000.parquet": forest})
        drawn = [
            {
                "image_id": image_id(POOL, row),
                "seed_set": name,
                "mode": "sample",
                "seed_id": image_id(ANIMALS, 0),
                "rank": 0,
            }
            for row, name in self.retrieved
        ]
        self._stage("retrieve", drawn, RETRIEVAL)
        return evaluate(self.folder / "run", self.folder, {}, exact_search=True)

    def _stage(
        self, name: str, rows: list[dict[str, Any]], schema: pa.Schema, files: dict[str, bytes] | None = None
    ) -> None:
        directory = self.run.stage(name)
        fingerprint = Fingerprint(name, 1, {}, {}, {})
        generation = Generation(0, directory.generation_directory(0), fingerprint, {}, complete=True)
        for relative, data in (files or {}).items():
            generation.put_file(relative, data)
        table = pa.Table.from_pylist([{f.name: row.get(f.name) for f in schema} for row in rows], schema=schema)
        generation.parts = [generation.writer.write("part-000-000000", table)]
        directory.save(generation)


def verdict(marks: Marks, words: str) -> bool | None:
    (check,) = [c for c in marks.checks if words in c.promise]
    return check.kept


def test_a_run_that_found_everything_keeps_every_promise(tmp_path: Path) -> None:
    hand = Hand(tmp_path)
    first = hand.add("original", label="animal")
    for _ in range(8):
        hand.add("original")
    hand.add("copy", copy="exact", of=first, status="dropped", error="duplicate_bytes", repeats=first)
    hand.add("copy", copy="resized", of=1, component=1, kept=False, reason="self")
    hand.add("copy", copy="cropped", of=2)  # missed, and nobody promised it
    hand.add("leak", copy="exact", of=99, kept=False, reason="reference")
    hand.add("missing", status="failed", error="http_404", should=("failed", "http_404"))
    hand.retrieved = [(first, "animals")]
    marks = hand.marks()
    assert [c.promise for c in marks.checks if c.kept is False] == []
    assert marks.passed
    assert marks.numbers["copies"]["cropped"] == {"planted": 1, "usable": 1, "found": 0}
    assert marks.numbers["retrieval"]["animals"]["precision"] == 1.0


def test_each_broken_promise_is_seen(tmp_path: Path) -> None:
    hand = Hand(tmp_path)
    hand.add("original", label="animal")
    hand.add("original")
    hand.add("original", component=1)
    hand.add("copy", copy="exact", of=0)
    hand.add("copy", copy="recompressed", of=1)
    hand.add("leak", copy="resized", of=99)
    hand.add("html", status="ok", should=("failed", "not_an_image"))
    hand.retrieved = [(1, "animals")]
    marks = hand.marks()
    for words in ("every exact copy", "95 %", "0.5 %", "leaks", "every fault", "retrieval for animals"):
        assert verdict(marks, words) is False, words
    assert not marks.passed


def test_originals_that_share_a_component_are_listed_with_their_chain(tmp_path: Path) -> None:
    hand = Hand(tmp_path)
    hand.add("original")
    hand.add("original", component=0, kept=False, reason="self")
    hand.add("copy", copy="cropped", of=0, component=0, kept=False, reason="self")
    hand.edges = [(0, 2, 0.71), (1, 2, 0.625)]
    marks = hand.marks()
    (section,) = [s for s in marks.sections if s.title.startswith("Originals joined")]
    assert section.rows == [["0.png", "1.png", "0.png —0.710— 2.png (cropped copy) —0.625— 1.png"]]
    assert marks.numbers["originals"]["sharing"] == 2


def test_an_original_that_the_filter_took_for_a_copy_of_another_counts_as_sharing(tmp_path: Path) -> None:
    hand = Hand(tmp_path)
    hand.add("original")
    hand.add("original", status="dropped", error="duplicate_pca_hash", repeats=0)
    marks = hand.marks()
    (section,) = [s for s in marks.sections if s.title.startswith("Originals joined")]
    assert marks.numbers["originals"]["sharing"] == 2
    assert section.rows == [["0.png", "1.png", "0.png —duplicate_pca_hash— 1.png"]]


def test_a_leak_whose_copy_stays_in_the_pool_is_not_removed(tmp_path: Path) -> None:
    hand = Hand(tmp_path)
    hand.add("original")
    hand.add("leak", copy="exact", of=99, component=0, kept=False, reason="self")
    assert verdict(hand.marks(), "leaks") is False
