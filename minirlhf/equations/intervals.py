"""How sure a measured number is: confidence intervals of shares, correlations of two series.

Everything here is plain arithmetic on Python numbers, and the same input gives the same bits.
"""

from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

Z95 = NormalDist().inv_cdf(0.975)  # 1.96: a standard normal lies within it 95% of the time


class Interval(NamedTuple):
    low: float
    high: float


class WinRate(NamedTuple):
    rate: float  # share of pairs won, a tie counting half
    low: float  # of its confidence interval
    high: float


# -------------------------------------------------------------------------------------- intervals


def wilson_interval(right: int, count: int, z: float = Z95) -> Interval:
    """Confidence interval of a share p = right / count. Wilson 1927, "Probable inference, the law
    of succession, and statistical inference", JASA 22, p. 209.

        (p + z²/2n ± z sqrt(p (1 - p)/n + z²/4n²)) / (1 + z²/n),   n = count

    It never leaves [0, 1], and has some width where all or none are right. Newcombe 1998,
    Statistics in Medicine 17, p. 857, compares it with six others.

    Args:
        right: 0 to count.
        count: at least 1.
        z: normal quantile of the confidence, two-sided.

    >>> wilson_interval(2, 4, z=2.0)                                    # (1/2 + 1/2 ± 1/2 √2) / 2
    Interval(low=0.1464466094067262, high=0.8535533905932737)
    """
    low, high = _score_interval(right / count, 0.0, count, z)
    return Interval(max(low, 0.0), min(high, 1.0))


def win_rate(scores: Sequence[float], baseline: Sequence[float], z: float = Z95) -> WinRate:
    """How often one score beats its partner, and between what bounds the true rate lies.

    A pair counts x = 1 if won, 1/2 if tied, 0 if lost. With w the mean of N of them and t the share
    of ties, the interval holds the rates p that a score test does not reject; without ties that is
    Wilson's:

        (w - p)² <= z² (p (1 - p) - t / 4) / N,   since E[x²] = p - t / 4

    It holds w, lies in [0, 1], and leaves 1/2 out exactly where the sign test rejects it, which
    looks at the pairs without ties alone. Where all pairs tie it is the point 1/2: nothing differs.

    Args:
        scores, baseline: N >= 1 each, partners at the same place.
        z: as in `wilson_interval`.
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
    return WinRate(rate, *_score_interval(rate, ties, N, z))


def _score_interval(rate: float, ties: float, count: int, z: float) -> Interval:
    """The roots of (1 + a) p² - (2 w + a) p + w² + a t / 4, with a = z² / count."""
    a = z**2 / count
    root = (a * (4 * rate * (1 - rate) - ties) + a**2 * (1 - ties)) ** 0.5
    low, high = ((2 * rate + a + side) / (2 * (1 + a)) for side in (-root, root))
    return Interval(low, high)


# ----------------------------------------------------------------------------------- correlations


def pearson(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of two series of N numbers, in [-1, 1]. Pearson 1895, "Note on regression and
    inheritance in the case of two parents".

        sum (x - mean x)(y - mean y) / sqrt(sum (x - mean x)² sum (y - mean y)²)

    Returns:
        None where a series is constant.

    >>> pearson([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    1.0
    """
    if len(set(x)) < 2 or len(set(y)) < 2:  # not by the sum of squares, which rounding leaves
        return None
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    dx, dy = [value - mean_x for value in x], [value - mean_y for value in y]
    scale = (sum(a * a for a in dx) * sum(b * b for b in dy)) ** 0.5
    return sum(a * b for a, b in zip(dx, dy, strict=True)) / scale if scale > 0 else None


def spearman(x: Sequence[float], y: Sequence[float]) -> float | None:
    """Correlation of the ranks of two series. Spearman 1904, "The proof and measurement of
    association between two things"; ties share the mean of their ranks.

    >>> spearman([1, 2, 3], [0.1, 90.0, 2.0])                                   # ranks 1 3 2
    0.5
    """
    return pearson(average_ranks(x), average_ranks(y))


def average_ranks(x: Sequence[float]) -> list[float]:
    """Ranks from 1 for the smallest; equal numbers share the mean of their ranks.

    >>> average_ranks([30, 10, 20, 10])
    [4.0, 1.5, 3.0, 1.5]
    """
    ranks: dict[float, list[int]] = {}
    for rank, value in enumerate(sorted(x), start=1):
        ranks.setdefault(value, []).append(rank)
    return [sum(ranks[value]) / len(ranks[value]) for value in x]
