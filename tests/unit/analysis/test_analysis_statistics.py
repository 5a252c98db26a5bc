"""pass@k, intervals and the paired test: by hand, by exhaustion, by simulation."""

from collections import Counter
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

from megatron_zero.analysis import statistics
from megatron_zero.analysis.statistics import (
    majority_at_k,
    mean_intervals,
    pass_at_k,
    sign_flip_p_value,
)


@pytest.fixture
def fewer_resamples(monkeypatch):
    """For simulations: the spread of the ends that this costs is far below what is asked for."""
    monkeypatch.setattr(statistics, "NUM_RESAMPLES", 400)


def test_pass_at_k_by_hand():
    # 8 samples, 2 correct, pairs: 28, of which C(6, 2) = 15 have none
    assert pass_at_k(8, 2, 2) == pytest.approx(13 / 28, abs=1e-15)
    assert [pass_at_k(8, 2, k) for k in (1, 8)] == [0.25, 1.0]
    assert pass_at_k(8, 0, 8) == 0.0 and pass_at_k(8, 8, 1) == 1.0
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5, abs=1e-15)  # no rounding of large numbers
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k={k}: must be from 1 to the number of samples, 8"):
            pass_at_k(8, 2, k)


@pytest.mark.parametrize("num_correct", range(6))
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_one(num_correct):
    samples = [i < num_correct for i in range(5)]
    for k in range(1, 6):
        chosen = [any(subset) for subset in combinations(samples, k)]
        assert pass_at_k(5, num_correct, k) == pytest.approx(np.mean(chosen), abs=1e-12)


def test_pass_at_k_is_unbiased():
    """Its expectation over draws of n samples is 1 - (1 - p)^k, exactly; 1 - (1 - c/n)^k is not."""
    n, p, k = 6, 0.3, 3
    chance = {c: sum(p**c * (1 - p) ** (n - c) for d in product((0, 1), repeat=n) if sum(d) == c)
              for c in range(n + 1)}  # fmt: skip
    expected = sum(chance[c] * pass_at_k(n, c, k) for c in chance)
    naive = sum(chance[c] * (1 - (1 - c / n) ** k) for c in chance)
    assert expected == pytest.approx(1 - (1 - p) ** k, abs=1e-12)
    assert abs(naive - (1 - (1 - p) ** k)) > 0.05


def majority_by_exhaustion(samples: "list[tuple[int | None, bool]]", k: int) -> float:
    """The mean over every k samples, of (class, correct), and over what may be taken of a tie."""
    shares = []
    for chosen in combinations(samples, k):
        votes = Counter(answer for answer, _ in chosen if answer is not None)
        tied = [answer for answer in votes if votes[answer] == max(votes.values())]
        share = Fraction(0)
        for answer in tied:
            correct = [is_correct for other, is_correct in chosen if other == answer]
            share += Fraction(sum(correct), len(correct) * len(tied))
        shares.append(share)
    return float(sum(shares) / len(shares))


def test_majority_at_k_by_hand():
    # three samples say 5, which is right, two say 7: two votes win any three samples
    assert majority_at_k([(3, 3), (2, 0)], 0, 3) == 0.7  # C(3,3) + C(3,2) C(2,1) = 7 of 10
    assert majority_at_k([(2, 2), (2, 0)], 0, 4) == 0.5  # a tie
    assert majority_at_k([(1, 1)], 7, 8) == 1.0  # who says nothing does not vote
    assert majority_at_k([], 3, 2) == 0.0
    assert majority_at_k([(100, 0), (99, 99)], 1, 200) == 0.0
    assert majority_at_k([(1, 1), *[(1, 0)] * 99], 100, 100) == pytest.approx(0.01, abs=1e-12)
    for k in (0, 6):
        with pytest.raises(ValueError, match=f"k={k}: must be from 1 to the number of samples, 5"):
            majority_at_k([(3, 3), (1, 0)], 1, k)


@pytest.mark.parametrize("seed", range(12))
def test_majority_at_k_is_the_mean_over_all_choices_of_samples(seed):
    rng = np.random.default_rng(seed)
    num_classes, num_samples = int(rng.integers(1, 5)), int(rng.integers(1, 9))
    verdicts = rng.integers(2, size=(num_classes, 2))  # two readings of an answer, seldom apart
    samples: list[tuple[int | None, bool]] = []
    for answer, reading in rng.integers([-1, 0], [num_classes, 2], size=(num_samples, 2)).tolist():
        known = answer >= 0
        samples.append((answer if known else None, bool(known and verdicts[answer, reading])))
    answers = {answer for answer, _ in samples if answer is not None}
    classes = []
    for answer in answers:
        correct = [is_correct for other, is_correct in samples if other == answer]
        classes.append((len(correct), sum(correct)))
    num_silent = sum(answer is None for answer, _ in samples)
    for k in range(1, num_samples + 1):
        expected = majority_by_exhaustion(samples, k)
        assert majority_at_k(classes, num_silent, k) == pytest.approx(expected, abs=1e-12)


def test_majority_of_one_is_the_accuracy_and_some_answer_always_wins():
    sizes, num_silent = [5, 3, 3, 1], 2
    one = [(5, 5), (3, 0), (3, 3), (1, 0)]
    assert majority_at_k(one, num_silent, 1) == pytest.approx(8 / 14, abs=1e-15)
    for k in range(3, 15):
        chances = []
        for winner in range(4):
            classes = [(size, size * (i == winner)) for i, size in enumerate(sizes)]
            chances.append(majority_at_k(classes, num_silent, k))
        assert sum(chances) == pytest.approx(1, abs=1e-12)


def test_majority_at_k_is_unbiased():
    """Its expectation over draws of n samples is what k samples give, exactly."""
    chances = [0.4, 0.35, 0.25]  # of a right answer, a wrong one, and none

    def expectation(n, k):
        total = 0.0
        for drawn in product(range(3), repeat=n):
            right, wrong, none = (drawn.count(kind) for kind in range(3))
            classes = [(right, right)] * (right > 0) + [(wrong, 0)] * (wrong > 0)
            total += np.prod([chances[kind] for kind in drawn]) * majority_at_k(classes, none, k)
        return total

    for k in (2, 3):
        assert expectation(5, k) == pytest.approx(expectation(k, k), abs=1e-12)


def test_an_interval_by_hand():
    """Two problems, 0 and 1: means of two draws are 0, 1/2, 1 with chances 1/4, 1/2, 1/4."""
    ((value, low, high),) = mean_intervals([np.array([[0.0], [1.0]])], seed=0)
    assert (value, low, high) == (0.5, 0.0, 1.0)
    many = np.array([[0.0], [1.0]] * 200)
    ((value, low, high),) = mean_intervals([many], seed=0)
    assert value == 0.5 and high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.06)


def test_intervals_depend_on_the_seed_alone():
    values = np.random.default_rng(1).random((50, 2))
    first, again, other = (mean_intervals([values], seed) for seed in (3, 3, 4))
    assert (first == again).all() and (first != other).any()


def test_the_interval_of_problems_that_are_all_alike():
    for constant, expected in ((0.0, [0, 0, 0.11570]), (1.0, [1, 0.88430, 1])):
        values = np.full((30, 2), constant)
        rate, length = mean_intervals([values], seed=0, rates=[0])
        assert rate == pytest.approx(expected, abs=0.01)  # Clopper-Pearson: 0 and 30 of 30
        assert list(length) == [constant] * 3
    value, low, high = mean_intervals([np.zeros((30, 1))] * 4, 0, [0])[0]
    assert value == low == 0 and 0.05 < high < 0.09  # four times 30 problems are no 120


def test_an_average_weighs_benchmarks_not_problems():
    few, many = np.array([[1.0]] * 10), np.array([[0.0]] * 990)
    value, low, high = mean_intervals([few, many], seed=0)[0]
    assert (value, low, high) == (0.5, 0.5, 0.5)
    noisy = np.array([[0.0], [1.0]] * 5)
    value, low, high = mean_intervals([noisy, many], seed=0)[0]
    ((_, alone_low, alone_high),) = mean_intervals([noisy], seed=0)
    assert value == 0.25 and high - low == pytest.approx((alone_high - alone_low) / 2, abs=0.06)


@pytest.mark.parametrize(("num_problems", "least"), [(30, 0.90), (200, 0.93)])
def test_intervals_cover_the_truth(num_problems, least, fewer_resamples):
    """Problems of very different difficulty, 8 samples each: avg@8, 250 repetitions."""
    rng = np.random.default_rng(0)
    covered = 0
    for repetition in range(250):
        chances = rng.beta(0.4, 0.8, num_problems)  # of mean 1/3
        values = rng.binomial(8, chances)[:, None] / 8
        _, low, high = mean_intervals([values], repetition)[0]
        covered += low <= 1 / 3 <= high
    assert least <= covered / 250 <= 0.98


def test_counting_samples_one_by_one_would_not_cover(fewer_resamples):
    """Why problems are drawn whole: 8 alike samples of each would make the interval too narrow."""
    rng = np.random.default_rng(0)
    covered = 0
    for repetition in range(200):
        values = np.repeat(rng.integers(0, 2, 30), 8)[:, None].astype(float)
        _, low, high = mean_intervals([values], repetition)[0]
        covered += low <= 0.5 <= high
    assert covered / 200 < 0.7


def test_p_values_by_hand():
    """Four equal differences: of 16 signs two give as much; with one the other way, ten do."""
    assert sign_flip_p_value([np.ones(4)], seed=0) == pytest.approx(2 / 16, abs=0.01)
    assert sign_flip_p_value([np.array([1, 1, 1, -1])], seed=0) == pytest.approx(10 / 16, abs=0.02)
    assert sign_flip_p_value([np.zeros(4)], seed=0) == 1.0
    assert sign_flip_p_value([np.ones(100)], seed=0) == pytest.approx(1e-4, rel=1e-3)


def test_p_values_weigh_benchmarks_not_problems():
    one, thousand = np.array([1.0]), np.tile([1.0, -1.0], 500)
    # by its weight the one problem decides: half of the signs of the others add to it
    assert sign_flip_p_value([one, thousand], seed=0) == pytest.approx(0.5, abs=0.03)
    assert sign_flip_p_value([np.concatenate([one, thousand])], seed=0) > 0.9


def test_p_values_of_equal_models_are_uniform_and_of_unequal_ones_small(fewer_resamples):
    rng = np.random.default_rng(0)
    equal, better = [], []
    for repetition in range(200):
        chances = rng.beta(0.4, 0.8, 60)
        a, b, c = (rng.binomial(8, p) / 8 for p in (chances, chances, np.sqrt(chances)))
        equal.append(sign_flip_p_value([b - a], repetition))
        better.append(sign_flip_p_value([c - a], repetition))
    assert 0.01 <= np.mean(np.array(equal) < 0.05) <= 0.10
    assert 0.35 <= np.mean(np.array(equal) < 0.5) <= 0.65
    assert np.mean(np.array(better) < 0.05) > 0.95
