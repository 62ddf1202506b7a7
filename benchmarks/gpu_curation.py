"""The part of `make gpu` for `curation.device`: pairs above a threshold, nearest centroids, search by groups, top-k.

What is called is what workers call, on arrays of the host; so the times hold the transfers. Checked against float64 on
sampled rows: what a device is sure of must be true, and what may be true must be nominated. Needs torch and numpy only.
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from curation.device import Device, margin, slack

Failures = list[str]
SIZES = {
    "above": (32_768, 32_768, 512),
    "nearest": (131_072, 16_384, 1024),
    "search": (131_072, 100_096, 1024),
    "top": (8_192, 65_536, 512),
}
"""Vectors, what they are compared with, dimensions."""
GROUPS, VISITS, NEIGHBOURS, THRESHOLD = 632, 8, 16, 0.6
SAMPLED = 512


def curation(torch: Any, document: dict[str, Any], median_seconds: Any) -> dict[str, Any]:
    """Figures of each, on the first GPU."""
    found: dict[str, Any] = {}
    document["curation"] = found
    measured(torch, Device("cuda:0"), SIZES, document["failures"], document["ceilings"]["fp32_flop_per_s"], found)
    return found


def measured(
    torch: Any,
    device: Device,
    sizes: dict[str, tuple[int, int, int]],
    failures: Failures,
    fp32_flop_per_s: float,
    found: dict[str, Any],
) -> None:
    """found[name] <- seconds, share of the float32 ceiling, and how much was left to the CPU."""
    for name, measure in (("above", above), ("nearest", nearest), ("search", search), ("top", top)):
        row, flop = measure(torch, device, sizes[name], failures)
        if device.name != "cpu":
            row["peak_bytes"] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        found[name] = row | {
            "sizes": sizes[name],
            "flop": flop,
            "share_of_fp32_ceiling": flop / row["median_s"] / fp32_flop_per_s,
        }


def above(torch: Any, device: Device, size: tuple[int, int, int], failures: Failures) -> tuple[dict[str, Any], float]:
    """Pairs nominated, of them below the threshold, and missing."""
    rows, others, dimension = size
    left, right = unit(rows, dimension, 0), unit(others, dimension, 1)
    kin = np.random.default_rng(2).integers(0, others, rows // 4)
    left[::4][: len(kin)] = mixed(left[::4][: len(kin)], right[kin])
    bound, starts = THRESHOLD - margin(dimension), np.zeros(rows, np.int64)

    def run() -> list[tuple[np.ndarray, np.ndarray]]:
        return list(device.above(left, right, bound, starts))

    timed, pairs = seconds_of(run)
    nominated = torch.zeros(SAMPLED, others, dtype=torch.bool, device=device.name)
    for at, column in pairs:
        mine = at < SAMPLED
        nominated[torch.from_numpy(at[mine]), torch.from_numpy(column[mine])] = True
    exact = double(torch, device, left[:SAMPLED]) @ double(torch, device, right).T
    missing = int(((exact > THRESHOLD) & ~nominated).sum())
    wrong = int((nominated & (exact < bound - margin(dimension))).sum())
    if missing or wrong:
        failures.append(f"curation: {missing} pairs are missing, {wrong} are nominated that lie below the margin")
    told = {"pairs": sum(len(at) for at, _ in pairs), "sampled": int((exact > THRESHOLD).sum()), "missing": missing}
    return {**timed, **told}, 2.0 * rows * others * dimension


def nearest(torch: Any, device: Device, size: tuple[int, int, int], failures: Failures) -> tuple[dict[str, Any], float]:
    """Rows that are left to the definition, and rows that are wrong."""
    rows, count, dimension = size
    centroids = unit(count, dimension, 1)
    vectors = mixed(unit(rows, dimension, 0), centroids[np.random.default_rng(2).integers(0, count, rows)])
    halves, bound = half_norms(centroids), 2 * slack(dimension, 1.0, 1.0)

    def run() -> list[tuple[slice, np.ndarray, np.ndarray, np.ndarray]]:
        return list(device.nearest(vectors, centroids, halves, bound))

    timed, parts = seconds_of(run)
    exact = distances(torch, device, vectors[:SAMPLED], centroids).argmin(dim=1).cpu().numpy()
    wrong = 0
    for where, best, unsure, open_ in parts:
        told = best == exact[where] if where.stop <= SAMPLED else best[: max(0, SAMPLED - where.start)] == exact[where]
        mine = unsure < len(told)
        told[unsure[mine]] = open_[mine, exact[where][unsure[mine]]]
        wrong += int((~told).sum())
    if wrong:
        failures.append(f"curation: {wrong} of {SAMPLED} vectors are assigned to a centroid that is not the nearest")
    left_open = sum(len(unsure) for _, _, unsure, _ in parts) / rows
    return {**timed, "share_left_open": left_open, "wrong": wrong}, 2.0 * rows * count * dimension


def search(torch: Any, device: Device, size: tuple[int, int, int], failures: Failures) -> tuple[dict[str, Any], float]:
    """The same through groups; rows left open go the CPU's way."""
    rows, count, dimension = size
    groups = min(GROUPS, count // 8)
    starts = np.linspace(0, count, groups + 1).astype(np.int64)
    centroids = mixed(unit(count, dimension, 1), np.repeat(unit(groups, dimension, 3), np.diff(starts), axis=0))
    vectors = mixed(unit(rows, dimension, 0), centroids[np.random.default_rng(2).integers(0, count, rows)])
    means = np.add.reduceat(centroids, starts[:-1], axis=0) / np.diff(starts).astype(np.float32)[:, None]
    halves, bound = half_norms(centroids), 2 * slack(dimension, 1.0, 1.0)

    def run() -> tuple[np.ndarray, np.ndarray]:
        return device.search(vectors, centroids, halves, starts, means, VISITS, bound)

    timed, (best, sure) = seconds_of(run)
    visited = distances(torch, device, vectors[:SAMPLED], means).topk(VISITS, dim=1, largest=False).indices
    allowed = torch.zeros(SAMPLED, groups, dtype=torch.bool, device=device.name).scatter_(1, visited, True)
    group = torch.from_numpy(np.repeat(np.arange(groups), np.diff(starts))).to(device.name)
    exact = distances(torch, device, vectors[:SAMPLED], centroids)
    exact[~allowed[:, group]] = torch.inf
    wrong = int((sure[:SAMPLED] & (best[:SAMPLED] != exact.argmin(dim=1).cpu().numpy())).sum())
    if wrong:
        failures.append(f"curation: {wrong} of {SAMPLED} vectors are sure of a centroid that is not the nearest")
    flop = 2.0 * rows * dimension * (groups + (VISITS + 4) * count / groups)
    return {**timed, "share_left_open": float((~sure).mean()), "wrong": wrong}, flop


def top(torch: Any, device: Device, size: tuple[int, int, int], failures: Failures) -> tuple[dict[str, Any], float]:
    """The greatest error of a product that was found."""
    rows, others, dimension = size
    queries, base = unit(rows, dimension, 0), unit(others, dimension, 1)

    def run() -> tuple[np.ndarray, np.ndarray]:
        return device.top(queries, base, NEIGHBOURS)

    timed, (values, places) = seconds_of(run)
    exact = double(torch, device, queries[:SAMPLED]) @ double(torch, device, base).T
    best = exact.topk(NEIGHBOURS, dim=1).values.cpu().numpy()
    own = exact.gather(1, torch.from_numpy(places[:SAMPLED]).to(device.name)).cpu().numpy()
    error = float(max(np.abs(values[:SAMPLED] - best).max(), np.abs(values[:SAMPLED] - own).max()))
    if not error <= margin(dimension):
        failures.append(f"curation: products of the top {NEIGHBOURS} are off by {error:.2e}")
    return {**timed, "greatest_error": error}, 2.0 * rows * others * dimension


def seconds_of(run: Callable[[], Any], repeats: int = 3) -> tuple[dict[str, float], Any]:
    """Wall time from arrays of the host to arrays of the host, after one call that warms up; and what came of it."""
    found = run()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - began)
    return {"median_s": float(np.median(seconds)), "min_s": min(seconds), "max_s": max(seconds)}, found


def unit(rows: int, dimension: int, seed: int) -> np.ndarray:
    """(rows, dimension) float32 of unit length. All bits count: TensorFloat-32 would hold float16 values exactly."""
    found = np.random.default_rng(seed).standard_normal((rows, dimension), np.float32)
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def mixed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Unit vectors near `other`: cosines between 0.58 and 1, about."""
    share = np.random.default_rng(4).random((len(one), 1), np.float32) * 1.4
    found = other + share * one
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def half_norms(vectors: np.ndarray) -> np.ndarray:
    """(n,) float32."""
    return np.asarray(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64) / 2, np.float32)


def double(torch: Any, device: Device, array: np.ndarray) -> Any:
    """On the device in float64."""
    return torch.from_numpy(array).to(device.name).double()


def distances(torch: Any, device: Device, vectors: np.ndarray, centroids: np.ndarray) -> Any:
    """(n, k) float64 half squared distances, less half the vectors' own."""
    wide = double(torch, device, centroids)
    return (wide * wide).sum(dim=1) / 2 - double(torch, device, vectors) @ wide.T
