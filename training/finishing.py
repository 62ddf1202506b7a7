"""What a device does to crops that are cut already: colours, blur, solarisation, normalisation, of all at once.

The same operations with the same drawn numbers as on the CPU (`training.data.augmentation.colour`), rounding to 8 bits
after each; this is plain torch on any device, and what `training.kernels.augmentation` is held to. Colours are equal to
the CPU's to the bit; a blur may be a level away, as OpenCV's weights have 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.kernels import require_triton

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
BLUR_SIDE = 9
"""As `training.data` has them, which a machine that only trains need not be able to import."""
OPERATIONS = 4
GREY_AT, SIGMA_AT, SOLARISE_AT, NUMBERS = 8, 9, 10, 11
"""A crop's drawn numbers, float32: operations of `colour` in their order (-1: none), their factors, grey, sigma of the
blur in pixels (0: none), solarise."""

Finish = Callable[["UInt8[Tensor, 'n 3 h w']", "Float[Tensor, 'n 11']", Sequence[float], Sequence[float]], Tensor]
"""(crops, drawn numbers, mean, std) -> (n, 3, h, w) float32, normalised: `finish`, or its kernel."""


def choose(kind: str, device: torch.device) -> Finish:
    """kind: reference or triton. Raises UserError for kernels that cannot run here."""
    if kind == "reference":
        return finish
    require_triton("kernels.augmentation: triton", device.type)
    from training.kernels import augmentation

    return augmentation.finish


def finish(
    crops: UInt8[Tensor, "n 3 h w"], drawn: Float[Tensor, "n 11"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "n 3 h w"]:
    """drawn: on the CPU, so that the device is never waited for."""
    x = crops.float()
    for place in range(OPERATIONS):
        for operation, apply in APPLY.items():
            rows = chosen(drawn[:, place] == operation, x.device)
            if len(rows):
                factor = drawn[drawn[:, place] == operation, OPERATIONS + place].to(x.device).view(-1, 1, 1, 1)
                x[rows] = apply(x[rows], factor)
    rows = chosen(drawn[:, GREY_AT] > 0, x.device)
    x[rows] = luma(x[rows]).expand(-1, 3, -1, -1)
    rows = chosen(drawn[:, SIGMA_AT] > 0, x.device)
    if len(rows):
        x[rows] = blurred(x[rows], drawn[drawn[:, SIGMA_AT] > 0, SIGMA_AT].to(x.device))
    rows = chosen(drawn[:, SOLARISE_AT] > 0, x.device)
    x[rows] = torch.where(x[rows] < 128, x[rows], 255 - x[rows])
    scale, shift = normalisation(mean, std)
    return x.mul_(scale.to(x.device).view(3, 1, 1)).sub_(shift.to(x.device).view(3, 1, 1))


def normalisation(mean: Sequence[float], std: Sequence[float]) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]]:
    """(scale, shift) of pixels from 0 to 255."""
    return torch.tensor(std).mul(255).reciprocal(), torch.tensor(mean).div(torch.tensor(std))


def chosen(which: Tensor, device: torch.device) -> Tensor:
    """Row numbers, on the device."""
    return which.nonzero().flatten().to(device, non_blocking=True)


def clipped(x: Tensor) -> Tensor:
    """Whole levels, cut off as Pillow does."""
    return x.clamp(0, 255).trunc()


def luma(x: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Pillow's, from whole levels; sums stay below 2²⁴, so float32 is exact."""
    red, green, blue = x.split(1, dim=1)
    return ((red * 19595 + green * 38470 + blue * 7471 + 0x8000) / 65536).floor()


def blurred(x: Float[Tensor, "n 3 h w"], sigma: Float[Tensor, "n"]) -> Float[Tensor, "n 3 h w"]:
    """Gaussian of 9 x 9 pixels, mirrored at the border without repeating it."""
    reach = BLUR_SIDE // 2
    height, width = x.shape[-2:]
    weights = torch.exp(torch.arange(-reach, reach + 1, device=x.device).square() / (-2 * sigma.square()[:, None]))
    weights = (weights / weights.sum(1, keepdim=True)).T[..., None, None, None]
    x = torch.nn.functional.pad(x, [reach] * 4, mode="reflect")
    x = sum(w * x[..., i : i + width] for i, w in enumerate(weights))
    x = sum(w * x[..., i : i + height, :] for i, w in enumerate(weights))
    return clipped(x + 0.5)


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Towards black."""
    return clipped(factor * x)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Towards the crop's mean grey."""
    count = x.shape[-2] * x.shape[-1]
    total = luma(x).to(torch.int64).sum((-2, -1), keepdim=True)
    mean = ((2 * total + count) // (2 * count)).float()
    return clipped(mean + factor * (x - mean))


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Towards each pixel's grey."""
    grey = luma(x)
    return clipped(grey + factor * (x - grey))


def hue(x: Tensor, factor: Tensor) -> Tensor:
    """Around the circle, through HSV of 8 bits."""
    shift = (factor * 255).to(torch.int32) & 255
    red, green, blue = x.split(1, dim=1)
    most, least = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    spread = most - least
    part = 1 / spread.clamp(min=1)
    turn = torch.where(green == most, 2 + (blue - red) * part, 4 + (red - green) * part)
    turn = torch.where(red == most, (green - blue) * part, turn) * (1 / 6)
    turn = torch.where(turn < 0, turn + 1, turn)
    place = (((turn * 255).to(torch.int32) + shift) & 255).float() * (6 / 255)
    colourful = (spread * 255 / most.clamp(min=1)).trunc() * (1 / 255)
    channels = []
    for offset in (5, 3, 1):
        at = place + offset
        at = torch.where(at >= 6, at - 6, at)
        channels.append(most * (1 - colourful * torch.minimum(at, 4 - at).clamp(0, 1)) + 0.5)
    return torch.cat(channels, dim=1).trunc()


APPLY: dict[int, Callable[[Tensor, Tensor], Tensor]] = {
    BRIGHTNESS: brightness,
    CONTRAST: contrast,
    SATURATION: saturation,
    HUE: hue,
}
