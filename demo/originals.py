"""Which images of the corpus take part, and which of them are originals: no pair above 0.6 under exact search.

The copy embedding is that of the run itself (same adapter, same preparation, same float16), computed once and
kept in the cache. An original is the only one chosen of its component in the graph of *all* candidates: whatever
joins two originals later has come in with the planted copies, or was overlooked here.
"""

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from os import cpu_count, getpid
from pathlib import Path

import numpy as np

from curation.order import hash_keys
from demo.corpus import Corpus, Picture

MOST = {
    ("ufoai-textures", "texture"): 640,
    ("ufoai-textures", "picture"): 90,
    ("stellarium-data", "nebula"): 380,
    ("stellarium-data", "drawing"): 150,
    ("games-thumbnails", "screenshot"): 200,
    ("opencv-doc", "figure"): 160,
    ("opencv-doc", "photo"): 120,
    ("gcompris-qt-data", "painting"): 200,
    ("gcompris-qt-data", "other"): 150,
    ("tuxpaint-stamps-default", "drawing"): 130,
    ("pysiogame", "art4apps"): 200,
    ("elpv-dataset", "solar cell"): 200,
}
"""Images taken of a class that would else be half of the web, or cost minutes."""
SHORTEST, LARGEST, LONGEST_ASPECT = 64, 1_500_000, 3.0
"""Pixels of the short side, pixels in all, long side over short side."""
MODEL = "sscd"
THRESHOLD = 0.6
CHUNK = 64


def hashed(keys: Sequence[str], purpose: str) -> np.ndarray:
    """(n,) uint64 to sort by: a random order that depends on the keys alone."""
    words = [int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") for key in keys]
    return hash_keys(np.array(words, np.uint64), 0, purpose)


def shuffled(pictures: Sequence[Picture], purpose: str) -> list[Picture]:
    """In hash order of their paths."""
    return [pictures[i] for i in np.argsort(hashed([p.path for p in pictures], purpose), kind="stable")]


def candidates(corpus: Corpus) -> list[Picture]:
    """One picture per distinct file, large enough, not too large, at most MOST of a class; in path order."""
    taken: list[Picture] = []
    seen: set[str] = set()
    count: dict[tuple[str, str], int] = {}
    for picture in shuffled(corpus.pictures, "candidates"):
        key = (picture.package, picture.label)
        short, long = sorted((picture.width, picture.height))
        if short < SHORTEST or long > LONGEST_ASPECT * short or picture.width * picture.height > LARGEST:
            continue
        if picture.sha256 in seen or count.get(key, 0) >= MOST.get(key, len(corpus.pictures)):
            continue
        seen.add(picture.sha256)
        count[key] = count.get(key, 0) + 1
        taken.append(picture)
    return sorted(taken, key=lambda p: p.path)


def copy_vectors(corpus: Corpus, pictures: Sequence[Picture], cache: Path, say: Callable[[str], None]) -> np.ndarray:
    """(n, 512) float16 unit vectors; a picture that cannot be decoded has zeros. Kept by the files' sha256."""
    from embeddings.models import registry

    identity = f"{MODEL} {registry.libraries(MODEL)} {_versions(registry.libraries(MODEL))}"
    store = cache / f"{MODEL}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.npz"
    known: dict[str, np.ndarray] = {}
    if store.exists():
        with np.load(store) as stored:
            known = dict(zip(stored["sha256"].tolist(), stored["vectors"], strict=True))
    missing = [p for p in pictures if p.sha256 not in known]
    if missing:
        workers = max(1, min(4, cpu_count() or 1))
        say(f"copy embedding of {len(missing):,} images, once: about {len(missing) / 14 / workers / 60:.0f} min")
        chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
        jobs = [[str(corpus.root / p.path) for p in chunk] for chunk in chunks]
        with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
            for done, (chunk, rows) in enumerate(zip(chunks, pool.map(_embed, jobs), strict=True), 1):
                known |= {p.sha256: row for p, row in zip(chunk, rows, strict=True)}
                if done % 8 == 0 or done == len(chunks):
                    say(f"  {min(done * CHUNK, len(missing)):,} of {len(missing):,}")
                    _store(store, known)
    return np.stack([known[p.sha256] for p in pictures])


def _store(path: Path, known: dict[str, np.ndarray]) -> None:
    aside = path.with_name(f".{path.stem}.{getpid()}.npz")
    np.savez(aside, sha256=np.array(list(known)), vectors=np.stack(list(known.values())))
    aside.replace(path)


_model = None


def _embed(paths: list[str]) -> np.ndarray:
    global _model
    from curation.vectors import embeddings_table
    from embeddings.decoding import DecodeError, decode
    from embeddings.models import registry

    if _model is None:
        _model = registry.load(MODEL, "cpu")
    prepared, there = [], []
    for row, path in enumerate(paths):
        try:
            prepared.append(_model.prepare(decode(Path(path).read_bytes())))
            there.append(row)
        except DecodeError:
            continue
    result = np.zeros((len(paths), _model.dimension), np.float16)
    if there:
        rows = registry.embed_rows(_model, np.stack(prepared))
        stored = embeddings_table(np.arange(len(there), dtype=np.uint64), rows)["embedding"].combine_chunks()
        result[there] = stored.flatten().to_numpy(zero_copy_only=False).reshape(len(there), -1)
    return result


def _versions(names: Sequence[str]) -> list[str]:
    from importlib.metadata import version

    return [version(name) for name in names]


def pairs_above(vectors: np.ndarray, threshold: float) -> np.ndarray:
    """(m, 2) int64 rows i < j whose similarity, by its definition, is above the threshold. Exact search."""
    from curation.vectors import similarity

    wide = vectors.astype(np.float32)
    found = []
    for start in range(0, len(wide), 512):
        scores = wide[start : start + 512] @ wide.T
        i, j = np.nonzero(scores > threshold - 1e-3)
        i += start
        i, j = i[i < j], j[i < j]
        found.append(np.stack([i, j], axis=1)[similarity(vectors[i], vectors[j]) > np.float32(threshold)])
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)


def components(count: int, pairs: np.ndarray) -> np.ndarray:
    """(count,) int64: the smallest row of each row's component."""
    parent = np.arange(count)

    def root(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for i, j in pairs.tolist():
        a, b = root(i), root(j)
        parent[max(a, b)] = min(a, b)
    return np.array([root(row) for row in range(count)], np.int64)
