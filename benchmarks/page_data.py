"""The result files as the page reads them: whatever is there, by what they measured."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

KINDS = ("hard", "easy")
METHODS = {
    "exact": "exact products",
    "ivf_flat": "FAISS IVF-Flat",
    "ivf_flat_big_batch": "FAISS IVF-Flat, big batch",
    "ivf_sqfp16": "FAISS IVF-SQfp16",
    "ivf_sq_fp16": "FAISS IVF-SQfp16",
    "ivf_pq": "FAISS IVF-PQ",
    "ivf_pq_fastscan": "FAISS IVF-PQ FastScan",
    "ivf_rabitq": "FAISS IVF-RaBitQ",
    "hnsw": "FAISS HNSW",
    "one_cell": "one cell (SemDeDup)",
}


@dataclass(frozen=True)
class Rival:
    """One method on one set of vectors. extrapolated: from a share of the work."""

    kind: str
    vectors: int
    method: str
    name: str
    cpu_seconds: float
    recall: float | None
    low: float | None
    peak_bytes: int
    setting: dict[str, Any]
    extrapolated: bool

    @property
    def reached(self) -> bool:
        """0.99 nominated, as far as its sample can tell."""
        return self.method == "exact" or (self.recall is not None and self.recall >= 0.99)


@dataclass(frozen=True)
class Results:
    """A folder of result files."""

    folder: Path

    def read(self, name: str) -> dict[str, Any] | None:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def named(self, pattern: str) -> list[tuple[str, dict[str, Any]]]:
        """(name, document) of the files of a pattern, by name."""
        return [(path.stem, json.loads(path.read_text())) for path in sorted(self.folder.glob(f"{pattern}.json"))]

    def joins(self, kind: str) -> list[dict[str, Any]]:
        """The runs of the join on one law of vectors, by their number."""
        found = [document for _, document in self.named(f"join-{kind}-*") if "vectors" in document]
        return sorted(found, key=lambda document: int(document["vectors"]))

    def join(self, kind: str, vectors: int) -> dict[str, Any] | None:
        return next((run for run in self.joins(kind) if run["vectors"] == vectors), None)

    def exponent(self, kind: str, first: int = 125_000, last: int = 1_000_000) -> float | None:
        """Of CPU seconds against vectors, by least squares over the runs between two sizes."""
        runs = [run for run in self.joins(kind) if first <= run["vectors"] <= last]
        if len(runs) < 2:
            return None
        x = [math.log(run["vectors"]) for run in runs]
        y = [math.log(run["cpu_seconds"]) for run in runs]
        mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
        return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)

    def rivals(self) -> Iterator[Rival]:
        for _, document in self.named("rivals-*"):
            parameters = document["data"]["parameters"]
            for result in document["results"]:
                setting, extrapolated = result["setting"], result.get("extrapolated_cpu_seconds")
                if setting.get("share", 1.0) < 1 and extrapolated is None:
                    continue
                recall = (result.get("recall") or {}).get("both") or {}
                yield Rival(
                    parameters["kind"],
                    int(parameters["count"]),
                    setting["method"],
                    METHODS.get(setting["method"], setting["method"]),
                    float(extrapolated or result["cpu_seconds"]),
                    recall.get("recall"),
                    recall.get("low"),
                    int(result["peak_memory_bytes"]),
                    setting,
                    extrapolated is not None,
                )

    def best_rivals(self, kind: str, vectors: int) -> list[Rival]:
        """The cheapest setting of each method that reached the recall, else its best; cheapest method first."""
        best: dict[str, Rival] = {}
        for rival in self.rivals():
            if (rival.kind, rival.vectors) != (kind, vectors):
                continue
            old = best.get(rival.method)
            if old is None or (not rival.reached, rival.cpu_seconds) < (not old.reached, old.cpu_seconds):
                best[rival.method] = rival
        return sorted(best.values(), key=lambda rival: rival.cpu_seconds)

    def fastest_rival(self, kind: str, vectors: int) -> Rival | None:
        """The cheapest of FAISS's that reached the recall."""
        able = [r for r in self.best_rivals(kind, vectors) if r.reached and r.method not in ("exact", "one_cell")]
        return able[0] if able else None

    def retrievals(self) -> list[dict[str, Any]]:
        found = [document for _, document in self.named("retrieve*") if "methods" in document]
        return sorted(found, key=lambda document: int(document["arguments"]["vectors"]))
