"""Faces are found where they are, at any size, and nothing of them is left after blurring.

mona_lisa.jpg: a crop of Leonardo's painting (public domain).
"""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from embeddings import faces, weights
from embeddings.decoding import decode

needs_weights = pytest.mark.skipif(faces.missing() is not None, reason="`python -m embeddings.weights` was not run")
MONA_LISA = Path(__file__).with_name("mona_lisa.jpg")
EYES = (63, 62)
"""The point between her eyes, in pixels of the file."""


def mona_lisa() -> np.ndarray:
    return decode(MONA_LISA.read_bytes())


def contains(box: np.ndarray, point: tuple[float, float]) -> bool:
    return bool(box[0] < point[0] < box[0] + box[2] and box[1] < point[1] < box[1] + box[3])


@pytest.fixture(scope="module")
def finder() -> faces.FaceFinder:
    return faces.FaceFinder(480)


@needs_weights
def test_the_rewritten_model_computes_what_the_file_does() -> None:
    import cv2

    path = weights.weight_path(faces.WEIGHTS)
    planes = np.random.default_rng(0).uniform(0, 255, (1, 3, 96, 64)).astype(np.float32)
    network = cv2.dnn.readNetFromONNX(str(path))
    network.setInput(planes)
    expected = network.forward(list(faces.OUTPUTS))
    finder = faces.FaceFinder(480, path.read_bytes())
    found = finder._session.run(list(faces.OUTPUTS), {finder._input: planes})
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@needs_weights
def test_one_face_is_found_where_it_is_at_any_size(finder: faces.FaceFinder) -> None:
    for factor in (1, 2, 6):
        image = Image.fromarray(mona_lisa())
        large = np.asarray(image.resize((image.width * factor, image.height * factor)))
        found = finder.find(large, 0.5)
        assert len(found) == 1 and found[0, 4] > 0.5
        assert contains(found[0], (EYES[0] * factor, EYES[1] * factor))
        assert 40 * factor < found[0, 2] < 80 * factor


@needs_weights
def test_no_face_is_found_in_noise_and_in_a_single_pixel(finder: faces.FaceFinder) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    assert finder.find(noise, 0.5).shape == (0, 5)
    assert finder.find(noise[:1, :1], 0.5).shape == (0, 5)


@needs_weights
def test_a_blurred_face_is_found_no_more_and_the_rest_is_untouched(finder: faces.FaceFinder) -> None:
    pixels = np.full((300, 400, 3), 128, np.uint8)
    picture = mona_lisa()
    pixels[100 : 100 + picture.shape[0], 200 : 200 + picture.shape[1]] = picture
    boxes = finder.find(pixels, 0.5)
    blurred = faces.blur(pixels, boxes)
    assert len(boxes) == 1 and len(finder.find(blurred, 0.5)) == 0
    changed = (blurred != pixels).any(axis=2)
    x, y, width, height = boxes[0, :4]
    inside = np.zeros_like(changed)
    inside[int(y) : int(y + height) + 1, int(x) : int(x + width) + 1] = True
    reach = int(width)
    near = np.zeros_like(changed)
    near[int(y) - reach : int(y + height) + reach, int(x) - reach : int(x + width) + reach] = True
    assert changed[inside].mean() > 0.95 and not changed[~near].any()


def test_blur_takes_boxes_that_reach_over_the_border() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    boxes = np.array([[-5, -5, 20, 20, 1], [35, 25, 30, 30, 1], [90, 90, 5, 5, 1], [0, 0, 0, 0, 1]], np.float32)
    blurred = faces.blur(pixels, boxes)
    assert blurred.shape == pixels.shape and (blurred[:10, :10] != pixels[:10, :10]).any()


def test_a_lossless_source_stays_lossless() -> None:
    pixels = mona_lisa()
    for source in ("PNG", "GIF", "BMP", "TIFF", None):
        data, suffix = faces.encode(pixels, source)
        assert suffix == "png"
        np.testing.assert_array_equal(decode(data), pixels)
    for source in ("JPEG", "WEBP", "AVIF"):
        data, suffix = faces.encode(pixels, source)
        assert suffix == "jpg" and np.abs(decode(data).astype(int) - pixels).mean() < 3


def test_overlapping_detections_become_the_best_one() -> None:
    boxes = np.array([[0, 0, 10, 10, 0.6], [1, 1, 10, 10, 0.9], [50, 50, 9, 9, 0.7]], np.float32)
    np.testing.assert_array_equal(faces._suppressed(boxes), boxes[[1, 2]])
