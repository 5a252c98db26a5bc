"""Estimates over a benchmark's problems and how sure they are: pass@k, maj@k, intervals, a test.

The unit is the problem. Samples of one problem are alike, so an interval that counted them one by
one would be too narrow; here problems are drawn anew, whole. Everything random takes a seed.
"""

import math
from collections import Counter
from collections.abc import Collection, Sequence
from fractions import Fraction
from functools import lru_cache

import numpy as np

NUM_RESAMPLES = 5_000
LEVEL = 0.95  # of every interval


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Chance that k of the samples, drawn without replacement, hold a correct one.

    Unbiased for the model's own chance with k samples (Chen et al. 2021, arXiv 2107.03374, eq. 1),
    and computed from whole numbers: 1 - C(n - c, k) / C(n, k).

    Example:
        pass_at_k(4, 1, 2) == 0.5  # 3 of the 6 pairs hold the correct one

    Raises:
        ValueError: more than there are samples.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k}: must be from 1 to the number of samples, {num_samples}")
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def majority_at_k(classes: Sequence[tuple[int, int]], num_silent: int, k: int) -> float:
    """Chance that the answer which most of k samples give is correct.

    The k samples are drawn from all without replacement, so this is the mean over every choice of
    k of them: unbiased for the model's own chance with k samples, as `pass_at_k` is, and exact.
    Where several answers have most votes each of them is as likely to be taken, which is also what
    taking the one that was given first comes to. Samples without an answer do not vote; k samples
    without any are wrong.

    Args:
        classes: of each class of equal answers (`rewards.votes`), how many samples gave it, and
            how many of those are correct: all or none, but for answers that can be read in two
            ways, where the class's answer is that of any of its samples.
        num_silent: samples without an answer.

    Example:
        majority_at_k([(2, 2), (1, 0)], 0, 2) == 2 / 3
            # of 3 pairs one agrees, on the correct answer; two are ties: (1 + 1/2 + 1/2) / 3

    Raises:
        ValueError: more than there are samples.
    """
    num_samples = num_silent + sum(size for size, _ in classes)
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k}: must be from 1 to the number of samples, {num_samples}")
    sizes = sorted(size for size, _ in classes)
    chance = Fraction(0)
    for size, num_correct in classes:
        if num_correct:
            others = sizes.copy()
            others.remove(size)
            chance += _wins(size, tuple(others), num_silent, k) * Fraction(num_correct, size)
    return float(chance)


@lru_cache(maxsize=4096)
def _wins(size: int, others: tuple[int, ...], num_silent: int, k: int) -> Fraction:
    """Chance that a class of `size` wins the vote of k samples, a tie among t won by 1 / t.

    For each number of votes that it may get, the choices of the other samples are counted: class by
    class where one could have as many votes, all at once where none could.
    """
    won = Fraction(0)
    for votes in range(1, min(size, k) + 1):
        rivals = [other for other in others if other >= votes]
        num_harmless = num_silent + sum(others) - sum(rivals)
        choices = {(0, 1): math.comb(size, votes)}  # (chosen of rivals, tied) -> how many ways
        for other in rivals:
            longer: Counter[tuple[int, int]] = Counter()
            for (chosen, tied), ways in choices.items():
                for more in range(min(other, votes, k - votes - chosen) + 1):
                    state = (chosen + more, tied + 1 if more == votes else tied)
                    longer[state] += ways * math.comb(other, more)
            choices = longer
        for (chosen, tied), ways in choices.items():
            won += Fraction(ways * math.comb(num_harmless, k - votes - chosen), tied)
    num_samples = size + sum(others) + num_silent
    return won / math.comb(num_samples, k)


def mean_intervals(
    parts: Sequence[np.ndarray], seed: int, rates: Collection[int] = ()
) -> np.ndarray:
    """Mean over benchmarks of the mean over problems, and the ends of its interval.

    Percentile bootstrap: the problems of each benchmark are drawn anew with replacement. Where all
    of them are 0, or all 1, that knows no spread; a rate is then drawn from Beta(1, P) or
    Beta(P, 1), whose ends are the bounds of Clopper and Pearson: 0 of 30 is [0, 0.116].

    Args:
        parts: of each benchmark, [P, M] numbers per problem, a column per quantity.
        rates: which columns are between 0 and 1.

    Returns:
        [M, 3] value, low, high.
    """
    rng, drawn = np.random.default_rng(seed), []
    for part in parts:
        n = len(part)
        means = rng.multinomial(n, np.full(n, 1 / n), NUM_RESAMPLES) @ part / n
        for column in rates:
            if (ones := part[:, column].sum()) in (0, n):
                means[:, column] = rng.beta(max(ones, 1), max(n - ones, 1), NUM_RESAMPLES)
        drawn.append(means)
    value = np.mean([part.mean(axis=0) for part in parts], axis=0)
    low, high = np.quantile(np.mean(drawn, axis=0), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return np.stack([value, np.minimum(low, value), np.maximum(high, value)], axis=1)


def sign_flip_p_value(parts: Sequence[np.ndarray], seed: int) -> float:
    """Two-sided p-value of "it does not matter which of two models is which", paired by problem.

    The statistic is the mean over benchmarks of the mean difference over problems. Under the
    hypothesis each problem's difference is as likely with the other sign: random signs say how far
    from 0 it gets. The observed signs count as one of the draws, so the p-value is never 0.

    Args:
        parts: of each benchmark, [P] differences of one quantity.
    """
    weighted = np.concatenate([part / (len(part) * len(parts)) for part in parts])
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], (2 * NUM_RESAMPLES, len(weighted)))
    as_far = np.abs(signs @ weighted) >= abs(weighted.sum()) - 1e-12
    return float((1 + as_far.sum()) / (1 + len(as_far)))
