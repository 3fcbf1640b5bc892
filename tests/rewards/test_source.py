"""What reward sources are, and weighted sums of several."""

import math

import pytest
import torch
from torch import nan, tensor

from minirlhf.errors import NON_FINITE, NonFinite, UserError
from minirlhf.rewards.function import function_reward
from minirlhf.rewards.source import Scores, as_scores, combine
from tests.rewards.test_function import BATCH, assert_same


def test_metrics_are_over_the_rows_that_apply():
    # 1 and 4: mean 2.5, population std 1.5; a part without a row says nothing
    parts = {"a": tensor([1.0, nan, 4.0]), "b": tensor([nan, nan, nan])}
    found = Scores(torch.zeros(3), parts).metrics()
    assert found == {"rewards/a/mean": 2.5, "rewards/a/std": 1.5}


def gives(items: list, name: str = "f"):
    return function_reward(lambda completions: items, name)


def test_combine_is_the_weighted_sum():
    # 0.5 x 2 - 3 x 1 = -2; 0.5 x 4 = 2, as b does not apply; -3 x 2 = -6, as a does not
    source = combine([("a", 0.5, gives([2, 4, None])), ("b", -3.0, gives([1, None, 2]))])
    scores = source(BATCH)
    assert scores.total.tolist() == [-2.0, 2.0, -6.0]
    assert list(scores.parts) == ["a", "b"]
    assert_same(scores.parts["a"], [2, 4, nan])
    assert_same(scores.parts["b"], [1, nan, 2])
    assert scores.token_rewards is None


def test_combine_weighs_tokens_rewards_and_adds_them():
    # token 1 of row 0: 0.5 x 2 + 2 x 10 = 21; of row 1: 2 x 1 each; row 2 is scored as a whole
    source = combine([
        ("a", 0.5, gives([[4, 2], 6, 8])), ("b", 2.0, gives([[0, 10], [1, 1], None])),
    ])
    scores = source(BATCH)
    assert scores.token_rewards == [[2.0, 21.0], [2.0, 2.0], [0.0]]
    assert scores.total.tolist() == [0.0, 3.0, 4.0]
    assert scores.sums.tolist() == [23.0, 7.0, 4.0]
    assert_same(scores.parts["a"], [6, 6, 8])
    assert_same(scores.parts["b"], [10, 2, nan])


def test_combine_takes_sources_that_return_a_tensor():
    found = combine([("a", 2.0, lambda _: tensor([1.0, 2.0, 3.0], dtype=torch.float64))])(BATCH)
    assert found.total.tolist() == [2.0, 4.0, 6.0] and found.total.dtype == torch.float32
    assert found.parts["a"].tolist() == [1.0, 2.0, 3.0]


def test_combine_logs_a_source_of_weight_0_without_learning_from_it():
    source = combine([("a", 1.0, gives([1, 2, 3])), ("b", 0.0, gives([[9, 9], None, [9]]))])
    found = source(BATCH)
    assert found.total.tolist() == [1.0, 2.0, 3.0] and found.token_rewards is None
    assert_same(found.parts["b"], [18, nan, 9])


def test_a_row_that_no_source_applies_to_is_named():
    for weight, items in ((1.0, [1, None, None]), (0.0, [9, 9, 9])):  # weight 0 does not count
        source = combine([("a", 1.0, gives([1, None, 3])), ("b", weight, gives(items))])
        with pytest.raises(UserError, match=r"reward a, b: none applies to response 1: 'yz': one"):
            source(BATCH)
    alone = gives([1, 2, None])
    with pytest.raises(UserError, match=r"reward f: none applies to response 2: ''"):
        as_scores(alone(BATCH), BATCH, "step 1")


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "give a reward source with a weight that is not 0"),
        ([("a", 0.0, None)], "give a reward source with a weight that is not 0"),
        ([("a", 1.0, None), ("a", 2.0, None)], "names of reward sources must differ: a, a"),
        ([("a", math.inf, None)], "weights of reward sources must be finite"),
    ],
)
def test_combine_refuses(sources, message):
    with pytest.raises(ValueError, match=message):
        combine(sources)


def test_combine_refuses_a_sum_as_a_source():
    inner = combine([("a", 1.0, gives([1, 2, 3])), ("b", 1.0, gives([1, 2, 3]))])
    with pytest.raises(ValueError, match="c has 2 parts: combine single sources"):
        combine([("c", 1.0, inner)])(BATCH)


def test_as_scores_takes_a_tensor_for_its_only_part():
    scores = as_scores(tensor([1.0, 2.0, 3.0], dtype=torch.float64), BATCH, "step 1")
    assert scores.total.tolist() == scores.parts["reward"].tolist() == [1.0, 2.0, 3.0]
    assert scores.total.dtype == torch.float32


@pytest.mark.parametrize(
    "result",
    [
        tensor([1.0, nan, 2.0]),
        Scores(tensor([1.0, nan, 2.0]), {"a": torch.zeros(3)}),
        Scores(torch.zeros(3), {"a": torch.zeros(3)}, [[0.0, 0.0], [0.0, nan], [0.0]]),
    ],
)
def test_as_scores_refuses_what_is_not_finite(result):
    with pytest.raises(NonFinite, match="step 1, response 1: score: is nan") as caught:
        as_scores(result, BATCH, "step 1")
    assert caught.value.code == NON_FINITE


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (torch.zeros(3, 1), r"reward gave \(3, 1\): give one score each, 3"),
        (torch.zeros(2), r"reward gave \(2,\): give one score each, 3"),
        (Scores(torch.zeros(3), {"a": torch.zeros(2)}), r"reward gave \(2,\)"),
        (Scores(torch.zeros(3), {}, [[0.0], [0.0], [0.0]]), "one number for each id of each"),
        (Scores(torch.zeros(3), {}, [[0.0, 0.0], [0.0, 0.0]]), "one number for each id of each"),
    ],
)
def test_as_scores_refuses_other_shapes(result, message):
    with pytest.raises(ValueError, match=message):
        as_scores(result, BATCH, "step 1")
