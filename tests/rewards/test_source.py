"""What reward sources are: functions that users write, and weighted sums of several."""

import copy
import math

import pytest
import torch
from torch import nan, tensor

from minirlhf.errors import BAD_INPUT, NON_FINITE, NonFinite, UserError
from minirlhf.rewards.load import load_function
from minirlhf.rewards.source import Completions, Scores, as_scores, combine, function_reward

BATCH = Completions(
    prompts=["ab", "c", "d"], prompt_ids=[[67, 68], [69], [70]],
    completions=["x", "yz", ""], response_ids=[[90, 0], [91, 92], [0]],
    finish_reasons=["eos", "length", "eos"],
    columns={"answer": [7, None, 9], "prompts": ["not", "these", "!"]},
)


def scored(source: str, tmp_path, name: str = "f", batch: Completions = BATCH) -> Scores:
    """What the function `name` of a file with this source gives for the batch."""
    path = tmp_path / "reward.py"
    path.write_text(source)
    scores = load_function(f"{path}:{name}")(batch)
    assert scores.total.dtype == torch.float32
    assert scores.total.shape == (len(batch.completions),)
    return scores


def scores_of(source: str, tmp_path, name: str = "f") -> list[float]:
    return scored(source, tmp_path, name).total.tolist()


def refusal(source: str, tmp_path) -> UserError:
    with pytest.raises(UserError) as caught:
        scores_of(source, tmp_path)
    return caught.value


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(completions, prompts):\n"
         "    return [len(p + c) for p, c in zip(prompts, completions)]", [3, 3, 1]),
        ("def f(*, answer, weight=2):\n"
         "    return [weight * (a or 0) for a in answer]", [14, 0, 18]),
        ("def f(completion_ids, finish_reasons):\n"
         "    return [len(i) + (r == 'eos') for i, r in zip(completion_ids, finish_reasons)]",
         [3, 2, 2]),
        # with **keywords every column; a column cannot take the place of the prompts
        ("def f(completions, **rest):\n"
         "    assert sorted(rest) == ['answer', 'completion_ids', 'finish_reasons', 'prompts']\n"
         "    assert rest['prompts'] == ['ab', 'c', 'd']\n    return [1.5] * len(completions)",
         [1.5, 1.5, 1.5]),
        # dataclasses and helpers of its own
        ("from __future__ import annotations\nfrom dataclasses import dataclass\n@dataclass\n"
         "class Length:\n    text: str\n    def score(self) -> float:\n"
         "        return float(len(self.text))\n"
         "def f(completions):\n    return [Length(c).score() for c in completions]", [1, 2, 0]),
    ],
)
def test_function_gets_what_its_signature_names(source, expected, tmp_path):
    assert scores_of(source, tmp_path) == expected


def test_what_a_function_changes_is_its_own(tmp_path):
    source = """
def f(completions, prompts, completion_ids, answer):
    for turns, ids in zip(prompts, completion_ids):
        turns.append("more")
        ids.pop()
    answer[0].clear()
    completions.clear()
    return [1.0, 2.0, 3.0]
"""
    prompts = [["a"], ["b"], ["c"]]
    batch = BATCH._replace(prompts=prompts, columns={"answer": [[7], None, 9]})
    before = copy.deepcopy(batch)
    assert scored(source, tmp_path, batch=batch).total.tolist() == [1.0, 2.0, 3.0]
    assert batch == before


def test_function_gets_none_where_no_row_of_the_batch_has_a_column_of_the_file():
    columns = {"p:1": {"rating", "other"}}
    given = []

    def f(completions, rating, other=7):
        given.append((rating, other))
        return [0.0] * len(completions)

    function_reward(f, "f", columns)(BATCH)  # whose only column is `answer`
    assert given == [([None] * 3, 7)]
    told = "^f: needs rating, which no prompt has: there are answer, prompts, completions, complet"
    with pytest.raises(UserError, match=told):
        function_reward(f, "f")(BATCH)


def test_function_needs_its_columns_in_every_file():
    def f(completions, rating, prompts):
        raise AssertionError

    told = "^h:3: f needs rating, which no prompt has: there are other, prompts, completions, "
    with pytest.raises(UserError, match=told):
        function_reward(f, "f", {"p:1": {"rating"}, "h:3": {"other"}})
    function_reward(f, "f", {"p:1": {"rating"}, "h:3": {"rating", "other"}})


@pytest.mark.parametrize(
    "value",
    [
        "[0.5, -1, 2]", "(0.5, -1, 2)", "torch.tensor([0.5, -1.0, 2.0], dtype=torch.bfloat16)",
        "numpy.array([0.5, -1.0, 2.0])", "list(numpy.array([0.5, -1.0, 2.0], dtype='float32'))",
    ],
)
def test_function_may_return_a_list_tensor_or_array(value, tmp_path):
    source = f"import numpy, torch\ndef f(completions):\n    return {value}"
    assert scores_of(source, tmp_path) == [0.5, -1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1.0, 2.0]", "returned 2 of them: return one number for each of the 3"),
        ("1.0", "returned float: return one number for each of the 3"),
        ("torch.tensor(1.0)", "returned Tensor"),
        ("None", "returned NoneType"),
        ("'abc'", "returned str"),
        ("[1.0, True, 2.0]", "score 1 is 'True'"),
        ("torch.tensor([True, False, True])", "score 0 is 'True'"),
        ("[1.0, '2', 2.0]", "score 1 is '2'"),
        ("[[1.0], [2.0], [3.0]]", r"score 0 is \[1.0\]: 1 numbers: the response has 2 ids"),
        ("torch.ones(3, 1)", r"score 0 is \[1.0\]: 1 numbers: the response has 2 ids; return one"),
        ("[1, [1, 2, 3], 1]", r"score 1 is \[1, 2, 3\]: 3 numbers: the response has 2 ids"),
        ("[1, [1, None], 1]", "score 1, token 1 is 'None': return finite numbers, or None for no"),
        ("[1, [1, [2]], 1]", "score 1, token 1 is "),
        ("[1, 1, [True]]", "score 2, token 0 is 'True'"),
        ("[1, '', 1]", "score 1 is ''"),
    ],
)
def test_function_that_returns_no_numbers_is_refused(value, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        scores_of(f"import torch\ndef f(completions):\n    return {value}", tmp_path)
    assert caught.value.code == BAD_INPUT


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-1e39", "10**400"])
def test_function_that_returns_a_number_beyond_float32_stops_the_run(value, tmp_path):
    error = refusal(f"def f(completions):\n    return [0.0, {value}, 0.0]", tmp_path)
    assert "score 1 is " in str(error) and "return finite numbers" in str(error)
    assert error.code == NON_FINITE


@pytest.mark.parametrize(
    ("source", "where", "what"),
    [
        # not the line of the json module that raised
        ("import json\ndef helper(text):\n    return json.loads(text)\n"
         "def f(completions):\n    return [helper(c) for c in completions]",
         "reward.py:3", "reward.py:f raised JSONDecodeError"),
        ("def f(completions, /):\n    return completions", "/reward.py:f", "raised TypeError"),
        ("def f(completions):\n    raise SystemExit(0)", "reward.py:2", "raised SystemExit: 0"),
        ("import os\nimport no_such_module_here\n", "--reward reward.py:2", "ModuleNotFoundError"),
        ("import os\n\ndef f(:\n", "--reward reward.py:3", "SyntaxError"),
        ("g = 3\ndef first(completions): ...\ndef second(completions): ...\n", "/reward.py",
         "has no function 'f': it has: first, second"),
        ("g = 3\n", "/reward.py", "has no function 'f': it has: none"),
    ],
)
def test_function_that_fails_is_named_with_its_line(source, where, what, tmp_path):
    error = refusal(source, tmp_path)
    assert error.where.endswith(where) and what in str(error)
    assert error.code == BAD_INPUT
    if "raised" in what:
        assert error.do == "it was given completions"


def assert_same(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, tensor(expected).float(), rtol=0, atol=1e-6, equal_nan=True)


def test_function_leaves_out_the_rows_of_none(tmp_path):
    scores = scored("def f(completions):\n    return [1.5, None, -2]", tmp_path)
    assert scores.total.tolist() == [1.5, 0.0, -2.0]
    (part,) = scores.parts.values()
    assert_same(part, [1.5, nan, -2.0])
    assert scores.token_rewards is None


@pytest.mark.parametrize("rows", ["[[1, 2.5], 7, [0.25]]", "[(1, 2.5), 7, torch.tensor([0.25])]"])
def test_function_rewards_tokens_by_a_list(rows, tmp_path):
    # the score of such a row is 0, its part the sum: 1 + 2.5 = 3.5; the row of 7 has no tokens'
    scores = scored(f"import torch\ndef f(completions):\n    return {rows}", tmp_path)
    assert scores.total.tolist() == [0.0, 7.0, 0.0]
    assert scores.token_rewards == [[1.0, 2.5], [0.0, 0.0], [0.25]]
    (part,) = scores.parts.values()
    assert part.tolist() == [3.5, 7.0, 0.25]
    assert scores.sums.tolist() == [3.5, 7.0, 0.25]


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
