"""Which crops each residual branch computes in a step; the others cost nothing (DINOv2, section 5).

Drawn per group of `group_size` samples, numbered in the global batch, and per size of crop: the draw depends on (seed,
group number) and on nothing that a process happens to hold.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from curation.order import generator
from training.model import Kept, Layout
from training.parallel import to_device


def choose_kept(
    layout: Layout,
    groups: Sequence[int],
    *,
    group_size: int,
    rate: float,
    depth: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> list[tuple[Kept, Kept]] | None:
    """Per block what its attention and its feed-forward keep; None where nothing is dropped.

    layout: of the packed crops of a micro-batch. groups: the numbers of its groups.
    """
    if rate == 0:
        return None
    samples = group_size * len(groups)
    per_group = [count // samples * group_size for count in layout.counts]
    keep = [max(int(crops * (1 - rate)), 1) for crops in per_group]
    chosen: list[list[np.ndarray]] = [[] for _ in layout.counts]
    for place, group in enumerate(groups):
        random = generator(seed, f"stochastic depth {group}")
        for kind, (crops, count) in enumerate(zip(per_group, keep, strict=True)):
            if crops == 0:
                continue
            drawn = np.sort(random.random((2 * depth, crops)).argsort(axis=1)[:, :count], axis=1)
            view, member = drawn // group_size, drawn % group_size
            chosen[kind].append(view * samples + place * group_size + member)  # crops are crop-major
    rows, start = [], 0
    for places, length, tokens in zip(chosen, layout.lengths, layout.tokens, strict=True):
        if places:
            first = to_device(torch.from_numpy(start + np.concatenate(places, axis=1) * length), torch.device(device))
            rows.append((first[:, :, None] + torch.arange(length, device=device)).flatten(1))
        start += tokens
    of_branch = torch.cat(rows, dim=1).unbind(0)
    part = Layout(tuple(sum(p.shape[1] for p in places) for places in chosen), layout.lengths)
    scales = tuple(crops / count for crops, count in zip(per_group, keep, strict=True))
    kept = [Kept(branch, part, scales) for branch in of_branch]
    return list(zip(kept[::2], kept[1::2], strict=True))
