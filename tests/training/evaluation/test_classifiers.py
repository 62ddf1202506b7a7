"""k-NN, logistic and linear probes, retrieval and intervals agree with scikit-learn, torch's SGD and naive forms."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import normalize

from training.evaluation import intervals, knn, linear, logistic, retrieval


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads cost more than they bring at this size."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    return x[:300], y[:300], x[300:500], y[300:500]


Digits = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def test_neighbours_vote_as_scikit_learn_s_with_dinov2_s_weights(
    digits: Digits, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, labels, test, _ = digits
    monkeypatch.setattr(knn, "TRAIN_AT_ONCE", 70)  # the training set in stretches
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 64)
    found = knn.predict(train, labels, test, (1, 10, 20), 10)
    for k in (1, 10, 20):
        theirs = KNeighborsClassifier(
            k, metric="euclidean", weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute"
        ).fit(normalize(train), labels)
        assert (found[k] == theirs.predict(normalize(test))).mean() > 0.995
    assert (knn.predict(train[:5], labels[:5], test, (200,), 10)[200] < 10).all()  # fewer than k


def test_leaving_one_out_is_as_if_it_were_not_there(digits: Digits, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knn, "TRAIN_AT_ONCE", 37)
    monkeypatch.setattr(knn, "QUERIES_AT_ONCE", 50)
    train, labels, _, _ = digits
    found = knn.predict(train, labels, train, (5,), 10, leave_one_out=True)[5]
    for i in (0, 36, 37, 120, 299):
        others = np.delete(np.arange(300), i)
        assert found[i] == knn.predict(train[others], labels[others], train[i : i + 1], (5,), 10)[5][0]


def test_logistic_regression_is_scikit_learn_s(digits: Digits) -> None:
    train, labels, test, _ = digits
    for strength in (0.01, 10.0):
        ours = logistic.fit(train, labels, 10, strength)
        theirs = LogisticRegression(C=strength, tol=1e-8, max_iter=5000).fit(train.astype(np.float64), labels)
        np.testing.assert_allclose(ours.weight.numpy(), theirs.coef_, atol=2e-3 * np.abs(theirs.coef_).max())
        assert (ours.predict(test) == theirs.predict(test)).mean() > 0.995


def test_the_strength_is_chosen_on_held_out_images(digits: Digits) -> None:
    train, labels, _, _ = digits
    chosen = logistic.choose(train[:220], labels[:220], train[220:], labels[220:], 10, (1e-4, 1.0, 10.0))
    assert chosen in (1.0, 10.0)
    scores = {
        c: LogisticRegression(C=c, max_iter=3000).fit(train[:220], labels[:220]).score(train[220:], labels[220:])
        for c in (1e-4, 1.0, 10.0)
    }
    assert scores[chosen] >= max(scores.values()) - 0.02


def test_heads_side_by_side_are_heads_trained_alone_by_torch(digits: Digits) -> None:
    train, labels, _, _ = digits
    rates, steps = (0.05, 2.0), 40
    both = linear.train_heads(train, labels, 10, seed=1, rates=rates, steps=steps)
    from curation.order import generator

    for i, rate in enumerate(rates):
        random = generator(1, "linear probe")
        layer = torch.nn.Linear(64, 10)
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(random.normal(0, 0.01, (64, 10)).astype(np.float32)).T)
            layer.bias.zero_()
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate / 2, momentum=0.9)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(steps):
            chosen = random.integers(0, len(train), 128)
            loss = torch.nn.functional.cross_entropy(
                layer(torch.from_numpy(train[chosen])), torch.from_numpy(labels[chosen])
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        torch.testing.assert_close(both.weight[i], layer.weight.detach().T, atol=1e-4, rtol=1e-3)


def test_the_linear_probe_reaches_scikit_learn_s_accuracy(digits: Digits) -> None:
    train, labels, test, truth = digits
    heads = linear.train_heads(train, labels, 10, seed=0, rates=(0.5, 2.0), steps=400)
    ours = (heads.predict(test) == truth).mean(1).max()
    theirs = LogisticRegression(max_iter=3000).fit(train, labels).score(test, truth)
    assert ours > theirs - 0.03


def test_average_precision_is_scikit_learn_s() -> None:
    random = np.random.default_rng(0)
    queries, gallery = random.normal(size=(20, 8)).astype(np.float32), random.normal(size=(90, 8)).astype(np.float32)
    asked, known = random.integers(0, 6, 20), random.integers(0, 5, 90)
    found = retrieval.average_precisions(queries, asked, gallery, known)
    similarity = normalize(queries) @ normalize(gallery).T
    for i in range(20):
        if (known == asked[i]).any():
            assert found[i] == pytest.approx(average_precision_score(known == asked[i], similarity[i]), rel=1e-6)
        else:
            assert np.isnan(found[i])
    same = retrieval.average_precisions(gallery, known, gallery, known, same=True)
    others = normalize(gallery) @ normalize(gallery).T
    expected = average_precision_score(np.delete(known == known[3], 3), np.delete(others[3], 3))
    assert same[3] == pytest.approx(expected, rel=1e-6)


def test_the_trapezoid_is_that_of_the_oxford_benchmark() -> None:
    def compute_ap(ranks: np.ndarray) -> float:  # revisitop, evaluate.py, transcribed
        total, recall_step = 0.0, 1.0 / len(ranks)
        for j, rank in enumerate(ranks):
            precision_0 = 1.0 if rank == 0 else float(j) / rank
            total += (precision_0 + float(j + 1) / (rank + 1)) * recall_step / 2.0
        return total

    random = np.random.default_rng(1)
    for count in (1, 3, 10):
        ranks = np.sort(random.choice(50, count, replace=False))
        assert retrieval.average_precision(ranks, "trapezoid") == pytest.approx(compute_ap(ranks))


def test_intervals_cover_what_they_say() -> None:
    wilson = stats.binomtest(37, 50).proportion_ci(method="wilson")
    got = intervals.share(37, 50)
    assert (got["low"], got["high"]) == pytest.approx((wilson.low, wilson.high))
    random = np.random.default_rng(0)
    inside = 0
    for seed in range(12):
        interval = intervals.mean(random.normal(0, 1, 40), seed)
        inside += interval["low"] <= 0 <= interval["high"]
    assert inside >= 9
