"""Colours, blur, solarisation and normalisation of all crops of one size, in two launches.

The kernel of `training.finishing.finish`, with the same rounding to 8 bits after each operation. A program of the
first reads its crop twice, the second time out of the cache: once for the mean grey that contrast pulls towards, which
the operations before it change, and once to write the coloured crop as 8 bits. A program of the second takes a stretch
of a crop's pixels, with their neighbours where it is blurred, and writes float32. Bytes per value: 1 read, 1 + 1
through the cache, 4 written.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl

from training.finishing import (
    BLUR_SIDE,
    BRIGHTNESS,
    CONTRAST,
    GREY_AT,
    NUMBERS,
    OPERATIONS,
    SATURATION,
    SIGMA_AT,
    SOLARISE_AT,
    normalisation,
)

if TYPE_CHECKING:
    from jaxtyping import Float, UInt8
    from torch import Tensor

PIXELS = 1024
"""Of a tile; a program of 8 warps. Not measured on a device yet."""

_BRIGHTNESS, _CONTRAST, _SATURATION = (tl.constexpr(int(o)) for o in (BRIGHTNESS, CONTRAST, SATURATION))
_NUMBERS, _OPERATIONS, _REACH = tl.constexpr(NUMBERS), tl.constexpr(OPERATIONS), tl.constexpr(BLUR_SIDE // 2)
_GREY, _SIGMA, _SOLARISE = tl.constexpr(GREY_AT), tl.constexpr(SIGMA_AT), tl.constexpr(SOLARISE_AT)


def finish(
    crops: UInt8[Tensor, "n 3 h w"], drawn: Float[Tensor, "n 11"], mean: Sequence[float], std: Sequence[float]
) -> Float[Tensor, "n 3 h w"]:
    """As `training.finishing.finish`; mirrored borders take sides of at least 5 pixels."""
    count, _, height, width = crops.shape
    crops = crops.contiguous()
    out = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
    if not count:
        return out
    if crops.is_cuda:
        drawn = drawn.pin_memory().to(crops.device, non_blocking=True)
    drawn = drawn.contiguous()
    coloured = torch.empty_like(crops)
    pixels = height * width
    tile = min(PIXELS, triton.next_power_of_2(pixels))
    # Fused multiply-adds would round elsewhere than the CPU does, and cut off another level.
    options = {"TILE": tile, "num_warps": 8, "enable_fp_fusion": False}
    _colour[count,](crops, drawn, coloured, pixels, **options)
    scale, shift = (part.tolist() for part in normalisation(mean, std))
    tiles = triton.cdiv(pixels, tile)
    _finish[count * tiles,](coloured, drawn, out, height, width, tiles, *scale, *shift, **options)
    return out


@triton.jit
def _luma(red, green, blue):
    """Pillow's, from whole levels below 256: sums stay below 2**24, so float32 is exact."""
    return tl.floor((red * 19595.0 + green * 38470.0 + blue * 7471.0 + 32768.0) * (1.0 / 65536.0))


@triton.jit
def _clipped(x):
    return tl.minimum(tl.maximum(x, 0.0), 255.0).to(tl.int32).to(tl.float32)


@triton.jit
def _channel(place, value, saturation):
    place = tl.where(place >= 6.0, place - 6.0, place)
    x = tl.maximum(0.0, tl.minimum(tl.minimum(place, 4.0 - place), 1.0))
    return (value * (1.0 - saturation * x) + 0.5).to(tl.int32).to(tl.float32)


@triton.jit
def _hue(red, green, blue, factor):
    shift = (factor * 255.0).to(tl.int32) & 255
    most = tl.maximum(red, tl.maximum(green, blue))
    spread = most - tl.minimum(red, tl.minimum(green, blue))
    part = tl.div_rn(1.0, tl.maximum(spread, 1.0))
    turn = tl.where(green == most, 2.0 + (blue - red) * part, 4.0 + (red - green) * part)
    turn = tl.where(red == most, (green - blue) * part, turn) * (1.0 / 6.0)
    turn = tl.where(turn < 0.0, turn + 1.0, turn)
    place = (((turn * 255.0).to(tl.int32) + shift) & 255).to(tl.float32) * (6.0 / 255.0)
    saturation = tl.div_rn(spread * 255.0, tl.maximum(most, 1.0)).to(tl.int32).to(tl.float32) * (1.0 / 255.0)
    return (
        _channel(place + 5.0, most, saturation),
        _channel(place + 3.0, most, saturation),
        _channel(place + 1.0, most, saturation),
    )


@triton.jit
def _apply(red, green, blue, operation, factor, mean):
    if operation == _BRIGHTNESS:
        red, green, blue = _clipped(factor * red), _clipped(factor * green), _clipped(factor * blue)
    elif operation == _CONTRAST:
        red = _clipped(mean + factor * (red - mean))
        green = _clipped(mean + factor * (green - mean))
        blue = _clipped(mean + factor * (blue - mean))
    elif operation == _SATURATION:
        grey = _luma(red, green, blue)
        red = _clipped(grey + factor * (red - grey))
        green = _clipped(grey + factor * (green - grey))
        blue = _clipped(grey + factor * (blue - grey))
    else:
        red, green, blue = _hue(red, green, blue, factor)
    return red, green, blue


@triton.jit
def _colour(crops, drawn, coloured, pixels, TILE: tl.constexpr):
    crop = tl.program_id(0).to(tl.int64)
    crops += crop * 3 * pixels
    coloured += crop * 3 * pixels
    drawn += crop * _NUMBERS
    jittered = tl.load(drawn) >= 0.0
    mean = 0.0
    if jittered:
        total = 0
        for start in range(0, pixels, TILE):
            pixel = start + tl.arange(0, TILE)
            inside = pixel < pixels
            red = tl.load(crops + pixel, mask=inside, other=0).to(tl.float32)
            green = tl.load(crops + pixels + pixel, mask=inside, other=0).to(tl.float32)
            blue = tl.load(crops + 2 * pixels + pixel, mask=inside, other=0).to(tl.float32)
            reached = False
            for place in tl.static_range(_OPERATIONS):
                operation = tl.load(drawn + place).to(tl.int32)
                reached = reached | (operation == _CONTRAST)
                if not reached:
                    factor = tl.load(drawn + _OPERATIONS + place)
                    red, green, blue = _apply(red, green, blue, operation, factor, 0.0)
            total += tl.sum(tl.where(inside, _luma(red, green, blue), 0.0).to(tl.int32), axis=0)
        mean = ((2 * total + pixels) // (2 * pixels)).to(tl.float32)
    grey = tl.load(drawn + _GREY) > 0.0
    for start in range(0, pixels, TILE):
        pixel = start + tl.arange(0, TILE)
        inside = pixel < pixels
        red = tl.load(crops + pixel, mask=inside, other=0).to(tl.float32)
        green = tl.load(crops + pixels + pixel, mask=inside, other=0).to(tl.float32)
        blue = tl.load(crops + 2 * pixels + pixel, mask=inside, other=0).to(tl.float32)
        if jittered:
            for place in tl.static_range(_OPERATIONS):
                operation = tl.load(drawn + place).to(tl.int32)
                factor = tl.load(drawn + _OPERATIONS + place)
                red, green, blue = _apply(red, green, blue, operation, factor, mean)
        if grey:
            red = _luma(red, green, blue)
            green = red
            blue = red
        tl.store(coloured + pixel, red.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(coloured + pixels + pixel, green.to(tl.int32).to(tl.uint8), mask=inside)
        tl.store(coloured + 2 * pixels + pixel, blue.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit
def _mirrored(place, length):
    """Mirrored at the border without repeating it."""
    place = tl.abs(place)
    return tl.where(place >= length, 2 * length - 2 - place, place)


@triton.jit
def _gauss(offset, sigma):
    return tl.exp(tl.div_rn(offset * offset, -2.0 * sigma * sigma))


@triton.jit
def _plane(plane, y, x, height, width, inside, sigma, solarised, scale, shift, out):
    if sigma > 0.0:
        total = 0.0
        for i in tl.static_range(2 * _REACH + 1):
            total += _gauss(i - _REACH + 0.0, sigma)
        value = tl.zeros_like(x).to(tl.float32)
        for i in range(0, 2 * _REACH + 1):
            row = plane + _mirrored(y + (i - _REACH), height) * width
            across = tl.zeros_like(x).to(tl.float32)
            for j in range(0, 2 * _REACH + 1):
                level = tl.load(row + _mirrored(x + (j - _REACH), width), mask=inside, other=0).to(tl.float32)
                across += tl.div_rn(_gauss(j - _REACH + 0.0, sigma), total) * level
            value += tl.div_rn(_gauss(i - _REACH + 0.0, sigma), total) * across
        value = _clipped(value + 0.5)
    else:
        value = tl.load(plane + y * width + x, mask=inside, other=0).to(tl.float32)
    if solarised:
        value = tl.where(value < 128.0, value, 255.0 - value)
    tl.store(out + y * width + x, value * scale - shift, mask=inside)


@triton.jit
def _finish(
    coloured,
    drawn,
    out,
    height,
    width,
    tiles,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    TILE: tl.constexpr,
):
    crop = (tl.program_id(0) // tiles).to(tl.int64)
    pixel = (tl.program_id(0) % tiles) * TILE + tl.arange(0, TILE)
    inside = pixel < height * width
    y, x = pixel // width, pixel % width
    sigma = tl.load(drawn + crop * _NUMBERS + _SIGMA)
    solarised = tl.load(drawn + crop * _NUMBERS + _SOLARISE) > 0.0
    pixels = height * width
    coloured += crop * 3 * pixels
    out += crop * 3 * pixels
    _plane(coloured, y, x, height, width, inside, sigma, solarised, red_scale, red_shift, out)
    coloured += pixels
    out += pixels
    _plane(coloured, y, x, height, width, inside, sigma, solarised, green_scale, green_shift, out)
    coloured += pixels
    out += pixels
    _plane(coloured, y, x, height, width, inside, sigma, solarised, blue_scale, blue_shift, out)
