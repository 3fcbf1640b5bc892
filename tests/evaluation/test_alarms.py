"""Alarms: each just below its threshold and just above, told once, and the same after a resume."""

import copy
import json
import re
import shutil
from dataclasses import fields

import pytest

from minirlhf import cli
from minirlhf.errors import OK
from minirlhf.evaluation.alarms import (
    DPO_RULES,
    FIRST,
    LAST,
    RULES,
    Alarm,
    alarms_told,
    check_alarms,
)
from minirlhf.run.glossary import definition
from minirlhf.run.language import LANGUAGES
from minirlhf.setup.dpo_settings import DPOConfig
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.ppo_settings import PPOConfig
from tests.kill_harness import command, make_world

WELL = {
    "objective/kl": 0.05, "policy/approxkl_avg": 0.01, "policy/clipfrac_avg": 0.1,
    "val/clipfrac_avg": 0.1, "health/explained_variance": 0.5, "policy/entropy_avg": 2.0,
    "health/eos_rate": 0.9, "response_length": 20.0, "objective/scores": 0.5,
    "objective/scores_std": 1.0, "grad_norm": 1.0, "health/dup_rate": 0.0,
}
KL, CLIP, VALUE = "objective/kl", "policy/clipfrac_avg", "val/clipfrac_avg"
EV, ENTROPY, EOS = "health/explained_variance", "policy/entropy_avg", "health/eos_rate"
APPROX, NORM, DUP = "policy/approxkl_avg", "grad_norm", "health/dup_rate"
LENGTH, SCORE, STD = "response_length", "objective/scores", "objective/learned_scores_std"
REGION, CUT, FLAT = "clip_ratio/region_mean", "completions/clipped_ratio", "frac_reward_zero_std"


def steps_of(series: dict[str, list[float]]) -> list[dict[str, float]]:
    """Metrics of each step: well, but for what the series say."""
    count = len(next(iter(series.values())))
    return [WELL | {name: values[i] for name, values in series.items()} for i in range(count)]


def told(steps: list[dict[str, float]]) -> list[Alarm]:
    """All alarms of a run that is saved and resumed after each step."""
    history, alarms = {}, []
    for number, metrics in enumerate(steps, 1):
        before = copy.deepcopy(history)
        new, after = check_alarms(history, number, metrics)
        assert history == before  # a pure function
        history = json.loads(json.dumps(after))
        alarms += new
    return alarms


def swinging(centre: float) -> list[float]:
    """10 values, 1 above and below: sample deviation sqrt(10 / 9), standard error 1/3."""
    return 5 * [centre + 1, centre - 1]


def lengths_and_scores(scored: int, last: float = 40.0) -> dict[str, list[float]]:
    """15 short and 5 long texts; the long ones and `scored` of the short ones have score 1."""
    return {LENGTH: 15 * [20.0] + 5 * [last], SCORE: (15 - scored) * [0.0] + (scored + 5) * [1.0]}


def renamed(series: dict[str, list[float]]) -> dict[str, list[float]]:
    return {"completions/mean_length": series[LENGTH], "reward": series[SCORE]}


# alarm, a series that is just not alarming, one that is, and the step at which that is told
CASES = [
    ("kl_at_start", {KL: [0.1, 9.0]}, {KL: [0.1001, 0.0]}, 1),
    ("kl_at_start", {KL: [-0.1]}, {KL: [-0.1001]}, 1),
    # 4 standard errors are 4/3
    ("negative_kl", {KL: swinging(-1.33)}, {KL: swinging(-1.34)}, 10),
    ("negative_kl", {KL: 9 * [-5.0]}, {KL: 10 * [-5.0]}, 10),
    ("negative_kl", {KL: 10 * [0.0]}, {KL: 10 * [-0.001]}, 10),
    ("large_update", {APPROX: 5 * [0.1]}, {APPROX: 4 * [0.1] + [0.101]}, 5),
    ("large_update", {APPROX: 4 * [9.0]}, {APPROX: [*4 * [9.0], 0.0]}, 5),
    ("clipped_policy", {CLIP: 5 * [0.3]}, {CLIP: 4 * [0.3] + [0.301]}, 5),
    ("clipped_value", {VALUE: 5 * [0.5]}, {VALUE: 4 * [0.5] + [0.501]}, 5),
    ("useless_critic", {EV: 20 * [0.0]}, {EV: 14 * [-1.0] + [-0.001]}, 15),
    ("useless_critic", {EV: 14 * [-1.0]}, {EV: 14 * [0.0] + [-0.001]}, 15),
    # a fifth of 2, half of 0.9
    ("entropy_collapse", {ENTROPY: 5 * [2.0] + 9 * [0.4]},
     {ENTROPY: 5 * [2.0] + 4 * [0.4] + [0.399]}, 10),
    ("endless_responses", {EOS: 5 * [0.9] + 9 * [0.45]}, {EOS: 5 * [0.9] + 4 * [0.45] + [0.449]},
     10),
    ("endless_responses", {EOS: 10 * [0.0]}, {EOS: 5 * [0.9] + 5 * [0.0]}, 8),  # (1.8 + 0) / 5
    # phi of the two-by-two table: 70 / sqrt(75 · 6 · 14) = 0.88, 65 / sqrt(75 · 7 · 13) = 0.79
    ("length_drift", lengths_and_scores(2), lengths_and_scores(1), 20),
    ("length_drift", lengths_and_scores(0, last=25.0), lengths_and_scores(0, last=25.1), 20),
    ("equal_scores", {STD: [0.0, 0.0, 1e-9, 0.0, 0.0]}, {STD: [1.0, 0.0, 0.0, 0.0]}, 4),
    ("gradient_spike", {NORM: 10 * [1.0] + [10.0]}, {NORM: 10 * [1.0] + [10.01]}, 11),
    ("gradient_spike", {NORM: 12 * [0.0] + [1.0]}, {NORM: 12 * [0.0] + 13 * [1.0] + [99.0]}, 26),
    ("gradient_spike", {NORM: 9 * [1.0] + [99.0]}, {NORM: 4 * [0.0] + 7 * [1.0] + [99.0]}, 12),
    # what GRPO logs instead
    ("clipped_policy", {REGION: 5 * [0.3]}, {REGION: 4 * [0.3] + [0.301]}, 5),
    ("entropy_collapse", {"entropy": 5 * [2.0] + 9 * [0.4]},
     {"entropy": 5 * [2.0] + 4 * [0.4] + [0.399]}, 10),
    # above 0.5, and above twice the start's
    ("endless_responses", {CUT: 5 * [0.1] + 9 * [0.5]}, {CUT: 5 * [0.1] + 4 * [0.5] + [0.501]}, 10),
    ("endless_responses", {CUT: 5 * [0.4] + 9 * [0.8]}, {CUT: 5 * [0.4] + 4 * [0.8] + [0.801]}, 10),
    ("length_drift", renamed(lengths_and_scores(2)), renamed(lengths_and_scores(1)), 20),
    ("equal_groups", {FLAT: 5 * [0.8]}, {FLAT: 4 * [0.8] + [0.801]}, 5),
    ("repeated_responses", {DUP: 3 * [0.5]}, {DUP: [0.0, 0.5, 0.5, 0.501]}, 4),
]


@pytest.mark.parametrize(("name", "well", "ill", "step"), CASES)
def test_alarm_is_told_from_its_threshold_on_and_once(name, well, ill, step):
    assert name not in [alarm.name for alarm in told(steps_of(well))]
    steps = steps_of(ill)
    found = [alarm.step for alarm in told(steps + 30 * steps[-1:]) if alarm.name == name]
    assert found == [step]


def test_every_alarm_is_tried():
    assert {name for name, *_ in CASES} == {rule.name for rule in RULES}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("name", "series"), [(name, ill) for name, _, ill, _ in CASES])
def test_a_saved_state_tells_its_alarms_again(name, series, language):
    history, alarms = {}, []  # of these metrics alone: PPO and GRPO log others of one name
    for number, values in enumerate(zip(*series.values(), strict=True), 1):
        new, history = check_alarms(history, number, dict(zip(series, values, strict=True)))
        alarms += new
    again = alarms_told(json.loads(json.dumps(history)))
    assert sorted(map(str, again)) == sorted(map(str, alarms))
    assert [alarm.step for alarm in again] == sorted(alarm.step for alarm in alarms)
    (alarm,) = (alarm for alarm in again if alarm.name == name)
    told = alarm.told(language)
    assert all(metric in told for metric in alarm.rule.metrics[:1] if "{m}" in alarm.rule.seen)
    assert "{" not in told


def test_alarms_of_older_states_are_told_without_their_numbers():
    (alarm,) = alarms_told({CLIP: [0.4], "told clipped_policy": [5]})
    assert alarm.step == 5 and alarm.text == alarm.rule.advice


def test_all_is_quiet_where_all_is_well():
    assert told(100 * [WELL]) == []


def test_alarm_says_what_was_seen_its_cause_and_what_to_change():
    (alarm,) = told(steps_of({CLIP: 5 * [0.4]}))
    assert str(alarm) == (
        "alarm at step 5: clipped_policy: policy/clipfrac_avg is 0.40 on average over 5 steps: "
        "updates run into the clip: lower learning_rate, epochs or mini_batches"
    )


@pytest.mark.parametrize("rule", RULES, ids=[rule.name for rule in RULES])
def test_rules_look_at_metrics_and_name_settings_that_there_are(rule):
    metric = r"[a-z]+/[a-z_]+"
    names = [*rule.metrics, *re.findall(metric, rule.advice)]
    config = {"ppo": PPOConfig, "grpo": GRPOConfig}
    recipes = [recipe for recipe in config if all(definition(recipe, name) for name in names)]
    assert recipes  # that log all of them
    settings = {field.name for recipe in recipes[:1] for field in fields(config[recipe])}
    words = set(re.findall(r"[a-z_]+", re.sub(metric, "", rule.advice).replace("--", "")))
    assert words & settings
    assert {word for word in words if "_" in word} <= settings


C, R, M = "rewards/chosen", "rewards/rejected", "rewards/margins"


@pytest.mark.parametrize(
    ("chosen", "rejected", "at"),
    [
        (5 * [-0.1], 5 * [-0.3], 5),
        ([0.0, 0.7, *5 * [-0.2]], [0.0, *6 * [-0.4]], 6),  # the mean is below 0 from step 6 on
        (9 * [-0.009], 9 * [-0.3], None),  # by too little
        (9 * [0.1], 9 * [-0.3], None),  # chosen rises
        (9 * [-0.1], 9 * [0.1], None),  # the margin is below 0
        (4 * [-0.1], 4 * [-0.3], None),  # too few
        (9 * [0.0], 9 * [0.0], None),
    ],
)
def test_a_dpo_run_notes_once_that_both_responses_became_less_likely(chosen, rejected, at):
    history, found = {}, []
    for number, (c, r) in enumerate(zip(chosen, rejected, strict=True), 1):
        notes, history = check_alarms(history, number, {C: c, R: r, M: c - r}, DPO_RULES)
        history = json.loads(json.dumps(history))
        found += notes
    assert [note.step for note in found] == ([] if at is None else [at])
    settings = {field.name for field in fields(DPOConfig)}
    for note in found:
        assert str(note).startswith(f"note at step {at}: both_fall: rewards/chosen and ")
        assert {"sft_coef", "beta"} <= set(re.findall(r"[a-z_]+", note.text)) & settings


def test_history_stays_small_and_keeps_the_first_values():
    history = {}
    for step in range(1, 101):
        _, history = check_alarms(history, step, WELL | {NORM: float(step)})
    assert history[f"first {NORM}"] == [1, 2, 3, 4, 5] and FIRST == 5
    assert history[NORM] == list(range(81, 101)) and LAST == 20
    assert history["steps"] == [100]
    assert max(map(len, history.values())) == LAST


def test_rules_without_their_metrics_are_not_asked():
    alarms, history = check_alarms({}, 1, {"loss": 1.0})
    assert (alarms, history) == ([], {"steps": [1]})
    alarms, history = check_alarms(history, 2, {LENGTH: 3.0})  # half of what length_drift looks at
    assert alarms == [] and history[LENGTH] == [3.0]


def test_a_run_tells_its_alarm_and_so_does_a_resumed_one(tmp_path, capsys):
    world, out = make_world(tmp_path), tmp_path / "run"
    same = "def letters(completions):\n    return [1.0 for _ in completions]\n"
    (world / "reward.py").write_text(same, encoding="utf-8")
    argv = command("ppo", world, out, keep=4)
    assert cli.main(argv) == OK
    alarms = [line for line in capsys.readouterr().out.splitlines() if "alarm at" in line]
    expected = "alarm at step 3: equal_scores: what is learned from has been the same"
    assert len(alarms) == 1 and alarms[0].startswith(expected)

    for step, again in ((3, []), (2, alarms)):  # after it was told, and before
        shutil.rmtree(out / "model")
        for late in out.glob("checkpoints/step-*"):
            if int(late.name[5:]) > step:
                shutil.rmtree(late)
        assert cli.main([*argv, "--resume"]) == OK
        said = capsys.readouterr().out.splitlines()
        assert [line for line in said if "alarm at" in line] == again
