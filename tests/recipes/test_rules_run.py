"""Rewards that can be verified, in PPO and GRPO: what is read, refused first, and logged."""

import json
from pathlib import Path

import pytest

from minirlhf.cli import main
from tests import bad_inputs
from tests.bad_inputs import PROMPT, json_lines, words, write
from tests.tiny_folders import read_lines

world, refused = bad_inputs.world, bad_inputs.refused
GOOD = PROMPT | {"answer": "6 * 3 = 18\n#### 18"}
TURNS = {"prompt": [{"role": "user", "content": "18?"}], "answer": 18}


@pytest.mark.parametrize("verb", ["ppo", "grpo"])
@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([PROMPT | {"id": 1, "b": 2}], "d.jsonl:1: no column answer, which --reward math needs; "
         "beside the prompt: b, id: name it by --columns answer=COLUMN"),
        ([GOOD, PROMPT], "d.jsonl:2: no column answer, which --reward math needs; beside the prom"),
        ([GOOD, GOOD | {"answer": None}], "d.jsonl:2: --reward math: answer is missing: mend or "),
        ([GOOD, GOOD | {"answer": "two"}], "d.jsonl:2: --reward math: answer is 'two': needs one "),
        ([GOOD | {"answer": ["18"]}], "d.jsonl:1: --reward math: answer is ['18']: needs a text "),
    ],
)
def test_prompts_whose_answer_cannot_be_read_are_refused_before_a_model(
    rows, told, verb, refused, monkeypatch
):
    monkeypatch.setattr("minirlhf.models.pretrained.load_pretrained", None)  # nothing is loaded
    data = write("d.jsonl", json_lines(*rows))
    assert refused(words(verb, data=data, reward=("math", "0.5*format:x"))).startswith(told)
    held_out = words(verb, data=write("g.jsonl", json_lines(GOOD, GOOD)), reward="math")
    assert refused([*held_out, "--eval-data", data]).startswith(told)


def test_exact_takes_any_text_and_math_none_but_numbers(refused):
    data = write("d.jsonl", json_lines(GOOD | {"answer": "cat"}))
    told = "d.jsonl:1: --reward math: answer is 'cat': needs one number"
    assert refused(words("ppo", data=data, reward=("exact", "math"))).startswith(told)
    data = write("e.jsonl", json_lines(GOOD | {"answer": ""}))
    told = "e.jsonl:1: --reward exact: answer is empty"
    assert refused(words("ppo", data=data, reward="exact")).startswith(told)


@pytest.fixture
def folder(world, tmp_path, monkeypatch):
    for path in world.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("verb", "score"), [("ppo", "objective/scores"), ("grpo", "reward")])
def test_a_run_learns_from_rules_and_logs_each(verb, score, folder):
    solved = [{"prompt": row["prompt"], "solution": row["answer"]} for row in (TURNS, TURNS, TURNS)]
    data = write("d.jsonl", json_lines(*solved, solved[0] | {"solution": "two"}))
    rules = ("math", "0.5*format:[0-9]", "2*length:2", "0*exact")
    argv = words(verb, data=data, reward=rules, columns="answer=solution", bad_rows="skip",
                 log_every=1, sample_every=1, max_new_tokens=3)
    assert main(argv) == 0
    assert [row["where"] for row in read_lines(Path("out/rejected.jsonl"))] == ["d.jsonl:4"]
    facts = json.loads(Path("out/run.json").read_text("utf-8"))
    assert facts["settings"]["reward"] == list(rules)
    (line, *_) = read_lines(Path("out/metrics.jsonl"))
    means = {name: line[f"rewards/{name}/mean"] for name in ("math", "format", "length", "exact")}
    # a mean of (B,) scores is a sum of means: 1 math + 0.5 format + 2 length + 0 exact
    total = means["math"] + 0.5 * means["format"] + 2 * means["length"]
    assert line[score] == pytest.approx(total, abs=1e-6) and 0 < total <= 3.5
