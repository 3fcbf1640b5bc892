"""Where scores come from: functions that users write, and reward models."""

import numpy
import pytest
import torch

from minirlhf.errors import BAD_INPUT, NON_FINITE, UserError
from minirlhf.heads import RewardModel, initialize_score
from minirlhf.hf_config import config_from_hf
from minirlhf.pretrained import load_reward_model, save_pretrained
from minirlhf.rewards import Completions, function_reward, load_reward, model_reward
from minirlhf.tokenizer import load_tokenizer, train_tokenizer
from minirlhf.transformer import CausalLM, initialize

SHAPE = {
    "model_type": "llama", "vocab_size": 258, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
BATCH = Completions(
    prompts=["ab", "c", "d"],
    prompt_ids=[[67, 68], [69], [70]],
    completions=["x", "yz", ""],
    response_ids=[[90, 0], [91, 92], [0]],
    finish_reasons=["eos", "length", "eos"],
    columns={"answer": [7, None, 9], "prompts": ["not", "these", "!"]},
)


def scores_of(source: str, tmp_path, name: str = "f", batch: Completions = BATCH) -> list[float]:
    """What the function `name` of a file with this source gives for the batch."""
    path = tmp_path / "reward.py"
    path.write_text(source)
    reward = load_reward(f"{path}:{name}", None, torch.float32, "cpu", 64)
    scores = reward(batch)
    assert scores.dtype == torch.float32 and scores.shape == (len(batch.completions),)
    return scores.tolist()


def refusal(source: str, tmp_path) -> UserError:
    with pytest.raises(UserError) as caught:
        scores_of(source, tmp_path)
    return caught.value


# ---- what a function is given --------------------------------------------------------------------


def test_function_gets_what_its_signature_names(tmp_path):
    source = """
def both(completions, prompts):
    return [len(p + c) for p, c in zip(prompts, completions, strict=True)]
def column(*, answer, weight=2):
    return [weight * (a or 0) for a in answer]
def ids(completion_ids, finish_reasons):
    return [len(i) + (r == "eos") for i, r in zip(completion_ids, finish_reasons, strict=True)]
"""
    assert scores_of(source, tmp_path, "both") == [3, 3, 1]
    assert scores_of(source, tmp_path, "column") == [14, 0, 18]
    assert scores_of(source, tmp_path, "ids") == [3, 2, 2]


def test_function_with_keywords_gets_every_column(tmp_path):
    source = """
def f(completions, **rest):
    assert sorted(rest) == ["answer", "completion_ids", "finish_reasons", "prompts"]
    assert rest["prompts"] == ["ab", "c", "d"]  # a column cannot take the place of the prompts
    return [1.5] * len(completions)
"""
    assert scores_of(source, tmp_path) == [1.5, 1.5, 1.5]


def test_function_that_needs_an_absent_column_is_told_which_there_are(tmp_path):
    error = refusal("def f(completions, answers):\n    return [0.0] * 3", tmp_path)
    assert "needs answers, which no prompt has" in str(error)
    assert "there are answer, prompts, completions, completion_ids, finish_reasons" in str(error)


def test_function_may_define_dataclasses_and_call_its_own_helpers(tmp_path):
    source = """
from __future__ import annotations
from dataclasses import dataclass
@dataclass
class Length:
    text: str
    def score(self) -> float:
        return float(len(self.text))
def f(completions):
    return [Length(c).score() for c in completions]
"""
    assert scores_of(source, tmp_path) == [1, 2, 0]


# ---- what it may return --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        "[0.5, -1, 2]",
        "(0.5, -1, 2)",
        "torch.tensor([0.5, -1.0, 2.0], dtype=torch.bfloat16)",
        "numpy.array([0.5, -1.0, 2.0])",
        "list(numpy.array([0.5, -1.0, 2.0], dtype='float32'))",
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
        ("[1.0, None, 2.0]", "score 1 is 'None'"),
        ("[1.0, True, 2.0]", "score 1 is 'True'"),
        ("torch.tensor([True, False, True])", "score 0 is 'True'"),
        ("[1.0, '2', 2.0]", "score 1 is '2'"),
        ("[[1.0], [2.0], [3.0]]", r"score 0 is '\[1.0\]'"),
        ("torch.ones(3, 1)", r"score 0 is '\[1.0\]'"),
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


# ---- where it fails ------------------------------------------------------------------------------


def test_function_that_raises_is_named_with_its_line(tmp_path):
    source = """
import json
def helper(text):
    return json.loads(text)
def f(completions):
    return [helper(c) for c in completions]
"""
    error = refusal(source, tmp_path)
    assert error.where == "reward.py:4"  # not the line of the json module that raised
    assert "reward.py:f raised JSONDecodeError" in error.what
    assert error.do == "it was given completions"
    assert error.code == BAD_INPUT


def test_function_that_takes_no_keywords_is_refused_by_name(tmp_path):
    error = refusal("def f(completions, /):\n    return completions", tmp_path)
    assert error.where.endswith("reward.py:f")
    assert "raised TypeError" in error.what


def test_file_that_does_not_import_is_refused_with_its_line(tmp_path):
    error = refusal("import os\nimport no_such_module_here\n", tmp_path)
    assert error.where == "--reward reward.py:2" and "ModuleNotFoundError" in error.what
    error = refusal("import os\n\ndef f(:\n", tmp_path)
    assert error.where == "--reward reward.py:3" and "SyntaxError" in error.what


def test_file_without_the_function_is_told_what_it_has(tmp_path):
    source = "g = 3\ndef first(completions): ...\ndef second(completions): ...\n"
    with pytest.raises(UserError, match="has no function 'f': it has: first, second"):
        scores_of(source, tmp_path)
    with pytest.raises(UserError, match="has no function 'f': it has: none"):
        scores_of("g = 3\n", tmp_path)


def test_load_reward_refuses_a_file_that_is_not_there_or_names_no_function():
    for spec, message in (
        ("absent.py:f", "absent.py does not exist: give file.py:function"),
        ("absent.py", "absent.py names no function: give absent.py:function"),
        ("absent", "no such folder"),
    ):
        with pytest.raises(UserError, match=message):
            load_reward(spec, None, torch.float32, "cpu", 64)


def test_function_reward_wraps_any_function():
    reward = function_reward(lambda completions: numpy.arange(3), "counter")
    assert reward(BATCH).tolist() == [0, 1, 2]


# ---- reward models -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random reward model whose tokenizer has one token a byte; eos is 0."""
    path = tmp_path_factory.mktemp("reward")
    train_tokenizer([], 258, path)
    rng = torch.Generator().manual_seed(0)
    lm = initialize(CausalLM(config_from_hf(SHAPE)), rng)
    save_pretrained(initialize_score(RewardModel(lm), rng), path, pad_token_id=1)
    return path


def alone(folder, ids: list[int], read_before_eos: bool = False) -> float:
    """The score of one row by itself."""
    model = load_reward_model(folder)
    with torch.no_grad():
        return float(model(torch.tensor([ids]), torch.tensor([len(ids)])))


def reward_of(folder, batch: Completions, before: bool = False, tokens: int = 64) -> list[float]:
    model = load_reward_model(folder)
    model.read_before_eos = before
    return model_reward(model, load_tokenizer(folder), tokens)(batch).tolist()


@pytest.mark.parametrize("tokens", [1, 6, 64])
def test_model_reward_is_the_reward_model_on_each_row_by_itself(folder, tokens):
    # with eos where the policy ended the text, without where the length cut it; in the rows' order
    rows = [[67, 68, 90, 0], [69, 91, 92], [70, 0]]
    expected = [alone(folder, row) for row in rows]
    assert len(set(expected)) == 3
    assert reward_of(folder, BATCH, tokens=tokens) == pytest.approx(expected, abs=1e-6)
    source = load_reward(str(folder), load_tokenizer(folder), torch.float32, "cpu", tokens)
    assert source(BATCH).tolist() == pytest.approx(expected, abs=1e-6)


def test_model_reward_reads_before_eos_where_the_model_was_trained_so(folder):
    rows = [[67, 68, 90], [69, 91, 92], [70]]  # the last has an empty response
    expected = [alone(folder, row) for row in rows]
    assert reward_of(folder, BATCH, before=True) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("before", [False, True])
def test_model_reward_scores_a_stopped_text_as_one_that_ended_there(folder, before):
    encode = load_tokenizer(folder).encode
    batch = Completions(
        ["p"], [encode("p")], ["good"], [encode("good\n\nQ")], ["stop"], {}
    )  # fmt: skip
    ended = encode("p") + encode("good") + ([] if before else [0])
    assert reward_of(folder, batch, before) == pytest.approx([alone(folder, ended)], abs=1e-6)


def test_model_reward_has_no_gradient(folder):
    model = load_reward_model(folder)
    assert not model_reward(model, load_tokenizer(folder), 64)(BATCH).requires_grad


def test_load_reward_refuses_a_model_of_another_tokenizer(folder, tmp_path):
    other = train_tokenizer(["some words"] * 9, 260, tmp_path)
    with pytest.raises(UserError, match="has another tokenizer than the policy"):
        load_reward(str(folder), other, torch.float32, "cpu", 64)


def test_load_reward_refuses_a_language_model(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    tokenizer.save(tmp_path)
    save_pretrained(CausalLM(config_from_hf(SHAPE)), tmp_path)
    with pytest.raises(UserError, match="not a reward model"):
        load_reward(str(tmp_path), tokenizer, torch.float32, "cpu", 64)


def test_model_reward_refuses_a_row_longer_than_the_model_reads(folder):
    batch = BATCH._replace(prompt_ids=[[67] * 63, [69], [70]])
    with pytest.raises(UserError, match="a text of 65 tokens, the reward model reads 64"):
        reward_of(folder, batch)


def test_model_reward_refuses_a_tokenizer_without_eos(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.eos_ids = ()
    with pytest.raises(UserError, match="names no eos token"):
        model_reward(load_reward_model(folder), tokenizer, 64)
