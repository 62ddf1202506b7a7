"""Colour operations on uint8 pixels, as Pillow computes them for torchvision: rounding at each step included.

In place and compiled, because in Pillow they cost more than decoding the image; on planes of one colour each, which
vector instructions like. Formulas of Pillow's `Blend.c`, `Convert.c` (L, HSV) and of torchvision's `adjust_hue`.
"""

import numba
import numpy as np

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CHUNK = 1024


@numba.njit(cache=True, nogil=True)
def to_planes(image: np.ndarray, flip: bool, out: np.ndarray) -> None:
    """image: (h, w, 3) uint8 into out, (3, h, w) uint8, mirrored or not."""
    height, width = image.shape[0], image.shape[1]
    for y in range(height):
        for c in range(3):
            if flip:
                for x in range(width):
                    out[c, y, x] = image[y, width - 1 - x, c]
            else:
                for x in range(width):
                    out[c, y, x] = image[y, x, c]


@numba.njit(cache=True, nogil=True)
def jitter(planes: np.ndarray, operations: np.ndarray, factors: np.ndarray) -> None:
    """planes: (3, n) uint8, contiguous, changed in place. operations: (k,) int64, factors: (k,) float32."""
    for i in range(len(operations)):
        factor = factors[i]
        if operations[i] == BRIGHTNESS:
            _towards(planes.reshape(-1), np.float32(0), factor)
        elif operations[i] == CONTRAST:
            _towards(planes.reshape(-1), np.float32(_mean_luma(planes)), factor)
        elif operations[i] == SATURATION:
            _saturation(planes, factor)
        else:
            _hue(planes, np.uint8(np.int32(factor * np.float32(255.0)) & 255))


@numba.njit(cache=True, nogil=True)
def grey(planes: np.ndarray) -> None:
    """planes: (3, n) uint8, contiguous, changed in place."""
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(planes.shape[1]):
        luma = _luma(red[i], green[i], blue[i])
        red[i] = luma
        green[i] = luma
        blue[i] = luma


@numba.njit(cache=True, nogil=True)
def solarise(planes: np.ndarray) -> None:
    """planes: (3, n) uint8, values from 128 on inverted in place."""
    flat = planes.reshape(-1)
    for i in range(len(flat)):
        flat[i] = flat[i] if flat[i] < 128 else np.uint8(255) - flat[i]


@numba.njit(inline="always")
def _luma(r: np.uint8, g: np.uint8, b: np.uint8) -> np.uint8:
    weighted = np.uint32(r) * np.uint32(19595) + np.uint32(g) * np.uint32(38470) + np.uint32(b) * np.uint32(7471)
    return np.uint8((weighted + np.uint32(0x8000)) >> np.uint32(16))


@numba.njit(inline="always")
def _clipped(value: np.float32) -> np.uint8:
    return np.uint8(np.int32(min(max(value, np.float32(0)), np.float32(255))))


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _towards(flat: np.ndarray, ground: np.float32, factor: np.float32) -> None:
    for i in range(len(flat)):
        flat[i] = _clipped(ground + factor * (np.float32(flat[i]) - ground))


@numba.njit(cache=True, nogil=True)
def _mean_luma(planes: np.ndarray) -> int:
    red, green, blue = planes[0], planes[1], planes[2]
    total = np.int64(0)
    for i in range(planes.shape[1]):
        total += np.int64(_luma(red[i], green[i], blue[i]))
    return int(total / planes.shape[1] + 0.5)


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _saturation(planes: np.ndarray, factor: np.float32) -> None:
    red, green, blue = planes[0], planes[1], planes[2]
    for i in range(planes.shape[1]):
        luma = np.float32(_luma(red[i], green[i], blue[i]))
        red[i] = _clipped(luma + factor * (np.float32(red[i]) - luma))
        green[i] = _clipped(luma + factor * (np.float32(green[i]) - luma))
        blue[i] = _clipped(luma + factor * (np.float32(blue[i]) - luma))


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _hue(planes: np.ndarray, shift: np.uint8) -> None:
    """To HSV of 8 bits each, the hue shifted around the circle, and back; stretch by stretch, without branches."""
    red, green, blue = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    one = np.float32(1)
    for start in range(0, planes.shape[1], CHUNK):
        count = min(CHUNK, planes.shape[1] - start)
        reds, greens, blues = planes[0, start:], planes[1, start:], planes[2, start:]
        for k in range(count):
            red[k] = np.float32(reds[k])
            green[k] = np.float32(greens[k])
            blue[k] = np.float32(blues[k])
        for k in range(count):
            r, g, b = red[k], green[k], blue[k]
            most, least = max(r, max(g, b)), min(r, min(g, b))  # noqa: PLW3301
            spread = most - least
            part = one / max(spread, one)
            turn = np.float32(2) + (b - r) * part if g == most else np.float32(4) + (r - g) * part
            turn = (g - b) * part if r == most else turn
            turn = turn * np.float32(1 / 6)
            turn = turn + one if turn < np.float32(0) else turn
            hue = np.float32((np.int32(turn * np.float32(255)) + np.int32(shift)) & np.int32(255)) * np.float32(6 / 255)
            saturation = np.float32(np.int32(spread * np.float32(255) / max(most, one))) * np.float32(1 / 255)
            red[k] = _channel(hue + np.float32(5), most, saturation)
            green[k] = _channel(hue + np.float32(3), most, saturation)
            blue[k] = _channel(hue + one, most, saturation)
        for k in range(count):
            reds[k] = np.uint8(np.int32(red[k]))
            greens[k] = np.uint8(np.int32(green[k]))
            blues[k] = np.uint8(np.int32(blue[k]))


@numba.njit(inline="always")
def _channel(place: np.float32, value: np.float32, saturation: np.float32) -> np.float32:
    """value (1 - saturation x) + 1/2, x the trapezium of this channel over the six sectors of the circle."""
    place = place - np.float32(6) if place >= np.float32(6) else place
    x = max(np.float32(0), min(min(place, np.float32(4) - place), np.float32(1)))  # noqa: PLW3301
    return value * (np.float32(1) - saturation * x) + np.float32(0.5)
