"""GRPO and its relatives: by hand, against another derivation, at the edges, and rebuilt."""

import json
import math
import re
from math import log
from pathlib import Path

import pytest
import torch
from torch import nan, nn

from minirlhf import streams
from minirlhf.batches.collect import sample
from minirlhf.batches.credit import assign_group_credit
from minirlhf.batches.rollouts import RolloutBuffer, TokenPass, measure_lm
from minirlhf.equations.critic_free import sequence_surrogate
from minirlhf.equations.policy import Surrogate, clipped_surrogate
from minirlhf.errors import BUG, NON_FINITE, UserError
from minirlhf.models.lora import add_lora, base_of
from minirlhf.recipes import grpo as recipe
from minirlhf.rewards.source import Scores
from minirlhf.run import flags
from minirlhf.run.checkpoint import TrainState
from minirlhf.run.optim import make_optimizer
from minirlhf.run.settings import validate
from minirlhf.setup.grpo_settings import GRPOConfig
from minirlhf.setup.policy import sampling_of
from tests.tiny_folders import rebuilt_at_each_step
from tests.tiny_ppo import (
    PROMPTS,
    Letters,
    assert_close,
    assert_rows,
    f64,
    hand_buffer,
    letter_d,
    parameters,
    tiny_lm,
)

T, F = True, False


def config_of(**settings) -> GRPOConfig:
    values = {
        "model": "m", "data": "d", "reward": ("r",), "out": "o", "batch_size": 2,
        "samples_per_prompt": 4, "micro_batch_size": 2, "mini_batches": 2, "max_new_tokens": 6,
        "steps": 4, "learning_rate": 1e-2,
    }
    return GRPOConfig(**{**values, **settings})


def state_of(lm: nn.Module, config: GRPOConfig) -> TrainState:
    return TrainState(lm, make_optimizer(lm, config.learning_rate))


def steps_from(state, config, reward=letter_d, ref="its own", **more):
    if ref == "its own":
        ref = tiny_lm(next(state.model.parameters()).dtype)
    return recipe.grpo(state, PROMPTS, reward, ref, Letters(), config, **more)


def run_steps(config, reward=letter_d, lm=None, **more):
    """Steps of a whole run, and its state at the end."""
    state = state_of(lm or tiny_lm(), config)
    return list(steps_from(state, config, reward, **more)), state


# ---- two rows by hand ----------------------------------------------------------------------------


class Table(nn.Module):
    """A policy whose log-probs are its parameters, one a cell."""

    def __init__(self, logprobs, entropy):
        super().__init__()
        self.logprobs = nn.Parameter(torch.tensor(logprobs, dtype=f64))
        self.entropy = torch.tensor(entropy, dtype=f64)


def table_pass(policy, micro, temperature) -> TokenPass:
    width = micro.response_mask.shape[1]
    return TokenPass(policy.logprobs[micro.rows, :width], policy.entropy[micro.rows, :width])


def moved_table() -> Table:
    """Ratios 1.5, 0.5 and 0.5 to the rollout of `hand_buffer`, of a row of two tokens and one of
    one."""
    logprobs = [[-1 + log(1.5), -2 + log(0.5)], [-0.5 + log(0.5), 0.0]]
    return Table(logprobs, [[1.0, 2.0], [3.0, nan]])


def credited(advantages=((1.0, 2.0), (-1.0, nan)), micro_batch_size=2) -> RolloutBuffer:
    buffer = hand_buffer(micro_batch_size)
    given = torch.tensor(advantages, dtype=f64)
    buffer.map(lambda m: m._replace(advantages=given[m.rows, : m.response_mask.shape[1]]))
    return buffer


def hand_step(monkeypatch, buffer, policy=None, **settings):
    """(minus the gradient, stats) of one step of a table, at a rate of 1."""
    plain = {"batch_size": 1, "samples_per_prompt": 2, "mini_batches": 1, "max_grad_norm": None,
             "kl_coef": 0.0}
    policy = policy or moved_table()
    before = policy.logprobs.detach().clone()
    monkeypatch.setattr(recipe, "lm_pass", table_pass)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    stats = recipe.grpo_step(policy, optimizer, buffer, config_of(**{**plain, **settings}))
    return policy.logprobs.detach() - before, stats


# The gradient of each token's loss: A = 1 at ratio 1.5 is clipped; 2 at 0.5: -2 · 0.5; -1 at 0.5 is
# clipped. The losses: -1.2, -1 and 0.8.
@pytest.mark.parametrize(
    ("mean", "weight", "loss"),
    [
        ("token", 1 / 3, (-1.2 - 1 + 0.8) / 3),
        ("sequence", 1 / 2 / 2, ((-1.2 - 1) / 2 + 0.8) / 2),  # of two tokens, of two rows
        ("fixed", 1 / 2 / 6, (-1.2 - 1 + 0.8) / 2 / 6),  # of two rows and max_new_tokens
    ],
)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_grpo_step_by_hand(mean, weight, loss, micro_batch_size, monkeypatch):
    buffer = credited(micro_batch_size=micro_batch_size)
    moved, stats = hand_step(monkeypatch, buffer, loss_mean=mean)
    assert_close(moved, torch.tensor([[0.0, weight], [0.0, 0.0]], dtype=f64))
    expected = {
        "loss": loss, "policy_loss": -1.4 / 3, "kl_loss": 0, "entropy": 2.0,
        "approxkl": (log(1.5) ** 2 + 2 * log(0.5) ** 2) / 2 / 3, "clipfrac": 2 / 3,
        "clip_low": 1 / 3, "clip_high": 1 / 3, "clip_low_min": 1 / 3, "clip_high_max": 1 / 3,
        "ratio": 2.5 / 3, "ratio_var": 2.75 / 3 - (2.5 / 3) ** 2, "first_ratio_gap": 0.5,
        "grad_norm": weight, "epochs": 1,
    }
    assert stats._asdict() == pytest.approx(expected, abs=1e-7)


def test_clip_shares_are_those_of_each_update_and_of_all(monkeypatch):
    # two mini-batches, of two tokens and of one: clipped high 1/2 and 0, low 0 and 1
    _, stats = hand_step(monkeypatch, credited(micro_batch_size=1), mini_batches=2,
                         micro_batch_size=1, policy_loss="clip")
    shares = stats.clip_high, stats.clip_high_max, stats.clip_low, stats.clip_low_min
    assert shares == pytest.approx((1 / 3, 1 / 2, 1 / 3, 0))


def test_gspo_step_by_hand(monkeypatch):
    # ratios sqrt(1.5 · 0.5) = 0.8660 and 0.5, A = 2 and -1: -2 · 0.8660, free; 0.8, clipped
    buffer = credited(((2.0, 2.0), (-1.0, nan)))
    moved, stats = hand_step(monkeypatch, buffer, policy_loss="gspo", loss_mean="sequence")
    s = 0.75**0.5
    assert_close(moved, torch.tensor([[2 * s / 2 / 2] * 2, [0.0, 0.0]], dtype=f64))
    assert stats.loss == pytest.approx((-2 * s + 0.8) / 2)
    assert (stats.clip_low, stats.clip_high) == pytest.approx((1 / 3, 0))


def test_cispo_step_by_hand(monkeypatch):
    # weights 1.2, 0.8 and 0.8, none without a gradient: w · A a token
    moved, _ = hand_step(monkeypatch, credited(), policy_loss="cispo")
    assert_close(moved, torch.tensor([[1.2 / 3, 1.6 / 3], [-0.8 / 3, 0.0]], dtype=f64))


@pytest.mark.parametrize(
    ("estimator", "gradient", "loss"),
    [
        # d = log-prob - ref: log 1.5 + 0.5, log 0.5 - 1 and log 0.5 + 0.2; the gradient of k2 is d,
        # that of k3 1 - e^-d
        ("k2", lambda d: d, lambda d: d**2 / 2),
        ("k3", lambda d: 1 - math.exp(-d), lambda d: math.exp(-d) - 1 + d),
    ],
)
def test_kl_in_the_loss_by_hand(estimator, gradient, loss, monkeypatch):
    buffer = credited(((0.0, 0.0), (0.0, nan)))
    moved, stats = hand_step(monkeypatch, buffer, kl_coef=0.1, kl_estimator=estimator)
    d = log(1.5) + 0.5, log(0.5) - 1, log(0.5) + 0.2
    grads = [-0.1 * gradient(x) / 3 for x in d]
    assert_close(moved, torch.tensor([grads[:2], [grads[2], 0.0]], dtype=f64))
    assert stats.kl_loss == pytest.approx(0.1 * sum(map(loss, d)) / 3)
    assert stats.loss == pytest.approx(stats.kl_loss)


def test_kl_in_the_reward_is_no_part_of_the_loss(monkeypatch):
    buffer = credited(((0.0, 0.0), (0.0, nan)))
    settings = {"kl_in": "reward", "kl_estimator": "k1", "kl_coef": 0.1}
    moved, stats = hand_step(monkeypatch, buffer, **settings)
    assert not moved.any() and stats.loss == stats.kl_loss == 0


def test_entropy_bonus_by_hand(monkeypatch):
    _, stats = hand_step(monkeypatch, credited(), entropy_coef=0.5)
    assert stats.loss == pytest.approx(-1.4 / 3 - 0.5 * 2)  # entropies 1, 2 and 3


def test_dual_clip_by_hand(monkeypatch):
    # -1 at ratio 1.5: 1.5, bounded at 1.4, where it has no gradient
    for clip, loss, gradient in ((None, 1.5, -1.5), (1.4, 1.4, 0.0)):
        buffer = credited(((-1.0, 2.0), (-1.0, nan)))
        moved, stats = hand_step(monkeypatch, buffer, dual_clip=clip)
        assert stats.policy_loss == pytest.approx((loss - 1 + 0.8) / 3)
        assert stats.clip_high == (0 if clip is None else pytest.approx(1 / 3))
        assert_close(moved[0], torch.tensor([gradient / 3, 1 / 3], dtype=f64))


@pytest.mark.parametrize(("limit", "made"), [(0.84, True), (0.83, False)])
def test_max_ratio_leaves_an_update_out_and_counts_it(limit, made, monkeypatch):
    # the mean ratio is 2.5 / 3 = 0.8333; a limit below 1 is for the hand alone
    config = config_of(batch_size=1, samples_per_prompt=2, mini_batches=1, kl_coef=0.0)
    object.__setattr__(config, "max_ratio", limit)
    policy, counters = moved_table(), {}
    before = policy.logprobs.detach().clone()
    monkeypatch.setattr(recipe, "lm_pass", table_pass)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    recipe.grpo_step(policy, optimizer, credited(), config, counters=counters)
    assert torch.equal(policy.logprobs.detach(), before) != made
    assert counters == ({} if made else {"skipped_ratio": 1})


def test_early_stop_leaves_out_the_epochs_after_a_far_one(monkeypatch):
    # k3 of 1.5, 0.5 and 0.5: (0.0945 + 2 · 0.1931) / 3 = 0.16
    for limit, epochs in ((0.15, 1), (0.17, 3)):
        policy = moved_table()
        _, stats = hand_step(monkeypatch, credited(((0.0, 0.0), (0.0, nan))), policy, epochs=3,
                             early_stop_kl=limit)
        assert stats.epochs == epochs


def test_grpo_step_refuses_a_loss_that_is_not_finite_before_it_is_applied(monkeypatch):
    policy, before = moved_table(), parameters(moved_table())
    with pytest.raises(UserError, match=r"step 1 \(rollout rows 1, 0\): loss: is nan") as caught:
        hand_step(monkeypatch, credited(((nan, 1.0), (1.0, 1.0))), policy)
    assert caught.value.code == NON_FINITE
    assert torch.equal(parameters(policy), before)


# ---- credit --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        # scores 3 and 1: mean 2, sample std sqrt(2)
        ({"advantage": "grpo"}, [[1 / (2**0.5 + 1e-4)] * 2, [-1 / (2**0.5 + 1e-4)]]),
        ({"advantage": "dr_grpo"}, [[1, 1], [-1]]),
        ({"advantage": "rloo"}, [[2, 2], [-2]]),
        # a KL of 0.5 - 1 and of 0.2 nats at 2 a nat: 4 and 0.6
        ({"advantage": "rloo", "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 2.0},
         [[3.4, 3.4], [-3.4]]),
        ({"advantage": "rloo", "kl_in": "reward", "kl_coef": 0.0}, [[2, 2], [-2]]),
        # rewards to go 3, 3 and 1: mean 7/3, variance 8/9
        ({"advantage": "reinforce++"},
         [[2 / 3 / (8 / 9) ** 0.5] * 2, [-4 / 3 / (8 / 9) ** 0.5]]),
        # rewards -1, 3 + 2 and 1 - 0.4: to go 4, 5 and 0.6; mean 3.2, variance 3.546667
        ({"advantage": "reinforce++", "kl_in": "reward", "kl_estimator": "k1", "kl_coef": 2.0},
         [[0.8 / 3.546667**0.5, 1.8 / 3.546667**0.5], [-2.6 / 3.546667**0.5]]),
    ],
)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_assign_group_credit_by_hand(settings, expected, micro_batch_size):
    buffer, scores = hand_buffer(micro_batch_size), torch.tensor([3.0, 1.0], dtype=f64)
    buffer.map(lambda m: m._replace(scores=scores[m.rows]))
    assign_group_credit(buffer, scores, config_of(samples_per_prompt=2, **settings))
    assert_rows(buffer, "advantages", expected)
    for micro in buffer.micro_batches:
        assert (micro.advantages[~micro.response_mask] == 0).all()


def test_rewards_of_single_tokens_are_summed_or_reach_their_tokens():
    given = torch.tensor([[1.0, 2.0], [1.0, nan]], dtype=f64)
    buffer, zero = hand_buffer(), torch.zeros(2, dtype=f64)
    buffer.map(lambda m: m._replace(scores=zero[m.rows], given_rewards=given[m.rows]))
    assign_group_credit(buffer, zero, config_of(advantage="reinforce++"))
    # to go 3, 2 and 1: mean 2, variance 2/3
    assert_rows(buffer, "advantages", [[1.5**0.5, 0], [-(1.5**0.5)]])


# ---- a real model --------------------------------------------------------------------------------


def measured(lm, rows=2, ref=None, refers=True, **settings) -> RolloutBuffer:
    """A sampled and measured rollout of two groups of three, with advantages."""
    config = config_of(samples_per_prompt=3, **settings)
    prompts = [prompt for prompt in PROMPTS[1:3] for _ in range(3)]
    keys = streams.key(0, "test", torch.arange(6))
    _, rollout = sample(tiny_lm(f64), prompts, keys, sampling_of(config), Letters(), 6)
    assert len(set(rollout.response_lengths.tolist())) > 1
    buffer = RolloutBuffer(rows, 99)
    scores = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0, 0.0])
    buffer.add(rollout._replace(scores=scores))
    measure_lm(lm, (ref or tiny_lm(f64)) if refers else None, buffer, config.temperature)
    assign_group_credit(buffer, scores, config)
    return buffer


def plain_step(buffer, lm, **settings):
    """(minus the gradient, stats) of one step of gradient descent with rate 1."""
    settings = {"samples_per_prompt": 3, "mini_batches": 1, "max_grad_norm": None, **settings}
    before, optimizer = parameters(lm), torch.optim.SGD(lm.parameters(), lr=1.0)
    stats = recipe.grpo_step(lm, optimizer, buffer, config_of(**settings))
    return parameters(lm) - before, stats


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_first_ratio_is_exactly_one(loss, dtype):
    lm = tiny_lm(dtype)
    _, stats = plain_step(measured(lm, ref=tiny_lm(dtype)), lm, policy_loss=loss)
    assert (stats.first_ratio_gap, stats.ratio, stats.ratio_var, stats.clipfrac) == (0, 1, 0, 0)
    assert stats.kl_loss == 0


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("mean", ["token", "sequence", "fixed"])
def test_first_gradient_is_reinforce_with_each_mean(loss, mean):
    """Another derivation: row by row without padding, log-softmax of all logits, plain loops."""
    lm, settings = tiny_lm(f64), {"advantage": "rloo", "temperature": 0.7}
    buffer = measured(lm, rows=5, **settings)
    advantages = torch.tensor([1 + 0.75, -2 - 0.75, 0.5 + 0.5, 3.0, -1.5, -1.5])
    tokens = len(buffer.flat("old_logprobs"))
    total = 0.0
    for micro in buffer.micro_batches:
        for b, (row, P) in enumerate(zip(micro.rows, micro.prompt_lengths.tolist(), strict=True)):
            n = int(micro.response_mask[b].sum())
            ids = micro.tokens[b, : P + n]
            logs = (lm.logits(lm(ids[None])[0]) / 0.7).log_softmax(-1)
            picked = sum(logs[P - 1 + t, int(ids[P + t])] for t in range(n))
            weight = {"token": 1 / tokens, "sequence": 1 / n / 6, "fixed": 1 / 6 / 6}[mean]
            total = total - advantages[row].double() * picked * weight
    gradient = torch.autograd.grad(total, list(lm.parameters()))
    expected = -torch.cat([g.flatten() for g in gradient])
    moved, _ = plain_step(buffer, lm, policy_loss=loss, loss_mean=mean, kl_coef=0.0, **settings)
    assert expected.abs().max() > 1e-3
    assert_close(moved, expected, atol=1e-6)  # advantages are float32


@pytest.mark.parametrize("loss", ["clip", "gspo", "cispo"])
@pytest.mark.parametrize("mean", ["token", "sequence", "fixed"])
def test_gradient_is_the_same_for_any_micro_batches(loss, mean):
    results = []
    for rows in (6, 4, 1):
        lm = tiny_lm(f64)
        buffer = measured(lm, rows)
        with torch.no_grad():
            lm.lm_head.weight.mul_(1.1)  # so that ratios are not 1
        results.append(plain_step(buffer, lm, policy_loss=loss, loss_mean=mean, micro_batch_size=1))
    for moved, stats in results[1:]:
        assert_close(moved, results[0][0], atol=1e-9)
        assert stats._asdict() == pytest.approx(results[0][1]._asdict(), abs=1e-6)


def test_a_group_that_agrees_moves_nothing():
    lm = tiny_lm(f64)
    buffer = measured(lm)
    assign_group_credit(buffer, torch.tensor([2.0] * 6), config_of(samples_per_prompt=3))
    moved, stats = plain_step(buffer, lm, kl_coef=0.0)
    assert not moved.any() and stats.grad_norm == 0


# ---- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"epochs": 2, "early_stop_kl": 1e-3, "resample": 2, "advantage": "rloo"},
     {"kl_coef": 0.0, "policy_loss": "gspo", "clip_low": 3e-4, "clip_high": 4e-4},
     {"advantage": "reinforce++", "kl_in": "reward", "kl_estimator": "k1", "top_p": 0.9}],
    ids=["default", "resample", "gspo", "reinforce++"],
)
def test_grpo_is_the_same_when_it_is_dropped_and_rebuilt_at_each_step(settings, tmp_path):
    config = config_of(save_rollouts=True, **settings)
    expected, whole = run_steps(config)
    steps, state = rebuilt_at_each_step(
        lambda: state_of(tiny_lm(), config), lambda state: steps_from(state, config), tmp_path)
    timeless = [[json.dumps(step._replace(clock={})) for step in some]
                for some in (steps, expected)]
    assert timeless[0] == timeless[1]
    assert torch.equal(parameters(state.model), parameters(whole.model))
    assert (state.counters, state.samples, state.step) == (whole.counters, whole.samples, 4)


def test_responses_to_a_prompt_are_adjacent_and_differ():
    seen = []

    def reward(completions):
        seen.append((completions.prompt_ids, completions.response_ids))
        return letter_d(completions)

    run_steps(config_of(steps=2), reward)
    for prompts, responses in seen:
        assert prompts[:4] == prompts[:1] * 4 and prompts[4:] == prompts[4:5] * 4
        assert len({tuple(ids) for ids in responses[:4]}) > 1
    assert {tuple(prompts[i]) for prompts, _ in seen for i in (0, 4)} == {
        tuple(prompt.ids) for prompt in PROMPTS}  # an epoch: each once


def test_texts_do_not_depend_on_how_many_rows_are_sampled_at_once():
    runs = []
    for rows in (1, 3, 256):  # 1: no prompt is shared
        (step,), _ = run_steps(config_of(rollout_batch_size=rows, steps=1, save_rollouts=True))
        runs.append([row["response_ids"] for row in step.samples])
    assert runs[0] == runs[1] == runs[2] and len(runs[0]) == 8


def test_rollout_rows_hold_what_was_learned_from():
    (step,), _ = run_steps(config_of(steps=1, save_rollouts=True, advantage="dr_grpo"))
    assert [row["kind"] for row in step.samples] == ["rollout"] * 8
    scores = [row["score"] for row in step.samples]
    for at in (0, 4):
        mean = sum(scores[at : at + 4]) / 4
        for row in step.samples[at : at + 4]:
            assert row["advantages"] == pytest.approx(
                [row["score"] - mean] * len(row["response_ids"]))
            assert row["old_logprobs"] == row["ref_logprobs"] and "old_values" not in row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("advantage", ["grpo", "rloo", "reinforce++"])
def test_grpo_learns_to_write_a_letter(dtype, advantage):
    config = config_of(steps=15, batch_size=4, micro_batch_size=16, mini_batches=1,
                       learning_rate=1e-2, advantage=advantage)
    steps, _ = run_steps(config, lm=tiny_lm(dtype))
    rewards = [step.metrics["reward"] for step in steps]
    assert sum(rewards[:3]) / 3 < 1 and sum(rewards[-3:]) / 3 > 2  # of 6 letters


@pytest.mark.parametrize(
    ("settings", "reward"),
    [
        ({}, lambda c: torch.ones(len(c.completions))),
        ({"resample": 3}, lambda c: torch.ones(len(c.completions))),
        ({"batch_size": 1, "samples_per_prompt": 2, "mini_batches": 1}, letter_d),
        ({"samples_per_prompt": 1, "mini_batches": 1, "advantage": "reinforce++"}, letter_d),
        ({"max_new_tokens": 1}, letter_d),
        ({"missing_eos": "ramp", "missing_eos_penalty": 1.0, "missing_eos_buffer": 3}, letter_d),
        ({"batch_size": 9}, letter_d),
    ],
    ids=["equal", "equal, drawn again", "two rows", "one sample", "one token", "ramp", "epochs"],
)
def test_grpo_stays_finite_at_the_edges(settings, reward):
    steps, state = run_steps(config_of(steps=2, **settings), reward)
    for step in steps:
        assert all(map(math.isfinite, step.metrics.values()))
    assert torch.isfinite(parameters(state.model)).all()


# ---- drawn again ---------------------------------------------------------------------------------


class Judge:
    """Of groups of two, the calls' groups agree as told; keeps the prompts of each call."""

    def __init__(self, *agree: list[bool]):
        self.agree, self.calls, self.tokens = list(agree), [], 0

    def __call__(self, completions) -> torch.Tensor:
        self.tokens += sum(map(len, completions.prompt_ids + completions.response_ids))
        self.calls.append([tuple(ids) for ids in completions.prompt_ids[::2]])
        agree = self.agree.pop(0)
        assert len(agree) == len(self.calls[-1])
        return torch.tensor([x for i, same in enumerate(agree) for x in (i, i if same else i + 1)],
                            dtype=torch.float32)


def drawn_again(judge, **settings):
    values = {"batch_size": 3, "samples_per_prompt": 2, "mini_batches": 1, "steps": 1,
              "save_rollouts": True, **settings}
    (step,), state = run_steps(config_of(**values), judge)
    assert judge.agree == []
    return step, state


def test_groups_that_agree_give_way_to_the_next_prompts():
    judge = Judge([T, F, T], [F, T], [F])
    step, state = drawn_again(judge, resample=5)
    assert [len(call) for call in judge.calls] == [3, 2, 1]
    # prompts in their order: 3 + 2 + 1 of an endless one of 4
    drawn = [prompt for call in judge.calls for prompt in call]
    assert len(set(drawn[:4])) == 4 and state.samples == 6
    learned = [tuple(row["prompt_ids"]) for row in step.samples[::2]]
    assert learned == [drawn[1], drawn[3], drawn[5]]
    assert [row["score"] for row in step.samples] == [1, 2, 0, 1, 0, 1]
    assert state.counters["flat_groups"] == 3 and state.counters["resampled_prompts"] == 3
    assert step.metrics["frac_reward_zero_std"] == 3 / 6
    assert step.metrics["reward"] == (0 + 0 + 1 + 2 + 2 + 2 + 0 + 1 + 1 + 1 + 0 + 1) / 12
    assert step.metrics["epoch"] == 6 / 4


def test_what_agrees_after_the_last_draw_is_learned_from_and_counted():
    judge = Judge([T, F, T], [T, F])
    step, state = drawn_again(judge, resample=1)
    assert len(step.samples) == 6 and state.samples == 5
    assert [row["score"] for row in step.samples] == [1, 2, 0, 0, 1, 2]
    assert [any(row["advantages"]) for row in step.samples] == [T, T, F, F, T, T]
    assert state.counters["flat_groups"] == 3 and state.counters["resampled_prompts"] == 2
    assert state.counters["num_tokens"] == step.metrics["num_tokens"] == judge.tokens


def test_a_prompt_that_is_drawn_again_is_answered_anew():
    answers = []

    def flat(completions):
        answers.append(completions.response_ids)
        return torch.ones(len(completions.completions))

    config = config_of(batch_size=1, samples_per_prompt=2, mini_batches=1, steps=1, resample=2)
    state = state_of(tiny_lm(), config)
    list(recipe.grpo(state, PROMPTS[:1], flat, tiny_lm(), Letters(), config))
    assert len(answers) == 3 and len({json.dumps(ids) for ids in answers}) == 3
    assert state.samples == 3  # of the one prompt


def test_no_group_is_drawn_again_by_default():
    judge = Judge([T, T, T])
    step, state = drawn_again(judge)
    assert state.counters["resampled_prompts"] == 0 and step.metrics["frac_reward_zero_std"] == 1


# ---- the reference -------------------------------------------------------------------------------


def test_without_a_kl_there_is_no_reference():
    steps, _ = run_steps(config_of(kl_coef=0.0), ref=None)
    for step in steps:
        assert not {"kl", "objective/kl"} & step.metrics.keys()
        assert step.metrics["loss/kl_avg"] == 0
    run_steps(config_of(kl_coef=0.0, kl_in="reward", kl_estimator="k1", steps=1), ref=None)
    steps, _ = run_steps(config_of(kl_coef=0.0))  # one that is given is measured
    assert steps[0].metrics["kl"] == 0 < steps[3].metrics["kl"]


def test_lora_reference_is_the_policy_without_its_adapters():
    lm = add_lora(tiny_lm(), 2, 32.0, 0)
    base = {n: p.detach().clone() for n, p in lm.named_parameters() if not p.requires_grad}
    steps, _ = run_steps(config_of(lora_rank=2), lm=lm, ref=base_of(lm))
    assert steps[0].metrics["objective/kl"] == 0 != steps[3].metrics["objective/kl"]
    now = dict(lm.named_parameters())
    assert all(torch.equal(now[name], before) for name, before in base.items())
    with pytest.raises(ValueError, match=r"ref is None, kl_coef is 0\.\d+: give the reference"):
        run_steps(config_of(), ref=None)


def test_grpo_stops_where_the_reference_is_not_the_starting_policy():
    other = tiny_lm()
    with torch.no_grad():
        other.lm_head.weight.mul_(0.5)
    with pytest.raises(UserError, match=r"nats before any training.*--ref") as caught:
        run_steps(config_of(), ref=other)
    assert caught.value.code == BUG
    (step,), _ = run_steps(config_of(ref="another folder", steps=1), ref=other)
    assert step.metrics["kl"] > 0


def test_grpo_stops_where_training_passes_are_not_those_that_measured():
    lm, calls = tiny_lm(), []

    def drift(module, inputs, hidden):
        calls.append(1)
        return hidden * (1 + 1e-2 * len(calls))

    lm.model.norm.register_forward_hook(drift)
    with pytest.raises(UserError, match="step 1: val/ratio: the first ratio is off 1") as caught:
        run_steps(config_of(ref="another folder"), lm=lm)
    assert caught.value.code == BUG


# ---- losses of one's own -------------------------------------------------------------------------


def test_a_policy_loss_of_ones_own_may_see_the_mask():
    masks = []

    def whole(logprobs, old_logprobs, advantages, response_mask):
        masks.append(response_mask)
        return sequence_surrogate(logprobs, old_logprobs, advantages, response_mask, 0.2, 0.2)

    own, ours = (run_steps(config_of(steps=2, **settings), policy_loss=loss)[1].model
                 for settings, loss in (({}, whole), ({"policy_loss": "gspo"}, None)))
    assert torch.equal(parameters(own), parameters(ours)) and masks


def test_a_policy_loss_that_gives_something_else_is_refused():
    def short(logprobs, old_logprobs, advantages):
        out = clipped_surrogate(logprobs, old_logprobs, advantages, 0.2, 0.2)
        return Surrogate(out.loss.mean(), out.ratio, out.clipped)

    with pytest.raises(ValueError, match=r"policy_loss gave a loss that is \(\): one number per"):
        run_steps(config_of(), policy_loss=short)


# ---- what settings refuse together ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"samples_per_prompt": 1}, "samples_per_prompt 1 with advantage grpo: nothing to compare"),
        ({"samples_per_prompt": 1, "advantage": "reinforce++", "resample": 1, "mini_batches": 1},
         "resample: the one score of a group always agrees"),
        ({"policy_loss": "gspo", "advantage": "reinforce++"}, "one ratio a response needs one"),
        ({"policy_loss": "cispo", "dual_clip": 3.0}, "dual_clip: policy_loss cispo bounds every"),
        ({"kl_in": "reward"}, "kl_in reward with kl_estimator k2: only k1 is there"),
        ({"kl_estimator": "k1"}, "kl_in loss with kl_estimator k1: the gradient of that estimate"),
        ({"batch_size": 1, "micro_batch_size": 3},
         "batch_size 1 of 4 responses each, 4 rows, is less than 2 mini_batches of "
         "micro_batch_size 3: use batch_size 2 or micro_batch_size 2 or mini_batches 1"),
        ({"mini_batches": 1, "max_ratio": 2.0}, "max_ratio: the ratio of the only update is 1"),
        ({"early_stop_kl": 0.1}, "early_stop_kl: there is one epoch"),
        ({"missing_eos": "ramp", "missing_eos_penalty": 1.0, "missing_eos_buffer": 7},
         "missing_eos ramp: missing_eos_buffer is 7, must be from 1 to max_new_tokens 6"),
        ({"compile": True, "dtype": "bfloat16"}, "compile with bfloat16"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, told):
    with pytest.raises(UserError) as caught:
        validate(config_of(**settings))
    assert told in str(caught.value)


def test_token_rewards_are_refused_where_a_setting_would_pass_them_by():
    def tokens(completions):
        rows = [[1.0] * len(ids) for ids in completions.response_ids]
        sums = torch.tensor([float(len(row)) for row in rows])
        return Scores(torch.zeros(len(rows)), {"x": sums}, rows)

    with pytest.raises(UserError, match="missing_eos replace: changes the score of a response"):
        run_steps(config_of(missing_eos="replace"), tokens)
    (step,), _ = run_steps(config_of(steps=1), tokens)
    assert step.metrics["reward"] == step.metrics["completions/mean_length"]


def test_the_page_names_settings_that_go_together():
    page = Path(recipe.__file__).with_name("README.md").read_text("utf-8")
    rows = re.findall(r"^\| \[.+?\]\(https://arxiv\S+\) \| `(.+?)`", page, re.MULTILINE)
    assert len(rows) == 8
    needed = ["--model", "m", "--data", "d", "--reward", "math", "--out", "o"]
    found = [flags.parse(GRPOConfig, needed + row.split(), "minirlhf grpo") for row in rows]
    advantages = {"grpo", "dr_grpo", "lite_ppo", "rloo", "reinforce++"}
    assert {config.advantage for config in found} == advantages
    assert {config.policy_loss for config in found} == {"clip", "gspo", "cispo"}
