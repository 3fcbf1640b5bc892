"""Intervals and correlations by hand, by what defines them, and by how often they are right."""

import math

import pytest

from minirlhf.equations.intervals import (
    Z95,
    average_ranks,
    pearson,
    spearman,
    wilson_interval,
    win_rate,
)


def close(expected):
    return pytest.approx(expected, rel=0, abs=1e-9)


def test_wilson_interval_by_hand():
    # n = 4, p = 1/2, z = 2: (1/2 + 1/2 ± 2 sqrt(1/16 + 4/64)) / 2 = 1/2 ± sqrt(1/8)
    assert wilson_interval(2, 4, 2.0) == close((0.5 - 8**-0.5, 0.5 + 8**-0.5))
    # all of n = 4 right: (1 + 1/2 ± 2 sqrt(1/16)) / 2: from 1/2 to 1
    assert wilson_interval(4, 4, 2.0) == close((0.5, 1.0))
    assert wilson_interval(0, 4, 2.0) == close((0.0, 0.5))


def test_wilson_interval_is_the_95_percent_one():
    # 81 of 263 (Newcombe 1998, "Two-sided confidence intervals", table I): 0.2553 to 0.3662
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), rel=0, abs=5e-5)


def test_wilson_interval_never_leaves_0_to_1():
    for count in range(1, 200):
        low, high = wilson_interval(0, count).low, wilson_interval(count, count).high
        assert 0 <= low < 1e-12 and 1 - 1e-12 < high <= 1


def pairs(won: int, tied: int, lost: int) -> tuple[list[float], list[float]]:
    return [2.0] * won + [1.0] * tied + [0.0] * lost, [1.0] * (won + tied + lost)


@pytest.mark.parametrize(
    ("counts", "expected"),
    [
        # without ties Wilson's: (8 + z²/2 -+ z sqrt(8 · 2 / 10 + z²/4)) / (10 + z²)
        ((8, 0, 2), (0.8, 0.4901625, 0.9433178)),
        ((0, 0, 4), (0.0, 0.0, 0.4898908)),  # z² / (4 + z²)
        ((1, 0, 0), (1.0, 0.2065493, 1.0)),  # 1 / (1 + z²)
        # w = 0.55, t = 0.9, a = z²/100 = 0.0384146: root² = a (4 · 0.55 · 0.45 - 0.9) + a² · 0.1
        # = 0.0036049, root 0.0600407; (1.1 + a -+ root) / (2 + 2 a)
        ((10, 90, 0), (0.55, 0.5192406, 0.5770601)),
        ((0, 90, 10), (0.45, 0.4229399, 0.4807594)),
        ((0, 7, 0), (0.5, 0.5, 0.5)),
    ],
)
def test_win_rate_by_hand(counts, expected):
    assert win_rate(*pairs(*counts)) == pytest.approx(expected, abs=1e-7)


COUNTS = [(w, t, n) for w in range(9) for t in range(9) for n in range(9) if w + t + n]


@pytest.mark.parametrize("z", [0.7, Z95])
def test_win_rate_holds_its_rate_and_its_ends_are_where_the_score_test_turns(z):
    for won, tied, lost in COUNTS:
        N, ties = won + tied + lost, tied / (won + tied + lost)
        rate, low, high = win_rate(*pairs(won, tied, lost), z)
        assert rate == pytest.approx((won + tied / 2) / N, abs=1e-12)
        assert -1e-9 <= low <= rate + 1e-9 and rate - 1e-9 <= high <= 1 + 1e-9
        for end in (low, high):
            assert (rate - end) ** 2 == pytest.approx(
                z**2 * (end * (1 - end) - ties / 4) / N, abs=1e-9
            )


def test_win_rate_leaves_a_half_out_where_the_sign_test_rejects_it():
    for won, tied, lost in COUNTS:
        if won == lost:
            continue
        _, low, high = win_rate(*pairs(won, tied, lost))
        rejected = (won - lost) ** 2 > Z95**2 * (won + lost)
        assert rejected is not (low <= 0.5 <= high), (won, tied, lost)


@pytest.mark.parametrize(("p", "q"), [(0.5, 0.4), (0.25, 0.5), (0.7, 0.0), (0.45, 0.1)])
def test_win_rate_covers_the_truth_as_often_as_it_says(p, q):
    """Exact: every outcome of 40 pairs, won with p and tied with q, by its probability."""
    N, covered = 40, 0.0
    truth = p + q / 2
    for won in range(N + 1):
        for tied in range(N + 1 - won):
            lost = N - won - tied
            ways = math.comb(N, won) * math.comb(N - won, tied)
            mass = ways * p**won * q**tied * (1 - p - q) ** lost
            _, low, high = win_rate(*pairs(won, tied, lost))
            covered += mass * (low <= truth <= high)
    assert 0.93 < covered < 0.97


@pytest.mark.parametrize(
    ("scores", "baseline", "message"),
    [([], [], "0 scores, 0 of"), ([1.0], [1.0, 2.0], "1 scores, 2 of the baseline: give pairs")],
)
def test_win_rate_refuses_what_are_no_pairs(scores, baseline, message):
    with pytest.raises(ValueError, match=message):
        win_rate(scores, baseline)


@pytest.mark.parametrize(
    ("x", "y", "r"),
    [
        ([1, 2, 3], [1.0, 3.0, 2.0], 0.5),  # deviations (-1, 0, 1), (-1, 1, 0): 1 / sqrt(2 · 2)
        ([1, 2, 3], [3, 2, 1], -1),
        ([0, 0, 1, 1], [0, 1, 0, 1], 0),
        ([0.1, 0.1, 0.1], [1, 2, 3], None),  # the mean of equal numbers is rounded
        ([1, 2, 3], [0.7, 0.7, 0.7], None),
        ([1, 2, 3], [0.0, 1e-200, 0.0], None),  # whose squares are 0
        ([4], [5], None),
    ],
)
def test_pearson_by_hand(x, y, r):
    assert pearson(x, y) == (None if r is None else close(r))


@pytest.mark.parametrize(
    ("x", "ranks"),
    [([30, 10, 20, 10, 30, 30], [5, 1.5, 3, 1.5, 5, 5]), ([2.5], [1]), ([1, 1], [1.5, 1.5])],
)
def test_average_ranks_by_hand(x, ranks):
    assert average_ranks(x) == ranks


@pytest.mark.parametrize(
    ("x", "y", "r"),
    [
        ([1, 2, 3], [0.1, 900.0, 2.0], 0.5),  # ranks 1 2 3 and 1 3 2, however far apart
        # a tie: ranks 1.5 1.5 3 and 1 2 3: (-.5 -.5 1) · (-1 0 1) = 1.5 over sqrt(1.5 · 2)
        ([4, 4, 9], [1, 2, 3], 1.5 / 3**0.5),
        ([1.0, 1.0], [1, 2], None),
    ],
)
def test_spearman_by_hand(x, y, r):
    assert spearman(x, y) == (None if r is None else close(r))
