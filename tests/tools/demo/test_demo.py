"""`minirlhf demo`: at a fiftieth of its steps always, in full behind the marker `slow`."""

import json
import re

import pytest

from minirlhf import cli
from minirlhf.errors import STOPPED, UserError
from minirlhf.tools.demo import command, film_data, film_judge, outcome

VERBS = {
    "ppo": ["sft", "sample", "reward", "ppo", "sample", "sample"],
    "grpo": ["sft", "sample", "reward", "grpo", "sample", "sample"],
    "dpo": ["sft", "sample", "dpo", "sample", "sample"],
}
CURVES = {  # columns of the table, curves of the picture
    "ppo": (["step", "learned reward", "gold reward", "KL, nats", "tokens"], 3),
    "grpo": (["step", "learned reward", "gold reward", "KL, nats", "tokens"], 3),
    "dpo": (["step", "accuracy", "margin", "chosen", "rejected"], 3),
}


def run_demo(out, algorithm: str, scale: str) -> None:
    argv = ["demo", "--out", str(out), "--algorithm", algorithm, "--scale", scale]
    assert cli.main(argv) == 0


def summary(text: str) -> dict[str, list[float]]:
    """The last table: gold reward, fluency in percent, different answers."""
    rows = re.findall(r"^(before|after) +(-?[\d.]+) +(\d+)% +(\d+)$", text, re.MULTILINE)
    return {name: [float(value) for value in values] for name, *values in rows}


@pytest.mark.parametrize("algorithm", VERBS)
def test_demo_runs_its_recipes_at_a_fiftieth_of_its_steps(algorithm, tmp_path, capsys):
    demo = tmp_path / "demo"
    run_demo(demo, algorithm, "0.02")
    out = capsys.readouterr().out
    assert re.findall(r"^\$ minirlhf (\S+)", out, re.MULTILINE) == VERBS[algorithm]
    assert re.search(r"held-out accuracy \d\.\d+; the rater's noise allows \d\.\d+", out)
    assert set(summary(out)) == {"before", "after"}
    runs = {"sft", "reward", algorithm} - ({"reward"} if algorithm == "dpo" else set())
    assert {path.parent.parent.name for path in demo.glob("*/model/*.safetensors")} == runs
    columns, lines = CURVES[algorithm]
    curves = outcome.curves_of(demo / algorithm)
    assert list(curves) == columns
    assert re.search("^ *" + " +".join(columns) + "$", out, re.MULTILINE)
    picture = (demo / "curve.svg").read_text(encoding="utf-8")
    assert picture == outcome.picture(algorithm, curves)
    assert picture.count("<polyline") == lines
    assert f"{algorithm.upper()} step" in picture
    rows = (demo / "after.jsonl").read_text(encoding="utf-8").strip().split("\n")
    assert len(rows) == film_data.HELD_OUT
    assert set(json.loads(rows[0])) >= {"prompt", "response", "finish_reason"}
    assert f"minirlhf {algorithm} --help" in out
    assert ("minirlhf score" in out) == (algorithm != "dpo")


def test_gold_curve_is_a_mean_over_the_steps_since_the_line_before(tmp_path, monkeypatch):
    monkeypatch.setattr(film_judge, "gold_score", lambda text: float(len(text)))
    run = tmp_path / "grpo"
    run.mkdir()
    film_data.write_rows(run / "metrics.jsonl", [
        {"step": 2, "reward": 0.5, "objective/kl": 1.0, "completions/mean_length": 7.0},
        {"step": 3, "reward": 1.5, "objective/kl": 2.0, "completions/mean_length": 9.0},
    ])
    film_data.write_rows(run / "samples.jsonl", [
        {"kind": kind, "step": step, "prompt": "a", "response": "b" * n}
        for kind, step, n in [("rollout", 1, 1), ("rollout", 2, 3), ("sample", 2, 99),
                              ("rollout", 3, 5), ("rollout", 3, 9)]
    ])
    assert outcome.curves_of(run) == {
        "step": [2, 3], "learned reward": [0.5, 1.5],
        "gold reward": [3.0, 8.0],  # (2 + 4) / 2 and (6 + 10) / 2 letters
        "KL, nats": [1.0, 2.0], "tokens": [7.0, 9.0],
    }


def test_demo_refuses_a_folder_that_is_there(tmp_path, capsys):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "mine.txt").write_text("mine", encoding="utf-8")
    assert cli.main(["demo", "--out", str(tmp_path / "demo")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["mine.txt"]


def test_demo_ends_with_the_command_that_was_stopped(capsys):
    message = r"^minirlhf test_demo: was stopped: the demo starts anew in"
    with pytest.raises(UserError, match=message) as told:
        command.command("1 of 2", stopped, "--steps", 3)
    assert told.value.code == STOPPED
    assert capsys.readouterr().out == "\n1 of 2\n$ minirlhf test_demo --steps 3\n"


def stopped(argv: list[str]) -> int:
    assert argv == ["--steps", "3"]
    return STOPPED


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", VERBS)
def test_demo_in_full_improves_the_gold_reward_and_stays_fluent(algorithm, tmp_path, capsys):
    run_demo(tmp_path / "demo", algorithm, "1")
    out = capsys.readouterr().out
    accuracy, best = map(float, re.search(r"accuracy (0\.\d+); .* (0\.\d+)", out).groups())
    # A policy orders the pairs less well than a reward model, which need not say likely texts.
    assert accuracy > best - (0.15 if algorithm == "dpo" else 0.1)
    before, after = summary(out)["before"], summary(out)["after"]
    assert after[0] > before[0] + 0.5  # gold reward, in standard deviations of the world's reviews
    assert after[1] > before[1] - 4  # fluency, in percent
    assert after[2] > 0.9 * film_data.HELD_OUT  # different answers


def test_rows_of_texts_with_other_line_ends_are_read_whole(tmp_path):
    rows = [{"response": "a\u2028b\x85c"}, {"response": "d"}]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "rows.jsonl").write_text("".join(lines), encoding="utf-8")
    assert film_data.read_rows(tmp_path / "rows.jsonl") == rows
