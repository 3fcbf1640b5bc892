"""PPO's numbers: by hand, against another derivation, at the edges, and as they are reported."""

import math
from math import log

import pytest
import torch
from torch import nan

from minirlhf import streams
from minirlhf.batches.collect import sample, with_scores
from minirlhf.batches.credit import assign_credit
from minirlhf.batches.rollouts import RolloutBuffer, measure
from minirlhf.data.examples import Prompt
from minirlhf.errors import NON_FINITE, UserError
from minirlhf.models.heads import ValueHeadModel
from minirlhf.models.transformer import CausalLM
from minirlhf.rewards.function import function_reward
from minirlhf.rewards.source import as_scores
from minirlhf.setup.policy import rule_for_truncated, sampling_of
from tests.tiny_ppo import (
    Letters,
    assert_close,
    assert_rows,
    by_row,
    config_of,
    f64,
    hand_buffer,
    hand_config,
    hand_step,
    letter_d,
    measured,
    moved_table,
    parameters,
    plain_step,
    run_steps,
    state_of,
    steps_from,
    tiny_lm,
    tiny_policy,
)

# ---- two rows by hand ----------------------------------------------------------------------------


def test_assign_credit_by_hand():
    buffer = hand_buffer()
    assign_credit(buffer, hand_config(), kl_coef=0.1)
    # KL 0.5, -1 and 0.2 at 0.1 a nat; the scores 1 and -1 on each row's last token
    assert_rows(buffer, "rewards", [[-0.05, 1.1], [-1.02]])
    # A_1 = 1.1 - 0.4;  A_0 = (-0.05 + 0.5 · 0.4 - 0.2) + 0.25 · 0.7
    assert_rows(buffer, "advantages", [[0.125, 0.7], [-1.12]])
    assert_rows(buffer, "returns", [[0.325, 1.1], [-1.02]])


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_assign_credit_whitens_over_the_whole_buffer_by_hand(micro_batch_size):
    buffer = hand_buffer(micro_batch_size)
    assign_credit(buffer, hand_config(whiten_advantages=True), kl_coef=0.1)
    # mean -0.295 / 3, variance 1.760025 / 3 - mean² = 0.5770056, deviation 0.7596088
    assert_rows(buffer, "advantages", [[0.2940110, 1.0509796], [-1.3449906]])
    assert_rows(buffer, "returns", [[0.325, 1.1], [-1.02]])  # never whitened


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ppo_step_by_hand(micro_batch_size):
    step = hand_step(hand_config(), buffer=hand_buffer(micro_batch_size))
    # Gradients over 3 tokens: -A · ratio where free; 0.1 · (V - R) where free
    policy_gradient = torch.tensor([[0.0, -0.7 * 0.5 / 3], [0.0, 0.0]], dtype=f64)
    value_gradient = torch.tensor([[0.1 * 0.175 / 3, 0.0], [0.1 * 1.12 / 3, 0.0]], dtype=f64)
    assert_close(step.logprobs, -policy_gradient)
    assert_close(step.values, -value_gradient)
    squares = policy_gradient.square().sum() + value_gradient.square().sum()
    expected = {
        # A = 0.125 at ratio 1.5: clipped to 1.2; 0.7 at 0.5: free; -1.12 at 0.5: clipped to 0.8
        "policy_loss": (-0.15 - 0.35 + 0.896) / 3,
        # (0.5 - 0.325)² / 2; 0.8 clipped to 0.6: (0.6 - 1.1)² / 2; (0.1 + 1.02)² / 2
        "value_loss": (0.0153125 + 0.125 + 0.6272) / 3,
        "loss": 0.132 + 0.1 * 0.2558375,
        "approxkl": (log(1.5) ** 2 + 2 * log(0.5) ** 2) / 2 / 3,
        "policykl": -log(1.5 * 0.5 * 0.5) / 3,
        "clipfrac": 2 / 3,
        "value_clipfrac": 1 / 3,
        "entropy": 2.0,
        "vpred": 1.4 / 3,
        # the same errors as in the loss, but none of them clipped: 0.8 - 1.1 is -0.3
        "value_error": (0.030625 + 0.09 + 1.2544) / 3,
        "ratio": 2.5 / 3,
        "ratio_var": 2.75 / 3 - (2.5 / 3) ** 2,  # 2.75: 2.25 + 0.25 + 0.25
        "first_ratio_gap": 0.5,
        # deviations of the advantages 1.760025 - 0.295² / 3, of the returns 2.30135, both times 3
        "explained_variance": 1 - (1.760025 - 0.295**2 / 3) / 2.30135,
        "non_score_reward": 0.1 * 0.15,  # rows' KL: 0.5 - 1 and 0.2, mean -0.15
        "grad_norm": float(squares.sqrt()),
    }
    found = step.stats._asdict()
    assert {name: found[name] for name in expected} == pytest.approx(expected, abs=1e-7)


def test_ppo_step_takes_its_kl_coef_from_the_argument_before_the_config():
    buffer = hand_buffer()
    assert hand_step(hand_config(), buffer=buffer, kl_coef=0).stats.non_score_reward == 0
    assert_rows(buffer, "rewards", [[0.0, 1.0], [-1.0]])


def test_ppo_step_makes_epochs_times_mini_batches_steps_and_clears_the_gradient():
    policy, taken = moved_table(), []
    policy.values.grad = torch.ones(2, 2, dtype=f64)  # which others left

    class Counting(torch.optim.SGD):
        def step(self):
            taken.append(float(self.param_groups[0]["params"][1].grad.abs().sum()))

    config = hand_config(mini_batches=2, micro_batch_size=1, batch_size=2, epochs=3)
    stats = hand_step(config, policy, hand_buffer(1), optimizer=Counting).stats
    # each weighed by its own tokens: 0.1 · 0.175 / 2 and 0.1 · 1.12 / 1, each once an epoch
    expected = 3 * [0.00875] + 3 * [0.112]
    assert sorted(taken) == pytest.approx(expected, abs=1e-9)
    assert all(p.grad is None for p in policy.parameters())
    assert stats.policy_loss == pytest.approx(0.132, abs=1e-7)  # nothing moved: every epoch alike


def test_ppo_step_explains_no_variance_where_there_is_none():
    buffer, zero = hand_buffer(), torch.zeros(2, 2)
    buffer.map(
        lambda m: m._replace(scores=zero[0], ref_logprobs=m.old_logprobs, old_values=zero)
    )
    stats = hand_step(hand_config(), buffer=buffer).stats
    assert (stats.explained_variance, stats.policy_loss) == (0, 0)


def test_ppo_step_refuses_a_loss_that_is_not_finite_before_it_is_applied():
    policy, buffer = moved_table(), hand_buffer()
    before = parameters(policy)
    buffer.map(lambda m: m._replace(scores=torch.tensor([nan, 1.0])))
    with pytest.raises(UserError, match=r"step 6 \(rollout rows 1, 0\): loss: is nan") as caught:
        hand_step(hand_config(), policy, buffer, iteration=5)
    assert caught.value.code == NON_FINITE
    assert torch.equal(parameters(policy), before)


# ---- a real model --------------------------------------------------------------------------------


def test_measure_reads_the_value_behind_the_last_token():
    policy = tiny_policy(f64)
    for micro in measured(policy).micro_batches:
        for b, length in enumerate(micro.lengths.tolist()):
            with torch.no_grad():
                hidden = policy.lm(micro.tokens[b : b + 1, :length])[0]
            value = policy.v_head(hidden[-1])
            assert_close(micro.last_values[b], value[0], atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, f64])
@pytest.mark.parametrize(("rows", "tokens"), [(1, 99), (2, 99), (5, 999), (5, 12)])
def test_first_ratio_is_exactly_one_and_equal_models_have_no_kl(dtype, rows, tokens):
    policy = tiny_policy(dtype)
    buffer = measured(policy, rows, tokens)
    assert torch.equal(buffer.flat("old_logprobs"), buffer.flat("ref_logprobs"))
    _, stats = plain_step(buffer, policy)
    assert stats.first_ratio_gap == 0
    assert (stats.ratio, stats.ratio_var, stats.approxkl, stats.clipfrac) == (1, 0, 0, 0)
    assert stats.value_clipfrac == 0
    assert stats.policy_loss == pytest.approx(0, abs=1e-6)  # minus the mean of white advantages


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_first_gradient_is_the_vanilla_policy_gradient(temperature):
    """Another derivation: row by row without padding, log-softmax of all logits, plain loops."""
    policy, config = tiny_policy(f64), config_of(vf_coef=0.3)
    buffer = measured(policy, temperature=temperature)
    assign_credit(buffer, config, config.kl_coef)
    loss, count = 0.0, 0
    for micro in buffer.micro_batches:
        for b, P in enumerate(micro.prompt_lengths.tolist()):
            n = int(micro.response_mask[b].sum())
            ids = micro.tokens[b, : P + n]
            hidden = policy.lm(ids[None])[0]
            logs = (policy.lm.logits(hidden) / temperature).log_softmax(-1)
            values = policy.v_head(hidden)[:, 0]
            for t in range(n):
                chosen, before = int(ids[P + t]), P - 1 + t
                error = values[before] - micro.returns[b, t]
                loss = loss - micro.advantages[b, t] * logs[before, chosen] + 0.3 * error**2 / 2
                count += 1
    gradient = torch.autograd.grad(loss / count, list(policy.parameters()))
    expected = -torch.cat([g.flatten() for g in gradient])
    moved, _ = plain_step(buffer, policy, vf_coef=0.3, temperature=temperature)
    assert expected.abs().max() > 1e-2
    assert_close(moved, expected, atol=1e-12)


@pytest.mark.parametrize(("rows", "tokens"), [(1, 99), (2, 99), (3, 99), (5, 12)])
def test_gradient_is_the_same_for_any_micro_batches(rows, tokens):
    policy = tiny_policy(f64)
    whole, stats = plain_step(measured(policy, 5, 999), policy)
    policy = tiny_policy(f64)
    buffer = measured(policy, rows, tokens)
    assert len(buffer.micro_batches) > 1
    split, others = plain_step(buffer, policy)
    assert_close(split, whole, atol=1e-10)
    assert others._asdict() == pytest.approx(stats._asdict(), abs=1e-6)


@pytest.mark.parametrize(("rows", "minis"), [(1, 1), (1, 3), (2, 2)])
def test_advantages_are_the_same_for_any_split(rows, minis):
    policy = tiny_policy(f64)
    whole = measured(policy, 5, 999)
    assign_credit(whole, config_of(), 0.05)
    split = measured(policy, rows, 999)
    plain_step(split, policy, mini_batches=minis)
    for one, other in zip(by_row(whole, "advantages"), by_row(split, "advantages"), strict=True):
        assert_close(one, other, atol=1e-6)
    flat = split.flat("advantages").double()
    assert float(flat.mean()) == pytest.approx(0, abs=1e-6)
    assert float(flat.std(correction=0)) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("pad", [7, 19])
def test_padding_ids_change_no_bit(pad):
    results = []
    for id in (0, pad):
        policy = tiny_policy()
        buffer = measured(policy, rows=5, tokens=999)
        (micro,) = buffer.micro_batches
        outside = torch.arange(micro.tokens.shape[1]) >= micro.lengths[:, None]
        assert outside.any()
        buffer.map(lambda m, o=outside, i=id: m._replace(tokens=m.tokens.masked_fill(o, i)))
        measure(policy, tiny_lm(), buffer, 1.0)
        results.append((*plain_step(buffer, policy), buffer.flat("ref_logprobs")))
    (moved, stats, ref), (other_moved, other_stats, other_ref) = results
    assert torch.equal(moved, other_moved)
    assert stats == other_stats
    assert torch.equal(ref, other_ref)


# ---- where a response ends -----------------------------------------------------------------------


def counting_lm() -> CausalLM:
    """Token i is followed by i + 1, 19 by 0 (eos), with all but e^-80 of the mass."""
    lm = tiny_lm(hidden_size=20, intermediate_size=8, num_heads=2, head_dim=10)
    with torch.no_grad():
        for layer in lm.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        lm.model.embed_tokens.weight.copy_(torch.eye(20))
        lm.lm_head.weight.copy_(20 * torch.eye(20).roll(1, 0))
    return lm


def counted(first: list[int], config, source):
    """(responses, finish reasons, rollout, scores) of a policy that counts on from these ids."""
    prompts = [Prompt([i], "x", "p", {}) for i in first]
    keys, lm = streams.key(0, "test", torch.arange(len(first))), counting_lm()
    made, rollout = sample(lm, prompts, keys, sampling_of(config), Letters(), 4)
    scores = as_scores(source(made), made, "step 1")
    rule = rule_for_truncated(config)
    ruled = rule(scores.total, rollout.truncated, rollout.response_lengths)
    scores = scores._replace(total=ruled)
    return made, with_scores(rollout, scores), scores


def rewards_of(rollout, config) -> list[list[float]]:
    """Of a policy that is its own reference, so that there is no KL."""
    buffer = RolloutBuffer(2, 99)
    buffer.add(rollout)
    measure(ValueHeadModel(counting_lm()), counting_lm(), buffer, 1.0)
    assign_credit(buffer, config, kl_coef=1.0)
    return [row.tolist() for row in by_row(buffer, "rewards")]


def test_eos_ends_a_response_at_any_slot_and_the_score_lands_on_it():
    config = config_of(max_new_tokens=4, missing_eos_penalty=0.5)
    # eos first, in the middle, in the last of 4 slots, and not at all
    made, rollout, _ = counted([19, 17, 16, 5], config, lambda c: torch.full((4,), 2.0))
    assert made.response_ids == [[0], [18, 19, 0], [17, 18, 19, 0], [6, 7, 8, 9]]
    assert made.finish_reasons == ["eos", "eos", "eos", "length"]
    assert rollout.response_mask.sum(1).tolist() == [1, 3, 4, 4]
    assert rollout.truncated.tolist() == [False, False, False, True]
    assert rollout.scores.tolist() == [2.0, 2.0, 2.0, 1.5]
    assert rewards_of(rollout, config) == [[2.0], [0, 0, 2.0], [0, 0, 0, 2.0], [0, 0, 0, 1.5]]


def test_rewards_of_tokens_stand_beside_the_score_and_the_kl_penalty():
    config = config_of(max_new_tokens=4, batch_size=3, missing_eos_penalty=0.5)
    source = function_reward(lambda completions: [[1, 2], 5, [0, -1, 0, 4]], "f")
    made, rollout, scores = counted([18, 17, 5], config, source)
    assert made.response_ids == [[19, 0], [18, 19, 0], [6, 7, 8, 9]]
    assert rollout.scores.tolist() == [0.0, 5.0, -0.5]  # the last one was truncated
    assert rewards_of(rollout, config) == [[1.0, 2.0], [0, 0, 5.0], [0, -1.0, 0, 3.5]]
    assert scores.sums.tolist() == [3.0, 5.0, 2.5]


class Endless(Letters):
    eos_ids = ()


@pytest.mark.parametrize(
    ("settings", "reward", "tokenizer"),
    [
        ({}, lambda c: torch.ones(4), Letters()),
        ({"batch_size": 1, "micro_batch_size": 1}, letter_d, Letters()),
        ({"max_new_tokens": 1}, letter_d, Letters()),
        ({"max_new_tokens": 1, "batch_size": 1, "micro_batch_size": 1}, letter_d, Letters()),
        ({"missing_eos_penalty": 1.0}, letter_d, Endless()),
        ({"lam": 0.0, "kl_coef": 0.0, "whiten_advantages": False}, letter_d, Letters()),
        ({"batch_size": 9, "micro_batch_size": 4, "mini_batches": 2}, letter_d, Letters()),
    ],
    ids=["equal", "one row", "one token", "one of each", "all truncated", "plain", "few prompts"],
)
def test_ppo_stays_finite_at_the_edges(settings, reward, tokenizer):
    steps, state = run_steps(config_of(steps=2, **settings), reward, tokenizer=tokenizer)
    for step in steps:
        assert all(map(math.isfinite, step.metrics.values()))
    assert torch.isfinite(parameters(state.model)).all()


# ---- what is reported ----------------------------------------------------------------------------


def test_metrics_keep_what_their_names_promise():
    config = config_of(steps=3, save_rollouts=True, missing_eos_penalty=0.25, kl_coef=0.2)
    steps, _ = run_steps(config)
    assert steps[0].metrics["objective/kl"] == 0
    assert steps[0].metrics["objective/non_score_reward"] == 0
    metrics, rows = steps[2].metrics, steps[2].samples
    assert abs(metrics["objective/kl"]) > 1e-3
    kl = sum(sum(row["old_logprobs"]) - sum(row["ref_logprobs"]) for row in rows) / 4
    scores = [row["response_ids"].count(4) - 0.25 * (row["finish_reason"] == "length")
              for row in rows]
    mean = sum(scores) / 4
    assert [row["score"] for row in rows] == pytest.approx(scores)
    ended = [row["finish_reason"] for row in rows].count("eos")
    expected = {
        "objective/kl": kl,
        "objective/non_score_reward": -0.2 * kl,
        "objective/scores": mean,
        "objective/scores_std": math.sqrt(sum((s - mean) ** 2 for s in scores) / 4),
        "objective/rlhf_reward": mean - 0.2 * kl,
        "objective/entropy": -sum(sum(row["old_logprobs"]) for row in rows) / 4,
        "objective/kl_coef": 0.2,
        "loss/total_avg": metrics["loss/policy_avg"] + 0.1 * metrics["loss/value_avg"],
        "val/num_eos_tokens": ended,
        "health/eos_rate": ended / 4,
        "health/unknown_tokens": 0,
        "response_length": sum(len(row["response_ids"]) for row in rows) / 4,
        "episode": 12,
        "epoch": 3.0,
    }
    assert {k: metrics[k] for k in expected} == pytest.approx(expected, abs=1e-5)
    assert {(row["step"], row["kind"]) for row in rows} == {(3, "rollout")}


def test_metrics_show_that_sampling_and_training_agree():
    config = config_of(steps=2, temperature=0.7, top_k=5, min_new_tokens=2)
    steps, _ = run_steps(config)
    assert all(0 <= step.metrics["health/logprobs_diff"] < 1e-5 for step in steps)


def test_metrics_count_a_stop_string_as_an_end_that_is_no_eos():
    config = config_of(steps=1, save_rollouts=True, stop=tuple("bcdefghij"), missing_eos_penalty=9)
    (step,), _ = run_steps(config)
    reasons = [row["finish_reason"] for row in step.samples]
    assert reasons.count("stop") > 1
    assert step.metrics["val/num_eos_tokens"] == reasons.count("eos")
    assert step.metrics["health/eos_rate"] == 1 - reasons.count("length") / 4
    for row in step.samples:  # the letter that stopped it is sampled, not shown, and no fault
        shown = len(row["response"]) + (row["finish_reason"] != "length")
        assert len(row["response_ids"]) == len(row["advantages"]) == shown
        assert (row["score"] < 0) == (row["finish_reason"] == "length")


def test_metrics_count_ids_without_a_token():
    class Short(Letters):
        vocab_size = 10

    config = config_of(steps=1, save_rollouts=True)
    (step,), _ = run_steps(config, tokenizer=Short())
    unknown = sum(i >= 10 for row in step.samples for i in row["response_ids"])
    assert step.metrics["health/unknown_tokens"] == unknown > 0


def test_learning_rate_falls_over_all_steps_and_no_further():
    rates, config = [], config_of(steps=4, learning_rate=0.8)
    state = state_of(tiny_policy(), config)
    for step in steps_from(state, config):
        assert {group["lr"] for group in state.optimizer.param_groups} == {step.metrics["lr"]}
        rates.append(step.metrics["lr"])
    assert rates == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_adaptive_kl_moves_the_coefficient_after_the_rollout_that_used_it():
    config = config_of(kl_coef=0.5, kl_target=0.3, kl_horizon=8.0, steps=3)
    steps, state = run_steps(config)
    # the KL of step 1 is 0: error -0.2, times 4 rows of a horizon of 8
    expected = [0.5, 0.5 * (1 - 0.2 * 4 / 8)]
    error = min(max(steps[1].metrics["objective/kl"] / 0.3 - 1, -0.2), 0.2)
    expected.append(expected[1] * (1 + error * 4 / 8))
    assert [s.metrics["objective/kl_coef"] for s in steps] == pytest.approx(expected)
    kl = steps[2].metrics["objective/kl"]
    error = min(max(kl / 0.3 - 1, -0.2), 0.2)
    assert state.kl_coef == pytest.approx(expected[2] * (1 + error * 4 / 8))
    reward = steps[2].metrics["objective/non_score_reward"]
    assert reward == pytest.approx(-expected[2] * kl, abs=1e-6)
