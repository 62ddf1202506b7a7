"""Vectors with known truth for the benchmarks of the join, and the truth.

    python -m benchmarks.data hard --count 125000 --folder /tmp/hard-125k --threshold 0.6

`hard`: copies at cosines uniform in .6-.99 with isotropic noise. `easy`: grown from real SSCD vectors and from what
real transformations of images do to them (`benchmarks/easy_base.py`). `giant_cell`, `all_equal`, `uniform`: what a
join through cells likes least. A folder holds `vectors/*.parquet` (float16, as the pipeline writes them),
`planted.npz` (which row was made from which) and `data.json` (every parameter).

Originals are made block by block, each with its copies, and shuffled to parts through scratch files: memory is
that of one part whatever the count, and equal parameters give equal bytes.
"""

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from curation import vectors
from curation.order import generator

REVISION = 1
PART_ROWS = 25_000
BLOCK_ROWS = 4096
COPIES = 0.25
FEW_COPIES = 0.02
LEAST_COSINE, MOST_COSINE = 0.6, 0.99
GROUP_EXPONENT, LARGEST_GROUP = 2.5, 500
"""Copies of an original that has any: k with probability ~ k^-2.5, cut at 500 (at 125,000 rows some have hundreds)."""
TOPICS, TOPIC_WEIGHT = 300, 0.6
CONE_COSINE = 0.5
EASY_BASE = Path(".cache/benchmarks/easy_base.npz")
EASY_MIXTURE = {"resized": 0.3, "recompressed": 0.3, "cropped": 0.2, "overlaid": 0.2}
"""Share of each transformation among the kin of `easy`; exact copies never come as far as a join of embeddings."""
KEPT = 0.55
"""Most of a real vector's own deviation that a vector grown from it keeps: see `Easy`."""


@dataclass(frozen=True)
class Data:
    """A folder of made vectors. Row number = image_id = position over the parts in order."""

    folder: Path
    parameters: dict[str, Any]

    @property
    def vectors(self) -> str:
        return str(self.folder / "vectors")

    @property
    def count(self) -> int:
        return int(self.parameters["count"])

    def planted(self) -> dict[str, np.ndarray]:
        """copy, original: (c,) int64 rows; similarity: (c,) float32 of the stored pair; all by the copy's row."""
        with np.load(self.folder / "planted.npz") as stored:
            return {name: stored[name] for name in stored.files}

    def load(self) -> np.ndarray:
        """(count, d) float16, all of it."""
        known = vectors.open_folder(self.vectors)
        out = np.empty((known.rows, known.dimension), np.float16)
        for partition, _, block in known.blocks():
            out[partition.first_row : partition.first_row + partition.rows] = block
        return out


def unit(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def isotropic(random: np.random.Generator, rows: int, dimension: int) -> np.ndarray:
    """(rows, dimension) float32 unit vectors of no direction."""
    return unit(random.standard_normal((rows, dimension), dtype=np.float32))


def beside(rows: np.ndarray, cosine: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Unit vectors at exactly `cosine` (n,) from unit `rows` (n, d), in the direction of `noise` (n, d)."""
    sideways = unit(noise - (noise * rows).sum(axis=1, keepdims=True) * rows)
    cosine = cosine[:, None].astype(np.float32)
    return np.asarray(cosine * rows + np.sqrt(1 - cosine**2) * sideways)


class Hard:
    """Originals around topics of Zipf sizes; copies at uniform cosines, isotropic noise."""

    copies = COPIES

    def __init__(self, dimension: int, seed: int) -> None:
        self.dimension = dimension
        self.topics = isotropic(generator(seed, "hard:topics"), TOPICS, dimension)
        share = 1 / np.arange(1, TOPICS + 1)
        self.share = share / share.sum()

    def originals(self, random: np.random.Generator, rows: int) -> np.ndarray:
        topic = self.topics[random.choice(TOPICS, rows, p=self.share)]
        weight = np.float32(TOPIC_WEIGHT)
        return unit(weight * topic + np.sqrt(1 - weight**2) * isotropic(random, rows, self.dimension))

    def made_from(self, random: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        cosine = random.uniform(LEAST_COSINE, MOST_COSINE, len(rows))
        return beside(rows, cosine, isotropic(random, len(rows), self.dimension))


class Uniform(Hard):
    """No topics at all, few copies: cells mean nothing here."""

    copies = FEW_COPIES

    def originals(self, random: np.random.Generator, rows: int) -> np.ndarray:
        return isotropic(random, rows, self.dimension)


class GiantCell(Hard):
    """One narrow cone: every two originals near .5, too close for cells to part and all below .6; few copies."""

    copies = FEW_COPIES

    def originals(self, random: np.random.Generator, rows: int) -> np.ndarray:
        axis = self.topics[0]
        noise = isotropic(random, rows, self.dimension)
        return beside(np.broadcast_to(axis, noise.shape), np.full(rows, CONE_COSINE**0.5), noise)


class AllEqual(Hard):
    """The same vector, count times."""

    copies = 0.0

    def originals(self, random: np.random.Generator, rows: int) -> np.ndarray:
        return np.repeat(self.topics[:1], rows, axis=0)


class Easy:
    """Grown from real SSCD vectors x of families f: unit(m_f + a (x - m_f) + sqrt(1 - a^2) R_f z), z normal.

    m_f is the mean and R_f a root of the (shrunk) covariance of the family, so families keep their mean and spread
    whatever a is (the smoothed bootstrap with its variance kept), and cosines between and within them are
    distributed as the real ones. a is uniform below KEPT: the larger it is, the closer the nearest neighbours, as with
    real vectors, and the more vectors of one x lie above the threshold once there are hundreds of each.
    `benchmarks/easy_base.py` writes both distributions down. Kin: a transformation by EASY_MIXTURE, one of the
    cosines measured for it, and a direction drawn with the covariance of the real directions.
    """

    copies = COPIES

    def __init__(self, dimension: int, seed: int) -> None:
        with np.load(EASY_BASE) as stored:
            real = stored["originals"].astype(np.float32)
            kin, parent, kind = stored["kin"].astype(np.float32), stored["parent"], stored["transformation"]
            self.family, self.roots = stored["family"], stored["roots"]
        if dimension != real.shape[1]:
            raise ValueError(f"{EASY_BASE} has vectors of {real.shape[1]} dimensions, not {dimension}")
        self.real = unit(real)
        self.means = means(self.real, self.family)
        self.cosines = {
            name: vectors.similarity(kin[kind == name], real[parent[kind == name]]) for name in EASY_MIXTURE
        }
        cosine = vectors.similarity(kin, real[parent])[:, None]
        away = kin - cosine * self.real[parent]
        directions = unit(away[cosine[:, 0] < 0.995]).astype(np.float64)
        self.sideways = root(directions.T @ directions / len(directions))

    def originals(self, random: np.random.Generator, rows: int) -> np.ndarray:
        chosen = random.integers(0, len(self.real), rows)
        kept = random.uniform(0, KEPT, rows).astype(np.float32)[:, None]
        noise = random.standard_normal((rows, self.real.shape[1]), dtype=np.float32)
        family = self.family[chosen]
        for number in np.unique(family).tolist():
            noise[family == number] = noise[family == number] @ self.roots[number]
        mean = self.means[family]
        return unit(mean + kept * (self.real[chosen] - mean) + np.sqrt(1 - kept**2) * noise)

    def made_from(self, random: np.random.Generator, rows: np.ndarray) -> np.ndarray:
        names = list(EASY_MIXTURE)
        which = random.choice(len(names), len(rows), p=list(EASY_MIXTURE.values()))
        at = random.random(len(rows))
        cosine = np.empty(len(rows), np.float32)
        for number, name in enumerate(names):
            mine = which == number
            cosine[mine] = self.cosines[name][(at[mine] * len(self.cosines[name])).astype(int)]
        noise = random.standard_normal(rows.shape, dtype=np.float32) @ self.sideways
        return beside(rows, np.minimum(cosine, 1), noise)


def means(rows: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(groups, d) float32: mean of the rows (n, d) of each group (n,)."""
    total = np.zeros((int(group.max()) + 1, rows.shape[1]))
    np.add.at(total, group, rows)
    return (total / np.maximum(np.bincount(group), 1)[:, None]).astype(np.float32)


def root(covariance: np.ndarray) -> np.ndarray:
    """(d, d) float32 R with R'R the covariance (d, d): standard normal rows @ R have it."""
    values, axes = np.linalg.eigh(covariance)
    return (np.sqrt(np.maximum(values, 0))[:, None] * axes.T).astype(np.float32)


KINDS: dict[str, Callable[[int, int], Any]] = {
    "hard": Hard,
    "easy": Easy,
    "uniform": Uniform,
    "giant_cell": GiantCell,
    "all_equal": AllEqual,
}


def make(kind: str, folder: str | Path, count: int, *, dimension: int = 512, seed: int = 0) -> Data:
    """The folder, made unless it holds just this already."""
    folder = Path(folder)
    law = KINDS[kind](dimension, seed)
    parameters = {
        "kind": kind,
        "revision": REVISION,
        "count": count,
        "dimension": dimension,
        "seed": seed,
        "copies": law.copies,
        "group_exponent": GROUP_EXPONENT,
        "largest_group": LARGEST_GROUP,
        "part_rows": PART_ROWS,
        "block_rows": BLOCK_ROWS,
    }
    if isinstance(law, Easy):
        parameters |= {"kept": KEPT, "mixture": EASY_MIXTURE, "base_sha256": base_digest(EASY_BASE)}
    else:
        parameters |= {
            "cosines": [LEAST_COSINE, MOST_COSINE],
            "topics": TOPICS,
            "topic_weight": TOPIC_WEIGHT,
            "cone_cosine": CONE_COSINE,
        }
    known = folder / "data.json"
    if known.exists() and json.loads(known.read_text())["parameters"] == json.loads(json.dumps(parameters)):
        return Data(folder, parameters)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "vectors").mkdir(parents=True)
    planted = _write(law, folder, count, dimension, seed, kind)
    sizes = np.bincount(np.unique(planted["original"], return_inverse=True)[1]) if len(planted["original"]) else [0]
    document = {
        "parameters": parameters,
        "planted": {
            "copies": len(planted["copy"]),
            "groups": int(np.count_nonzero(sizes)),
            "largest_group": int(np.max(sizes)),
            "copies_in_groups_of_64_or_more": int(np.sum(np.asarray(sizes)[np.asarray(sizes) >= 64])),
            "pairs_above_0.6": int((planted["similarity"] > np.float32(0.6)).sum()),
        },
    }
    known.write_text(json.dumps(document, indent=1) + "\n")
    return Data(folder, parameters)


def group_sizes(random: np.random.Generator, copies: int, originals: int) -> np.ndarray:
    """(groups,) copies of each original that has any: heavy-tailed, `copies` in all, at most `originals` groups."""
    if not copies:
        return np.empty(0, np.int64)
    sizes = np.arange(1, LARGEST_GROUP + 1)
    share = sizes**-GROUP_EXPONENT
    mean = float((sizes * share).sum() / share.sum())
    drawn = random.choice(sizes, min(originals, int(1.2 * copies / mean) + 2 * LARGEST_GROUP), p=share / share.sum())
    last = int(np.searchsorted(np.cumsum(drawn), copies))
    if last >= len(drawn):
        raise ValueError(f"{originals} originals are too few for {copies} copies")
    drawn = drawn[: last + 1].astype(np.int64)
    drawn[last] -= drawn.sum() - copies
    return np.asarray(drawn)


def _write(law: Any, folder: Path, count: int, dimension: int, seed: int, kind: str) -> dict[str, np.ndarray]:
    random = generator(seed, f"{kind}:plan")
    copies = round(count * law.copies)
    originals = count - copies
    sizes = group_sizes(random, copies, originals)
    source = np.sort(np.repeat(random.permutation(originals)[: len(sizes)], sizes))
    place = random.permutation(count)
    similarity = np.empty(copies, np.float32)
    scratch = folder / "scratch"
    scratch.mkdir()
    for block, first in enumerate(range(0, originals, BLOCK_ROWS)):
        end = min(first + BLOCK_ROWS, originals)
        random = generator(seed, f"{kind}:block:{block}")
        rows = law.originals(random, end - first)
        begin, stop = np.searchsorted(source, [first, end])
        parents = source[begin:stop] - first
        made = law.made_from(random, rows[parents]) if stop > begin else rows[:0]
        stored = unit(np.concatenate([rows, made])).astype(np.float16)
        similarity[begin:stop] = vectors.similarity(stored[end - first :], stored[parents])
        _append(scratch, stored, np.concatenate([place[first:end], place[originals + begin : originals + stop]]))
    for part in range(-(-count // PART_ROWS)):
        ids = np.arange(part * PART_ROWS, min((part + 1) * PART_ROWS, count), dtype=np.uint64)
        at = np.fromfile(scratch / f"{part}.at", np.int64)
        ordered = np.empty((len(ids), dimension), np.float16)
        ordered[at] = np.fromfile(scratch / f"{part}.vectors", np.float16).reshape(-1, dimension)
        table = vectors.embeddings_table(ids, ordered)
        pq.write_table(table, folder / "vectors" / f"part-{part:06d}.parquet", use_dictionary=False, compression="none")
    shutil.rmtree(scratch)
    order = np.argsort(place[originals:])
    planted = {
        "copy": place[originals:][order],
        "original": place[source][order],
        "similarity": similarity[order],
    }
    np.savez(folder / "planted.npz", **planted)  # type: ignore[arg-type]
    return planted


def _append(scratch: Path, stored: np.ndarray, places: np.ndarray) -> None:
    """Add rows to the scratch files of the parts that hold their places."""
    order = np.argsort(places, kind="stable")
    ordered = places[order]
    parts, starts = np.unique(ordered // PART_ROWS, return_index=True)
    for part, rows in zip(parts.tolist(), np.split(order, starts[1:]), strict=True):
        with open(scratch / f"{part}.vectors", "ab") as file:
            stored[rows].tofile(file)
        with open(scratch / f"{part}.at", "ab") as file:
            (places[rows] - part * PART_ROWS).tofile(file)


def base_digest(base: Path) -> str:
    """sha256 over the arrays of the base of `easy`."""
    import hashlib

    digest = hashlib.sha256()
    with np.load(base) as stored:
        for name in sorted(stored.files):
            digest.update(name.encode() + stored[name].tobytes())
    return digest.hexdigest()


def main() -> None:
    from benchmarks import truth

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=list(KINDS))
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--threshold", type=float, help="write the sample of exact pairs above it, too")
    arguments = parser.parse_args()
    data = make(arguments.kind, arguments.folder, arguments.count, dimension=arguments.dimension, seed=arguments.seed)
    print((data.folder / "data.json").read_text())
    if arguments.threshold is not None:
        sample = truth.sample_of(data, arguments.threshold)
        print(f"{len(sample.query):,} exact pairs above {arguments.threshold} of {len(sample.queries):,} queries")


if __name__ == "__main__":
    main()
