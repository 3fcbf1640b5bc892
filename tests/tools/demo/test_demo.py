"""`minirlhf demo`: at a tenth of its steps always, in full behind the marker `slow`."""

import json
import re

import pytest

from minirlhf import cli
from minirlhf.errors import STOPPED, UserError
from minirlhf.tools.demo import command


def run_demo(out, scale: str) -> None:
    assert cli.main(["demo", "--out", str(out), "--scale", scale]) == 0


def summary(text: str) -> dict[str, list[float]]:
    """The last table: gold reward, fluency in percent, different answers."""
    rows = re.findall(r"^(before|after) +(-?[\d.]+) +(\d+)% +(\d+)$", text, re.MULTILINE)
    return {name: [float(value) for value in values] for name, *values in rows}


def test_demo_runs_the_three_recipes_at_a_tenth_of_its_steps(tmp_path, capsys):
    run_demo(tmp_path / "demo", "0.1")
    out = capsys.readouterr().out
    for verb in ("sft", "sample", "reward", "ppo"):
        assert f"$ minirlhf {verb} " in out
    assert re.search(r"held-out accuracy 0\.\d+; the rater's noise allows 0\.\d+", out)
    assert set(summary(out)) == {"before", "after"}
    for run in ("sft", "reward", "ppo"):
        assert (tmp_path / "demo" / run / "model" / "model.safetensors").exists()
    picture = (tmp_path / "demo" / "curve.svg").read_text(encoding="utf-8")
    assert picture == command.picture(command.progress(tmp_path / "demo" / "ppo"))
    assert picture.count("<polyline") == 3  # learned and gold reward; KL
    rows = (tmp_path / "demo" / "after.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == command.HELD_OUT
    assert set(json.loads(rows[0])) >= {"prompt", "response", "finish_reason"}


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
def test_demo_in_full_improves_the_gold_reward_and_stays_fluent(tmp_path, capsys):
    run_demo(tmp_path / "demo", "1")
    out = capsys.readouterr().out
    accuracy, best = map(float, re.search(r"accuracy (0\.\d+); .* (0\.\d+)", out).groups())
    assert accuracy > best - 0.1
    before, after = summary(out)["before"], summary(out)["after"]
    assert after[0] > before[0] + 0.5  # gold reward, in standard deviations of the world's reviews
    assert after[1] > before[1] - 4  # fluency, in percent
    assert after[2] > 0.9 * command.HELD_OUT  # different answers
