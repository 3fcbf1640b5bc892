"""Scores before they are rewards: rules for truncated responses, the running scale, the bound."""

import pytest
from torch import tensor

from minirlhf.equations.scores import (
    RunningMoments,
    end_rule,
    ramp_overlong,
    replace_missing_eos,
    scale_scores,
    subtract_missing_eos,
)

TRUNCATED, LENGTHS = tensor([True, False, False]), tensor([10, 9, 3])
SCORES = tensor([2.0, 2.0, -1.0])


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("subtract", [1.5, 2.0, -1.0]),
        ("replace", [-0.5, 2.0, -1.0]),
        # over the last 4 of 10 tokens: 4/4, 3/4 and none of 0.5
        ("ramp", [1.5, 1.625, -1.0]),
    ],
)
def test_rules_for_truncated_responses_by_hand(how, expected):
    rule = end_rule(how, 0.5, 10, 4)
    assert rule(SCORES, TRUNCATED, LENGTHS).tolist() == expected
    function = {"subtract": subtract_missing_eos, "replace": replace_missing_eos,
                "ramp": ramp_overlong}[how]
    more = {"longest": 10, "buffer": 4} if how == "ramp" else {}
    assert function(SCORES, TRUNCATED, LENGTHS, penalty=0.5, **more).tolist() == expected
    assert SCORES.tolist() == [2.0, 2.0, -1.0]


def test_running_moments_by_hand():
    moments = RunningMoments()
    assert moments.std == 1.0  # nothing to measure yet
    moments.update(tensor([4.0]))
    assert (moments.mean, moments.std) == (4.0, 1.0)  # one score has no spread
    moments.update(tensor([4.0]))
    assert moments.std == 1.0  # nor have two that agree
    moments = RunningMoments()
    moments.update(tensor([1.0, 3.0, 5.0, 7.0]))
    assert moments.as_list() == [4, 4.0, 20.0]  # 9 + 1 + 1 + 9
    moments.update(tensor([2.0, 2.0, 2.0, 2.0]))
    # of all eight: mean 3; 4 + 0 + 4 + 16 and four times 1
    assert moments.as_list() == [8, 3.0, 28.0] and moments.std == 2.0
    assert RunningMoments(*moments.as_list()) == moments


@pytest.mark.parametrize(
    ("how", "clip", "expected"),
    [
        ("none", None, [2.0, 6.0]),
        ("scale", None, [1.0, 3.0]),
        ("normalize", None, [-0.5, 1.5]),
        ("none", 2.5, [2.0, 2.5]),
        ("normalize", 0.4, [-0.4, 0.4]),
    ],
)
def test_scale_scores_by_hand(how, clip, expected):
    moments = RunningMoments(8, 3.0, 28.0)  # mean 3, std 2
    scores = tensor([2.0, 6.0])
    assert scale_scores(scores, how, clip, moments).tolist() == pytest.approx(expected, abs=1e-6)
    assert scores.tolist() == [2.0, 6.0]
