"""Every number in the log has a definition, and every definition a number."""

import json
import re
import subprocess
import sys

import pytest

from minirlhf import cli
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.run.glossary import METRICS, definition, translated
from minirlhf.run.language import LANGUAGES
from minirlhf.run.terminal import width
from tests.kill_harness import RECIPES, command, make_world

# What PPO of TRL 1.x logs.
TRL_1 = """
eps objective/kl objective/entropy objective/non_score_reward objective/rlhf_reward
objective/scores policy/approxkl_avg policy/clipfrac_avg policy/entropy_avg loss/policy_avg
loss/value_avg val/clipfrac_avg val/ratio val/ratio_var val/num_eos_tokens lr episode epoch
""".split()


@pytest.fixture(scope="module")
def lines(tmp_path_factory) -> dict[str, list[dict]]:
    """metrics.jsonl of a tiny run of each recipe."""
    folder = tmp_path_factory.mktemp("runs")
    world, found = make_world(tmp_path_factory.mktemp("world")), {}
    for recipe in RECIPES:
        assert cli.main(command(recipe, world, folder / recipe)) == OK
        text = (folder / recipe / "metrics.jsonl").read_text("utf-8")
        found[recipe] = [json.loads(line) for line in text.splitlines()]
    return found


def names(lines: list[dict]) -> dict[str, bool]:
    """Every name in a log, and whether it stands under its clock."""
    flat = {name: False for line in lines for name in line if name != "clock"}
    return flat | {name: True for line in lines for name in line["clock"]}


@pytest.mark.parametrize("recipe", METRICS)
def test_every_number_in_a_log_has_a_definition(recipe, lines):
    for name, clock in names(lines[recipe]).items():
        found = definition(recipe, name)
        assert found is not None, f"{name}: define it in minirlhf/run/glossary.tsv"
        assert found.clock is clock, name


@pytest.mark.parametrize("recipe", METRICS)
def test_every_definition_has_a_number_in_the_log(recipe, lines):
    written = {definition(recipe, name).name for name in names(lines[recipe])}
    never = [m.name for m in METRICS[recipe] if m.when is None and m.name not in written]
    assert never == []


def test_recipes_are_all_defined():
    assert set(METRICS) == set(RECIPES)


@pytest.mark.parametrize("recipe", METRICS)
def test_definitions_are_whole_and_their_names_one_of_a_kind(recipe):
    found = METRICS[recipe]
    assert len({m.name for m in found}) == len(found)
    for m in found:
        assert all((m.unit, m.over, m.reduction, m.meaning)), m.name
        assert "eval" not in m.name or "--eval-data" in m.when


def test_all_18_statistics_of_trl1_keep_their_names():
    assert len(set(TRL_1)) == 18
    assert set(TRL_1) <= {m.name for m in METRICS["ppo"]}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("rewards/style/mean", "rewards/NAME/mean"),
        ("rewards/reward.py:vowels/std", "rewards/NAME/std"),
        ("rewards/judge/format/mean", "rewards/NAME/mean"),
        ("rewards/mean", None),
        ("objective/kl", "objective/kl"),
        ("objective/k1", None),
    ],
)
def test_definition_fits_a_placeholder(name, found):
    got = definition("ppo", name)
    assert (got and got.name) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("eval_accuracy", "eval_accuracy"),
        ("eval_short_accuracy_half", "eval_accuracy_half"),
        ("eval_margin_margin_std", "eval_margin_std"),
        ("eval_a_b_loss", "eval_loss"),
        ("evalx_loss", None),
    ],
)
def test_definition_fits_a_held_out_set_of_any_name(name, found):
    got = definition("reward", name)
    assert (got and got.name) == found


def test_numbers_that_follow_from_others_agree(lines):
    for line in lines["ppo"]:
        if "objective/rlhf_reward" not in line:
            continue  # an evaluation before any step
        assert line["objective/rlhf_reward"] == pytest.approx(
            line["objective/learned_scores"] + line["objective/non_score_reward"], abs=1e-6
        )
        assert line["health/eos_rate"] + line["health/truncated_rate"] == pytest.approx(1)
        assert line["objective/kl_p05"] <= line["objective/kl_p50"] <= line["objective/kl_p95"]
        assert line["objective/kl_k3"] >= 0 <= line["policy/entropy_avg"]
        assert line["reward"] == line["objective/scores"]  # no penalty is set
        parts = ("rollout", "score", "measure", "update")
        total = sum(line["clock"][f"time/{part}"] for part in parts)
        assert total == pytest.approx(line["clock"]["time/step"])
        assert line["clock"]["peak_memory"] > 0.01  # GB: torch alone takes more


# ---- minirlhf metrics ----------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", METRICS)
def test_table_has_a_line_a_metric_in_columns(recipe, capsys):
    assert cli.main(["metrics", "--recipe", recipe]) == OK
    head, *rows = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert head.startswith("metric ") and len(rows) == len(METRICS[recipe])
    place = {word: head.index(word) for word in ("unit", "over", "reduction", "meaning")}
    for row, m in zip(rows, METRICS[recipe], strict=True):
        assert row.startswith(f"{m.name} ")
        for word, text in (("unit", m.unit), ("over", m.over), ("reduction", m.reduction),
                           ("meaning", m.meaning)):
            assert row[place[word] :].startswith(text), (row, word)
        assert ("under clock" in row) is m.clock
        assert m.when is None or f"only with: {m.when}" in row


def test_table_is_told_in_chinese_in_columns_too(capsys):
    assert cli.main(["metrics", "--recipe", "ppo", "--lang", "zh"]) == OK
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["指标", "单位", "对象", "归约", "含义"]
    of_kl = next(line for line in lines if line.startswith("objective/kl "))
    for word, text in (("单位", " 奈特/回复"), ("对象", " 回复")):  # by columns of a terminal
        assert width(of_kl[: of_kl.index(text) + 1]) == width(lines[0][: lines[0].index(word)])


@pytest.mark.parametrize("language", [name for name in LANGUAGES if name != "en"])
@pytest.mark.parametrize("recipe", METRICS)
def test_each_definition_is_translated_whole(recipe, language):
    for metric in METRICS[recipe]:
        told = translated(metric, language)
        assert all(text.strip() for text in told[:5]) and told.name == metric.name
        # settings and numbers that it names stand in both
        names = re.findall(r"[a-z]+_[a-z_]+|-?-?[a-z]+-[a-z]+|[a-z]+/[a-z_]+", metric.meaning)
        english = {"log-prob", "log-probs", "log-ratio", "next-token", "warm-up", "language-model",
                   "held-out"}
        assert all(name in told.meaning for name in names if name not in english), told


def test_json_is_one_object_a_metric(capsys):
    assert cli.main(["metrics", "--recipe", "reward", "--json"]) == OK
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [tuple(row.values()) for row in rows] == [tuple(m) for m in METRICS["reward"]]
    assert rows[0].keys() == set(METRICS["reward"][0]._fields)


def test_metrics_refuses_another_recipe(capsys):
    assert cli.main(["metrics", "--recipe", "dance"]) == BAD_INPUT
    assert f"must be one of {', '.join(METRICS)}" in capsys.readouterr().err


def test_metrics_does_not_wait_for_torch():
    code = "import sys, minirlhf.tools.metrics; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
