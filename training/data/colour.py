"""Colour operations on uint8 pixels, as Pillow computes them for torchvision: rounding at each step included.

In place and compiled, because in Pillow they cost more than decoding the image. Formulas of Pillow's `Blend.c`,
`Convert.c` (L, HSV) and of torchvision's `adjust_hue`.
"""

import numba
import numpy as np

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
CHUNK = 512


@numba.njit(cache=True, nogil=True)
def jitter(image: np.ndarray, operations: np.ndarray, factors: np.ndarray) -> None:
    """image: (h, w, 3) uint8, contiguous, changed in place. operations: (k,) int64, factors: (k,) float32."""
    flat = image.reshape(-1)
    for i in range(len(operations)):
        factor = factors[i]
        if operations[i] == BRIGHTNESS:
            _towards(flat, np.float32(0), factor)
        elif operations[i] == CONTRAST:
            _towards(flat, np.float32(_mean_luma(flat)), factor)
        elif operations[i] == SATURATION:
            _saturation(flat, factor)
        else:
            _hue(flat, np.uint8(np.int32(factor * np.float32(255.0)) & 255))


@numba.njit(cache=True, nogil=True)
def grey(image: np.ndarray) -> None:
    """image: (h, w, 3) uint8, contiguous, changed in place."""
    flat = image.reshape(-1)
    for i in range(0, len(flat), 3):
        luma = _luma(flat[i], flat[i + 1], flat[i + 2])
        flat[i] = luma
        flat[i + 1] = luma
        flat[i + 2] = luma


@numba.njit(cache=True, nogil=True)
def finish(image: np.ndarray, flip: bool, solarise: bool, out: np.ndarray) -> None:
    """image: (h, w, 3) uint8 into out, (3, h, w) uint8, mirrored or not, values from 128 on inverted or not."""
    height, width = image.shape[0], image.shape[1]
    for y in range(height):
        for c in range(3):
            if flip:
                for x in range(width):
                    out[c, y, x] = image[y, width - 1 - x, c]
            else:
                for x in range(width):
                    out[c, y, x] = image[y, x, c]
    if solarise:
        flat = out.reshape(-1)
        for i in range(len(flat)):
            value = flat[i]
            flat[i] = value if value < 128 else np.uint8(255) - value


@numba.njit(inline="always")
def _luma(r: np.uint8, g: np.uint8, b: np.uint8) -> np.uint8:
    return np.uint8(
        (
            np.uint32(r) * np.uint32(19595)
            + np.uint32(g) * np.uint32(38470)
            + np.uint32(b) * np.uint32(7471)
            + np.uint32(0x8000)
        )
        >> np.uint32(16)
    )


@numba.njit(inline="always")
def _clipped(value: np.float32) -> np.uint8:
    return np.uint8(min(max(value, np.float32(0)), np.float32(255)))


@numba.njit(cache=True, nogil=True)
def _towards(flat: np.ndarray, ground: np.float32, factor: np.float32) -> None:
    for i in range(len(flat)):
        flat[i] = _clipped(ground + factor * (np.float32(flat[i]) - ground))


@numba.njit(cache=True, nogil=True)
def _mean_luma(flat: np.ndarray) -> int:
    total = np.int64(0)
    for i in range(0, len(flat), 3):
        total += np.int64(_luma(flat[i], flat[i + 1], flat[i + 2]))
    return int(total / (len(flat) // 3) + 0.5)


@numba.njit(cache=True, nogil=True)
def _saturation(flat: np.ndarray, factor: np.float32) -> None:
    for i in range(0, len(flat), 3):
        luma = np.float32(_luma(flat[i], flat[i + 1], flat[i + 2]))
        for c in range(3):
            flat[i + c] = _clipped(luma + factor * (np.float32(flat[i + c]) - luma))


@numba.njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _hue(flat: np.ndarray, shift: np.uint8) -> None:
    """To HSV of 8 bits each, the hue shifted around the circle, and back.

    Stretch by stretch in planes and without branches, so that the compiler vectorises it: a third of the time.
    """
    red, green, blue = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    one = np.float32(1)
    for start in range(0, len(flat) // 3, CHUNK):
        count = min(CHUNK, len(flat) // 3 - start)
        for k in range(count):
            i = 3 * (start + k)
            red[k], green[k], blue[k] = np.float32(flat[i]), np.float32(flat[i + 1]), np.float32(flat[i + 2])
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
            i = 3 * (start + k)
            flat[i] = np.uint8(np.int32(red[k]))
            flat[i + 1] = np.uint8(np.int32(green[k]))
            flat[i + 2] = np.uint8(np.int32(blue[k]))


@numba.njit(inline="always")
def _channel(place: np.float32, value: np.float32, saturation: np.float32) -> np.float32:
    """value (1 - saturation x) + 1/2, x the trapezium of this channel over the six sectors of the circle."""
    place = place - np.float32(6) if place >= np.float32(6) else place
    x = max(np.float32(0), min(min(place, np.float32(4) - place), np.float32(1)))  # noqa: PLW3301
    return value * (np.float32(1) - saturation * x) + np.float32(0.5)
