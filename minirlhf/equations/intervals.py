"""equations.intervals."""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

Z95 = 1.959963984540054  # the normal law's 97.5% quantile


class Interval(NamedTuple):
    low: float
    high: float


# ---------------------------------------------------------------------------------------- numbers


def wilson_interval(right: int, count: int, z: float = Z95) -> Interval:
    """95% confidence interval of a fraction. Wilson 1927, "Probable inference, the law of
    succession, and statistical inference".

        (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n),   p = right / n, n = count

    Never outside [0, 1], and of some width where all or none are right.

    >>> wilson_interval(2, 4, z=2.0)                                    # (1/2 + 1/2 ± 1/2 √2) / 2
    Interval(low=0.1464466094067262, high=0.8535533905932737)
    """
    p, square = right / count, z * z / count
    middle = (p + square / 2) / (1 + square)
    half = z * math.sqrt(p * (1 - p) / count + square / (4 * count)) / (1 + square)
    return Interval(max(middle - half, 0.0), min(middle + half, 1.0))


def pearson(x: Tensor, y: Tensor) -> float | None:
    """Correlation of two (N,) in [-1, 1]; None where one of them is constant.

    sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)² sum (y - mean y)²)
    """
    x, y = (values.double() - values.double().mean() for values in (x, y))
    scale = float((x.square().sum() * y.square().sum()).sqrt())
    return float((x * y).sum()) / scale if scale > 0 else None


def average_ranks(x: Tensor) -> Tensor:
    """(N,) -> (N,) float64, 1 for the smallest; equal numbers share the mean of their ranks."""
    _, group, sizes = torch.unique(x, return_inverse=True, return_counts=True)
    last = sizes.cumsum(0)
    return (last - (sizes - 1) / 2).double()[group]


def spearman(x: Tensor, y: Tensor) -> float | None:
    """Correlation of the ranks of two (N,). Spearman 1904; ties share the mean of their ranks."""
    return pearson(average_ranks(x), average_ranks(y))


class WinRate(NamedTuple):
    rate: float  # share of pairs won, a tie counting half
    low: float  # of its confidence interval
    high: float


def win_rate(scores: list[float], baseline: list[float], confidence: float = 0.95) -> WinRate:
    """How often one score beats its partner, and between what the true rate lies.

    A pair counts x = 1 if won, 1/2 if tied, 0 if lost. With w the mean of N of them, t the share of
    ties and z the normal quantile, the interval holds the rates p that a score test does not reject
    (Wilson 1927, JASA 22, p. 209, where t = 0):

        (w - p)² <= z² (p (1 - p) - t / 4) / N,   since E[x²] = p - t / 4

    It holds w, lies in [0, 1], and leaves 1/2 out exactly where the sign test rejects it, which
    looks at the pairs without ties alone. Where all pairs tie it is the point 1/2: nothing differs.

    Args:
        scores, baseline: N >= 1 each, partners at the same place.
        confidence: above 0 and below 1.
    Raises:
        ValueError: the lengths differ, or are 0.

    >>> [round(p, 4) for p in win_rate([1.0] * 8 + [0.0] * 2, [0.5] * 10)]  # Wilson's, 8 of 10
    [0.8, 0.4902, 0.9433]
    """
    if not scores or len(scores) != len(baseline):
        raise ValueError(f"{len(scores)} scores, {len(baseline)} of the baseline: give pairs")
    N, pairs = len(scores), list(zip(scores, baseline, strict=True))
    ties = sum(a == b for a, b in pairs) / N
    rate = sum(a > b for a, b in pairs) / N + ties / 2
    a = NormalDist().inv_cdf((1 + confidence) / 2) ** 2 / N  # z² / N
    # The roots of (1 + a) p² - (2 w + a) p + w² + a t / 4.
    root = (a * (4 * rate * (1 - rate) - ties) + a**2 * (1 - ties)) ** 0.5
    low, high = ((2 * rate + a + side) / (2 * (1 + a)) for side in (-root, root))
    return WinRate(rate, low, high)


def distinct(texts: list[str], n: int) -> float:
    """Different n-grams of words over all n-grams of all texts; Li et al. 2016 (arXiv:1510.03055),
    section 5.2, divide by all words. 0 where no text has n words.

    >>> distinct(["a b a", "a b"], 2)  # a b twice, b a once
    0.6666666666666666
    """
    grams = [tuple(w[i : i + n]) for w in map(str.split, texts) for i in range(len(w) - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def duplicates(texts: list[str]) -> float:
    """Share of the texts that say exactly what one before them said."""
    return 1 - len(set(texts)) / len(texts)
