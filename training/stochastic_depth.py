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
    rows, start, kept_tokens = [], 0, 0
    begins = np.full((2 * depth, sum(layout.counts)), -1, dtype=np.int32)
    for kind, (places, length) in enumerate(zip(chosen, layout.lengths, strict=True)):
        if places:
            kept_here = np.concatenate(places, axis=1)
            count, first_sequence = kept_here.shape[1], sum(layout.counts[:kind])
            own = kept_tokens + np.arange(count, dtype=np.int32) * length
            np.put_along_axis(begins, first_sequence + kept_here, np.broadcast_to(own, kept_here.shape), axis=1)
            first = to_device(torch.from_numpy(start + kept_here * length), torch.device(device))
            rows.append((first[:, :, None] + torch.arange(length, device=device)).flatten(1))
            kept_tokens += count * length
        start += layout.tokens[kind]
    of_branch = torch.cat(rows, dim=1).unbind(0)
    begins_of_branch = to_device(torch.from_numpy(begins), torch.device(device)).unbind(0)
    part = Layout(tuple(sum(p.shape[1] for p in places) for places in chosen), layout.lengths)
    scales = tuple(crops / count for crops, count in zip(per_group, keep, strict=True))
    kept = [Kept(r, part, scales, begins) for r, begins in zip(of_branch, begins_of_branch, strict=True)]
    return list(zip(kept[::2], kept[1::2], strict=True))
