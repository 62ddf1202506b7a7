"""uint8 batches through a torch module: normalised on the device, float32, one thread on a CPU."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def run(
    forward: Callable[[Any], Any], batch: np.ndarray, mean: Sequence[float], std: Sequence[float], device: str
) -> np.ndarray:
    """batch: (b, h, w, 3) uint8. Returns (b, d) float32.

    On a CPU one thread computes, so that sums are cut the same on two cores and on sixty-four; workers give the
    parallelism. On a GPU TF32 stays off.
    """
    import torch

    threads = torch.get_num_threads()
    if device == "cpu" and threads != 1:
        torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            pixels = torch.from_numpy(np.array(batch)).to(device).permute(0, 3, 1, 2).to(torch.float32)
            centre = torch.tensor(mean, device=device).mul(255).view(1, 3, 1, 1)
            scale = torch.tensor(std, device=device).mul(255).view(1, 3, 1, 1)
            rows = forward((pixels - centre) / scale)  # NHWC in memory, as channels-last convolutions like it
            return np.asarray(rows.flatten(1).to(torch.float32).cpu().numpy())
    finally:
        if device == "cpu" and threads != 1:
            torch.set_num_threads(threads)
