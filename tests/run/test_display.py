"""What a run tells: how much, in which form, and that it fits."""

import json
import sys

import pytest

from minirlhf import console
from minirlhf.errors import UserError
from minirlhf.files.sieve import Report
from minirlhf.run import display, terminal
from minirlhf.run.display import ConsoleSettings, Display, this_command
from minirlhf.run.settings import validate

FACTS = {
    "prompts": 2000, "steps": 32, "rows in a rollout": 64, "learning rate": "0.0003, linear",
    "memory": "about 0.4 GB", "device": "cpu", "dtype": "float32", "seed": 3, "reward": "r/model",
}
METRICS = {"step": 7, "objective/scores": 1.23456, "objective/kl": 0.0, "own_name": 1e-5}
NAMES = ("objective/scores", "objective/kl", "missing", "own_name")


def told(capsys, act, **settings):
    act(Display(ConsoleSettings(**settings), "ppo"))
    return capsys.readouterr().out.splitlines()


def test_two_lines_of_facts_and_what_is_scored(capsys):
    assert told(capsys, lambda d: d.facts(FACTS)) == [
        "  ppo: 2,000 prompts · 32 steps · learning rate 0.0003 · seed 3",
        "  memory about 0.4 GB · cpu · float32", "  reward: r/model",
    ]


def test_each_of_several_rewards_is_told(capsys):
    parts = {"reward length": "2 x r.py:length", "reward judge": "r/model", "rows": 4}
    assert told(capsys, lambda d: d.facts(parts))[2:] == [
        "  reward length: 2 x r.py:length", "  reward judge: r/model"]


def test_verbose_tells_each_fact_in_a_line(capsys):
    lines = told(capsys, lambda d: d.facts(FACTS), verbose=True)
    assert len(lines) == len(FACTS)
    assert lines[:3] == ["  prompts            2,000", "  steps              32",
                         "  rows in a rollout  64"]


def test_steps_are_rows_of_a_table_with_headings_that_people_know(capsys):
    # a column is as wide as its heading, at least 9, and 2 more: 11 here
    assert told(capsys, lambda d: d.step(7, METRICS, NAMES)) == [
        "  step     reward         KL   own name", "     7      1.235          0      1e-05",
    ]
    rows = told(capsys, lambda d: [d.step(n, METRICS, NAMES) for n in range(41)])
    assert [i for i, row in enumerate(rows) if "reward" in row] == [0, 21, 42]
    assert told(capsys, lambda d: d.step(7, METRICS, ())) == []


@pytest.mark.parametrize(("columns", "left"), [(39, 3), (38, 2), (17, 1), (16, 0)])
def test_columns_that_do_not_fit_the_terminal_are_left_out(capsys, monkeypatch, columns, left):
    """Six columns of the step and 11 for each metric: 39 hold three."""
    monkeypatch.setattr(terminal, "columns", lambda: columns)
    rows = told(capsys, lambda d: d.step(7, METRICS, NAMES))
    assert [len(row) for row in rows] == ([6 + 11 * left] * 2 if left else [])


def test_an_evaluation_is_one_line(capsys):
    def act(shown):
        shown.evaluation("eval/short/", "64 prompts", METRICS, NAMES)

    assert told(capsys, act) == ["  eval/short, 64 prompts: reward 1.235, KL 0, own name 1e-05"]
    (line,) = told(capsys, act, json=True)
    assert json.loads(line) == {"event": "evaluation", "set": "eval/short"} | METRICS


def everything(shown):
    notes = ["n", "warning: w"]
    shown.report(Report("a.jsonl", "texts (text)", 3, 2, {"too long": 1}, notes=notes))
    shown.facts(FACTS)
    shown.step(7, METRICS, NAMES)
    shown.samples(7, ["  text"], [{"prompt": "p"}])
    shown.note("alarm at step 7: a: b")
    shown.say("said")
    shown.done("model", "out/model")


def test_quiet_tells_what_is_unusual_only(capsys):
    assert told(capsys, everything, quiet=True) == ["  warning: w", "alarm at step 7: a: b"]
    assert not console._State.bars
    assert len(told(capsys, everything)) == 13
    assert console._State.bars


def test_json_tells_everything_one_object_a_line(capsys):
    events = [json.loads(line) for line in told(capsys, everything, json=True)]
    assert [e["event"] for e in events] == ["said", "note", "note", "note", "facts", "step",
                                            "samples", "note", "said", "done"]
    assert events[4] == {"event": "facts", "recipe": "ppo"} | FACTS
    assert events[5] == {"event": "step"} | METRICS
    assert events[-1] == {"event": "done", "what": "model", "folder": "out/model"}


def test_colour_is_for_terminals(capsys, monkeypatch):
    monkeypatch.setattr(terminal, "has_color", lambda: True)
    assert told(capsys, lambda d: d.note("alarm")) == ["\x1b[33malarm\x1b[0m"]
    assert told(capsys, lambda d: d.note("alarm"), json=True) == [
        '{"event": "note", "text": "alarm"}']


def test_only_one_form_is_given():
    with pytest.raises(UserError, match="--quiet and --json: give one of them"):
        validate(ConsoleSettings(quiet=True, json=True))


@pytest.mark.parametrize(("argv", "command"), [
    (["/v/bin/minirlhf", "ppo", "--out", "a b"], "minirlhf ppo --out 'a b'"),
    (["/s/minirlhf/__main__.py", "ppo"], "python -m minirlhf ppo"),
    (["minirlhf/recipes/ppo.py", "--out", "x"], "python minirlhf/recipes/ppo.py --out x"),
])
def test_the_command_that_goes_on_can_be_typed(capsys, monkeypatch, argv, command):
    monkeypatch.setattr(sys, "argv", argv)
    assert this_command() == command
    assert told(capsys, lambda d: d.stopped(3)) == [
        "step 3 is saved; go on with", f"  {command} --resume"]
    monkeypatch.setattr(sys, "argv", [*argv, "--resume"])
    assert told(capsys, lambda d: d.stopped(3), quiet=True)[1] == f"  {command} --resume"


def test_a_label_is_one_people_know():
    assert display.label("rewards/accuracies") == "accuracy"
    assert display.label("completions/mean_length") == "tokens"
    assert display.label("reward_std") == "reward std"
