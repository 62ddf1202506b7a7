"""Hashes of pixels depend on the pixels alone."""

import io

import numpy as np
import pytest
from PIL import Image

from embeddings import hashes
from embeddings.decoding import decode


def blobs(count: int, seed: int = 0) -> np.ndarray:
    """(count, 32, 32) uint8: smooth random luminances, as those of photographs are."""
    cells = np.random.default_rng(seed).integers(0, 256, (count, 8, 8), dtype=np.uint8)
    return np.array([np.asarray(Image.fromarray(c).resize((32, 32), Image.Resampling.BICUBIC)) for c in cells])


@pytest.fixture(scope="module")
def fitted() -> hashes.PcaHash:
    made = hashes.fit(blobs(300))
    assert made is not None
    return made


def test_equal_pixels_have_one_digest_in_any_lossless_file() -> None:
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    digests = set()
    for kind, options in (("PNG", {}), ("BMP", {}), ("WEBP", {"lossless": True}), ("TIFF", {})):
        sink = io.BytesIO()
        image.save(sink, kind, **options)
        digests.add(hashes.pixel_sha256(decode(sink.getvalue())))
    assert len(digests) == 1


def test_the_digest_tells_shapes_apart_that_have_the_same_bytes() -> None:
    pixels = np.zeros((4, 6, 3), np.uint8)
    assert hashes.pixel_sha256(pixels) != hashes.pixel_sha256(pixels.reshape(6, 4, 3))


def test_contrast_is_the_standard_deviation() -> None:
    luminances = blobs(20)
    expected = luminances.reshape(20, -1).astype(np.float64).std(axis=1)
    np.testing.assert_allclose(hashes.contrast(luminances), expected, rtol=1e-6)
    assert hashes.contrast(np.full((1, 32, 32), 77, np.uint8))[0] == 0


def test_luminance_is_the_mean_of_each_cell() -> None:
    pixels = np.repeat(np.arange(32, dtype=np.uint8).repeat(4)[:, None, None], 3, axis=2).repeat(64, axis=1)
    np.testing.assert_array_equal(hashes.luminance(pixels), np.arange(32)[:, None].repeat(32, axis=1))


def test_bits_are_the_signs_of_sklearns_components(fitted: hashes.PcaHash) -> None:
    from sklearn.decomposition import IncrementalPCA

    model = IncrementalPCA(n_components=64, batch_size=1024).fit(blobs(300).reshape(300, -1).astype(np.float64))
    others = blobs(100, seed=5)
    projected = model.transform(others.reshape(100, -1).astype(np.float64))
    codes = fitted(others)
    bits = (codes[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    clear = np.abs(projected) > 0.1  # components are stored rounded
    np.testing.assert_array_equal(bits.astype(bool)[clear], (projected > 0)[clear])
    assert clear.mean() > 0.99


def test_bits_do_not_depend_on_the_batch(fitted: hashes.PcaHash) -> None:
    luminances = blobs(70, seed=3)
    alone = np.concatenate([fitted(luminances[i : i + 1]) for i in range(70)])
    np.testing.assert_array_equal(fitted(luminances), alone)


def test_no_images_have_no_hashes_and_no_contrast(fitted: hashes.PcaHash) -> None:
    assert len(fitted(blobs(0).reshape(0, 32, 32))) == len(hashes.contrast(np.empty((0, 32, 32), np.uint8))) == 0


def test_equal_samples_give_equal_files(fitted: hashes.PcaHash) -> None:
    again = hashes.fit(blobs(300))
    assert again is not None and again.to_bytes() == fitted.to_bytes()
    stored = hashes.PcaHash.from_bytes(fitted.to_bytes())
    np.testing.assert_array_equal(stored(blobs(9, 2)), fitted(blobs(9, 2)))


def test_a_copy_is_near_and_another_image_is_far(fitted: hashes.PcaHash) -> None:
    originals = blobs(100, seed=8)
    noisy = np.clip(originals + np.random.default_rng(0).normal(0, 1.5, originals.shape), 0, 255).astype(np.uint8)
    codes = fitted(originals)
    assert np.median(hashes.hamming(codes, fitted(noisy))) <= 2
    assert np.median(hashes.hamming(codes, np.roll(codes, 1))) > 20


def test_too_few_images_fit_no_hash() -> None:
    assert hashes.fit(blobs(hashes.LEAST_IMAGES - 1)) is None
