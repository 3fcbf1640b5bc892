"""Reward functions as people write them: what they are given, and what they may return."""

import copy

import pytest
import torch
from torch import nan, tensor

from minirlhf.errors import BAD_INPUT, NON_FINITE, UserError
from minirlhf.rewards.function import function_reward
from minirlhf.rewards.load import load_function
from minirlhf.rewards.source import Completions, Scores, combine

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
        "torch.tensor([[0.5], [-1.0], [2.0]], requires_grad=True)", "iter([0.5, -1, 2])",
        "numpy.array([[0.5], [-1.0], [2.0]])", "numpy.array([0.5, -1, 2], dtype=object)",
        "[torch.tensor(0.5), torch.tensor([-1.0]), numpy.array([2])]",
        "(x for x in (0.5, -1, 2))", "map(float, ('0.5', '-1', '2'))",
        "{0: 0.5, 1: -1, 2: 2}.values()",
        "[numpy.float64(0.5), numpy.int8(-1), fractions.Fraction(2)]",
        "__import__('array').array('d', [0.5, -1, 2])", "collections.deque([0.5, -1, 2])",
    ],
)
def test_function_may_return_any_list_tensor_array_or_iterator(value, tmp_path):
    source = f"import collections, fractions, numpy, torch\ndef f(completions):\n    return {value}"
    assert scores_of(source, tmp_path) == [0.5, -1.0, 2.0]


@pytest.mark.parametrize("value", ["[True, False, True]", "torch.tensor([True, False, True])",
                                   "numpy.array([[True], [False], [True]])"])
def test_function_may_return_whether(value, tmp_path):
    source = f"import numpy, torch\ndef f(completions):\n    return {value}"
    assert scores_of(source, tmp_path) == [1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1.0, 2.0]", "returned 2 of them: return one number for each of the 3"),
        ("1.0", "returned float: return one number for each of the 3"),
        ("torch.tensor(1.0)", "returned float: return one number for each of the 3"),
        ("torch.ones(1, 3)", "returned 1 of them: return one number for each of the 3"),
        ("(1.0 for _ in iter(int, 1))", "returned 4 of them: return one number for each of the 3"),
        ("{1.0, 2.0, 3.0}", "returned set"),
        ("b'abc'", "returned bytes"),
        ("{}", "returned an empty dict: return rewards under their names"),
        ("{'a': [1, 2, 3], 'b': [1, '2', 3]}", "reward.py:f: b: score 1 is '2'"),
        ("{'a': [1, 2, 3], 'b': [1, 2]}", "reward.py:f: b: returned 2 of them: return one number"),
        ("{'a': 1.0}", "reward.py:f: a: returned float: return one number for each of the 3"),
        ("{'rewards': [1, 2, 3], 'style': [1, 2, 3]}", "returned rewards and style: return reward"),
        ("{'rewards': [1, 2, 3], 'extra_logs': {'x': 'abc'}}", "reward.py:f: x: returned str"),
        ("[1.0, 1j, 2.0]", "score 1 is '1j'"),
        ("torch.tensor([1, 1j, 2])", r"score 0 is '\(1\+0j\)'"),
        ("[{'score': 1.0}] * 3", "score 0 is \"{'score': 1.0}\""),
        ("None", "returned NoneType"),
        ("'abc'", "returned str"),
        ("[1.0, '2', 2.0]", "score 1 is '2'"),
        ("[[1.0], [2.0], [3.0]]", r"score 0 is \[1.0\]: 1 numbers: the response has 2 ids"),
        ("torch.ones(3, 4)", "score 0 is .*: 4 numbers: the response has 2 ids; return one number"),
        ("[1, [1, 2, 3], 1]", r"score 1 is \[1, 2, 3\]: 3 numbers: the response has 2 ids"),
        ("[1, [1, None], 1]", "score 1, token 1 is 'None': return finite numbers, or None for no"),
        ("[1, [1, [2]], 1]", "score 1, token 1 is "),
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
        ("from functools import wraps\ndef g(completions): ...\n@wraps(g)\ndef f(x): ...",
         "/reward.py:f", "raised TypeError"),
        ("def f(completions):\n    raise SystemExit(0)", "reward.py:2", "raised SystemExit: 0"),
        ("class Own(BaseException): ...\ndef f(completions):\n    raise Own", "reward.py:3",
         "reward.py:f raised Own: it"),
        ("def f(completions):\n    for c in completions:\n        yield c[9]", "reward.py:3",
         "raised IndexError"),
        ("async def g(text):\n    return 1 / len(text)\nasync def f(completions):\n"
         "    return [await g(c) for c in completions]", "reward.py:2", "raised ZeroDivisionError"),
        ("import asyncio\nasync def f(completions):\n    raise asyncio.CancelledError('x')",
         "reward.py:3", "raised CancelledError: x"),
        ("import asyncio, sys\nasync def g(text):\n    sys.exit('no key')\n"
         "async def f(completions):\n    return await asyncio.gather(*map(g, completions))",
         "reward.py:3",
         "raised SystemExit: no key"),
        ("import os\nimport no_such_module_here\n", "reward.py:2",
         "reward.py raised ModuleNotFoundError"),
        ("import os\n\ndef f(:\n", "reward.py:3", "reward.py raised SyntaxError"),
        ("g = 3\ndef first(completions): ...\ndef second(completions): ...\n", "/reward.py",
         "has no function 'f': it has: first, second"),
        ("g = 3\n", "/reward.py", "has no function 'f': it has: none"),
    ],
)
def test_function_that_fails_is_named_with_its_line(source, where, what, tmp_path):
    error = refusal(source, tmp_path)
    assert error.where.endswith(where) and what in str(error)
    assert error.code == BAD_INPUT
    if "reward.py:f raised" in what:
        assert error.do == "it was given completions"


def assert_same(found: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(found, tensor(expected).float(), rtol=0, atol=1e-6, equal_nan=True)


def test_function_leaves_out_the_rows_of_none(tmp_path):
    scores = scored("def f(completions):\n    return [1.5, None, -2]", tmp_path)
    assert scores.total.tolist() == [1.5, 0.0, -2.0]
    (part,) = scores.parts.values()
    assert_same(part, [1.5, nan, -2.0])
    assert scores.token_rewards is None


@pytest.mark.parametrize("rows", ["[[1, 2.5], 7, [0.25]]", "[torch.tensor([1, 2.5]), 7, (0.25,)]"])
def test_function_rewards_tokens_by_a_list(rows, tmp_path):
    # the score of such a row is 0, its part the sum: 1 + 2.5 = 3.5; the row of 7 has no tokens'
    scores = scored(f"import torch\ndef f(completions):\n    return {rows}", tmp_path)
    assert scores.total.tolist() == [0.0, 7.0, 0.0]
    assert scores.token_rewards == [[1.0, 2.5], [0.0, 0.0], [0.25]]
    (part,) = scores.parts.values()
    assert part.tolist() == [3.5, 7.0, 0.25]
    assert scores.sums.tolist() == [3.5, 7.0, 0.25]


# ---- what may be a function ----------------------------------------------------------------------

COUNT = "def count(completions, weight=1):\n    return [weight * len(c) for c in completions]\n"


@pytest.mark.parametrize(
    "source",
    [
        COUNT + "f = count",
        "f = lambda completions, **_: [len(c) for c in completions]",
        COUNT + "from functools import partial\nf = partial(count, weight=1)",
        COUNT + "from functools import partial\ndef g(weight, completions):\n"
        "    return count(completions, weight)\nf = partial(g, 1)",
        COUNT + "from functools import wraps\n@wraps(count)\ndef f(*args, **kwargs):\n"
        "    return count(*args, **kwargs)",
        "def f(finish_reasons, completions, /, *, prompts, more=None):\n"
        "    assert finish_reasons[1] == 'length' and prompts[0] == 'ab' and more is None\n"
        "    return list(map(len, completions))",
        "class F:\n    def __call__(self, completions):\n        return map(len, completions)\n"
        "f = F()",
        "class f:\n    def __init__(self, weight=1):\n        self.weight = weight\n"
        "    def __call__(self, completions):\n        return map(len, completions)",
        "class F:\n    def score(self, completions):\n        return map(len, completions)\n"
        "f = F().score",
        "class f(list):\n    def __init__(self, completions):\n"
        "        super().__init__(map(len, completions))",
        "async def f(completions):\n    return [len(c) for c in completions]",
        "import asyncio\nfrom functools import partial\nasync def g(pause, completions):\n"
        "    await asyncio.sleep(pause)\n    return map(len, completions)\nf = partial(g, 0)",
        "class f:\n    async def __call__(self, completions):\n"
        "        return map(len, completions)",
        # what a call returns to be awaited, and a list of such
        "async def g(completions):\n    return [len(c) for c in completions]\n"
        "def f(completions):\n    return g(completions)",
        "async def g(text):\n    return len(text)\n"
        "def f(completions):\n    return [g(text) for text in completions]",
    ],
)
def test_anything_that_can_be_called_is_a_function(source, tmp_path):
    assert scores_of(source, tmp_path) == [1, 2, 0]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("f = min", "reward.py:f: has no signature to read: .*: wrap it: def f"),
        ("f = len", "reward.py:f: needs obj, which no prompt has: there are answer, prompts"),
        ("def f(*args): ...", "reward.py:f: asks for no completions: there are answer, prompts"),
        ("def f(weight=1): ...", "reward.py:f: asks for no completions: there are answer"),
        ("def f(completions, trainer_state): ...", "needs trainer_state, .*: is TRL's trai"),
        ("def f(prompt, completion): ...", "needs completion, prompt, .*: ask for prompts, c"),
        ("def f(queries, prompts, labels): ...", "f: asks for queries, whole texts: give"),
        ("class f:\n    def __init__(self, key): ...\n    def __call__(self, completions): ...",
         "raised TypeError: .*: a class is made without arguments"),
    ],
)
def test_what_cannot_be_called_is_refused(source, message, tmp_path):
    with pytest.raises(UserError, match=message):
        scores_of(source, tmp_path)


def test_completions_are_messages_where_the_prompt_is_a_conversation():
    given, turns = [], [{"role": "user", "content": "c"}]
    begun = [*turns, {"role": "assistant", "content": "Well"}]  # the response goes on with it

    def f(prompts, completions):
        given.extend([prompts, completions])
        return [0.0] * 3

    function_reward(f, "f")(BATCH._replace(prompts=["ab", turns, begun]))
    assert given == [["ab", turns, begun], [
        "x", [{"role": "assistant", "content": "yz"}], [{"role": "assistant", "content": ""}],
    ]]


# ---- other tools' functions ----------------------------------------------------------------------


class Ids:
    """A tokenizer whose text is the ids."""

    @staticmethod
    def decode(ids: list[int], skip_special: bool) -> str:
        assert not skip_special
        return " ".join(map(str, ids))


def test_function_of_openrlhf_gets_whole_texts_and_labels():
    def f(queries, prompts, labels, **others):
        assert queries == ["67 68 90 0", "69 91 92", "70 0"] and prompts == ["67 68", "69", "70"]
        assert labels == ["a", "b", "c"]
        return {"rewards": torch.tensor([1.0, 2.0, 4.0]), "scores": torch.tensor([[0], [1], [1]]),
                "extra_logs": {"tries": 3, "right": [True, None, False]}}

    batch = BATCH._replace(
        prompts=[[{"role": "user", "content": p}] for p in BATCH.prompts],
        columns={"label": ["a", "b", "c"]},
    )
    found = function_reward(f, "f", tokenizer=Ids)(batch)
    assert found.total.tolist() == found.parts["f"].tolist() == [1.0, 2.0, 4.0]
    scores = combine([("f", 0.5, lambda _: found)])(batch)
    assert scores.total.tolist() == [0.5, 1.0, 2.0]
    # mean of 1, 2, 4: 7/3; of 0, 1, 1: 2/3; of 1 and 0: 1/2
    means = {k: v for k, v in scores.metrics().items() if k.endswith("/mean")}
    assert means == pytest.approx({"rewards/f/mean": 7 / 3, "rewards/f/scores/mean": 2 / 3,
                                   "rewards/f/tries/mean": 3.0, "rewards/f/right/mean": 0.5})


TRUTHS = [{"ground_truth": "7"}, {"ground_truth": None}, None]
VERL = {"data_source": ["gsm8k"] * 3, "reward_model": TRUTHS}


@pytest.mark.parametrize("is_async", [False, True])
def test_function_of_verl_is_called_once_a_response(is_async):
    def f(data_source, solution_str, ground_truth, extra_info=None):
        assert data_source == "gsm8k" and extra_info is None
        return {"score": len(solution_str), "right": ground_truth == "7", "said": solution_str}

    async def later(data_source, solution_str, ground_truth, extra_info):
        return f(data_source, solution_str, ground_truth, extra_info)

    found = function_reward(later if is_async else f, "f")(BATCH._replace(columns=VERL))
    assert found.total.tolist() == [1.0, 2.0, 0.0]
    assert {name: values.tolist() for name, values in found.logged.items()} == {"right": [1, 0, 0]}


def test_function_of_verl_may_take_a_batch_and_a_row_must_have_its_score():
    def batched(data_sources, solution_strs, ground_truths, extra_infos):
        assert ground_truths == ["7", None, None] and extra_infos == [None] * 3
        return [len(text) for text in solution_strs]

    batch = BATCH._replace(columns=VERL)
    assert function_reward(batched, "f", {"p:1": set(VERL)})(batch).total.tolist() == [1, 2, 0]
    told = r"f: gave response [01] .*: a dict must have a score, and all be dicts or none"
    for rows in ({"x": {"acc": 1}}, {"x": {"score": 1}}):
        source = function_reward(lambda solution_str, rows=rows: rows.get(solution_str, 1.0), "f")
        with pytest.raises(UserError, match=told):
            source(batch)
    no_truth = batch._replace(columns={**VERL, "reward_model": [{"style": "rule"}] * 3})
    with pytest.raises(UserError, match=r"^reward_model {'style': 'rule'}: has no ground_truth: "):
        function_reward(batched, "f")(no_truth)


def test_a_column_is_not_taken_for_what_another_tool_means_by_its_name():
    columns = {"queries": ["q", "r", "s"], "solution_str": ["t", "u", "v"], "labels": [1, 2, 3],
               "label": [4, 5, 6]}

    def f(queries, solution_str, labels, prompts):
        assert [queries, solution_str, labels] == [*columns.values()][:3] and prompts[0] == "ab"
        return [1.0, 2.0, 3.0]

    batch = BATCH._replace(columns=columns)
    assert function_reward(f, "f", {"p:1": set(columns)})(batch).total.tolist() == [1.0, 2.0, 3.0]


def test_named_rewards_are_summed_and_each_is_logged():
    # 1 + 0.5; 2 alone, as b does not apply; none applies to the last
    f = function_reward(lambda completions: {"a": [1, 2, None], "b": (0.5, None, None)}, "f")
    found = f(BATCH)
    assert found.total.tolist() == [1.5, 2.0, 0.0]
    assert_same(found.parts["f"], [1.5, 2.0, nan])
    assert_same(found.logged["b"], [0.5, nan, nan])
    # the tokens of a, and b's total: 3 + 1
    f = function_reward(lambda completions: {"a": [[1, 2], 0, 0], "b": [1, 0, 0]}, "f")
    scores = combine([("f", 2.0, f)])(BATCH)
    assert scores.token_rewards[0] == [2.0, 4.0] and scores.total.tolist() == [2.0, 0.0, 0.0]
    assert scores.parts["f"].tolist() == [4.0, 0.0, 0.0] and "rewards/f/a/std" in scores.metrics()
