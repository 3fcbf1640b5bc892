"""`--rollout-bits 8`: responses drawn from a copy in int8, and the policy loss weighed for it."""

import json
import math

import pytest
import torch
from torch import nan

from minirlhf.batches.credit import assign_credit, assign_group_credit
from minirlhf.cli import main
from minirlhf.errors import BAD_INPUT, OK
from minirlhf.evaluation.rollout import weight_statistics
from minirlhf.models.int8 import Int8LM
from minirlhf.run.glossary import definition
from minirlhf.setup.policy import check_sampler, sampler_of
from tests.kill_harness import command, make_world
from tests.recipes.test_grpo import config_of as grpo_config
from tests.recipes.test_grpo import run_steps as run_grpo
from tests.tiny_folders import rebuilt_at_each_step
from tests.tiny_ppo import (
    assert_rows,
    config_of,
    f64,
    hand_buffer,
    hand_config,
    parameters,
    run_steps,
    state_of,
    steps_from,
    tiny_lm,
    tiny_policy,
)

RATIO = "sampling/importance_sampling_ratio"
SAMPLED = torch.tensor(  # ratios 1.5, 4 and 0.5 of the hand buffer's old log-probs -1, -2 and -0.5
    [[-1 - math.log(1.5), -2 - math.log(4)], [-0.5 + math.log(2), nan]], dtype=f64
)


def sampled_buffer():
    buffer = hand_buffer()
    buffer.map(lambda micro: micro._replace(sampled_logprobs=SAMPLED[micro.rows]))
    return buffer


def test_credit_weighs_advantages_by_hand():
    # 0.125, 0.7 and -1.12 as in `test_assign_credit_by_hand`, times 1.5, 4 cut to 3, and 0.5
    buffer = sampled_buffer()
    assign_credit(buffer, hand_config(rollout_bits=8, rollout_weight_cap=3.0), kl_coef=0.1)
    assert_rows(buffer, "advantages", [[0.1875, 2.1], [-0.56]])
    assert_rows(buffer, "returns", [[0.325, 1.1], [-1.02]])  # the critic's targets are not
    found = weight_statistics(buffer)
    assert found[f"{RATIO}/mean"] == pytest.approx((1.5 + 3 + 0.5) / 3, abs=1e-6)
    assert found[f"{RATIO}/truncated"] == pytest.approx(1 / 3, abs=1e-6)
    assert weight_statistics(hand_buffer()) == {}


def test_group_credit_weighs_advantages_by_hand():
    # of scores 3 and 1 each is 2 off the other
    buffer, scores = sampled_buffer(), torch.tensor([3.0, 1.0], dtype=f64)
    config = grpo_config(samples_per_prompt=2, advantage="rloo", kl_coef=0.0, rollout_bits=8)
    assign_group_credit(buffer, scores, config)
    assert_rows(buffer, "advantages", [[3, 4], [-1]])  # 4 is cut to the default of 2


def test_a_policy_sampled_in_bytes_keeps_its_invariants_and_learns_as_well():
    runs = {}
    for bits in (0, 8):
        config = config_of(rollout_bits=bits, steps=12, batch_size=16, kl_coef=0.0)
        steps, _ = run_steps(config)  # the first ratio is 1 and the first KL 0, or it stops
        runs[bits] = [step.metrics for step in steps]
    scores = {b: [m["objective/scores"] for m in metrics] for b, metrics in runs.items()}
    gains = {b: sum(found[-3:]) / 3 - sum(found[:3]) / 3 for b, found in scores.items()}
    assert gains[0] > 0.5 and gains[8] > 0.8 * gains[0]
    assert f"{RATIO}/mean" not in runs[0][0]
    for metrics in runs[8]:
        assert abs(metrics[f"{RATIO}/mean"] - 1) < 0.05
        assert 1e-6 < metrics["health/logprobs_diff"] < 0.5
        assert 0 <= metrics[f"{RATIO}/truncated"] <= 0.01


def test_a_state_that_samples_in_bytes_goes_on_bit_for_bit(tmp_path):
    config = config_of(rollout_bits=8)
    _, whole = run_steps(config)
    _, rebuilt = rebuilt_at_each_step(
        lambda: state_of(tiny_policy(), config), lambda state: steps_from(state, config), tmp_path
    )
    assert torch.equal(parameters(whole.model), parameters(rebuilt.model))


@pytest.mark.parametrize("single", [False, True])
def test_grpo_samples_in_bytes_too(single):
    settings = {"epochs": 1, "mini_batches": 1, "kl_coef": 0.0} if single else {}
    plain, exact = run_grpo(grpo_config(**settings))
    steps, state = run_grpo(grpo_config(rollout_bits=8, **settings))
    assert not torch.equal(parameters(state.model), parameters(exact.model))
    assert all(abs(step.metrics[f"{RATIO}/mean"] - 1) < 0.05 for step in steps)
    assert not any(f"{RATIO}/mean" in step.metrics for step in plain)


def test_the_sampler_is_the_policy_unless_it_is_asked_for_in_bytes():
    lm = tiny_lm()
    assert sampler_of(lm, config_of()) is lm
    assert isinstance(sampler_of(lm, config_of(rollout_bits=8)), Int8LM)


def test_int8_on_a_gpu_is_refused():
    check_sampler(config_of(), "cuda")
    check_sampler(config_of(rollout_bits=8), "cpu")
    with pytest.raises(Exception, match="--rollout-bits: is 8, and the device is cuda"):
        check_sampler(config_of(rollout_bits=8), "cuda")


@pytest.mark.parametrize("recipe", ["ppo", "grpo"])
def test_the_command_line_logs_weights_that_are_defined(recipe, tmp_path, capsys):
    world, out = make_world(tmp_path / "world"), tmp_path / "out"
    argv = command(recipe, world, out, rollout_bits=8, lora_rank=2, trunk_bits=4, log_every=1)
    assert main(argv) == OK
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any(f"{RATIO}/mean" in line for line in lines)
    for name in (f"{RATIO}/mean", f"{RATIO}/truncated"):
        assert definition(recipe, name).when == "--rollout-bits"
    assert main([*argv, "--resume", "--rollout-weight-cap", "0.5"]) == BAD_INPUT
    assert "--rollout-weight-cap: got 0.5, must be" in capsys.readouterr().err
