"""Advantages, losses, metrics and gradients of GRPO and RLOO are TRL 1.16's, or why they are not.

tests/data/trl_1_16_0.json holds what TRL's GRPOTrainer and RLOOTrainer make of two prompts with
three responses each, of which the policy has moved since it sampled; trl_reference.py made it and
says how. The losses are derived once more in plain Python. What TRL defines otherwise:

    bnpo is a mean over micro-batches of their means over tokens there, so that it depends on the
        split; ours is the mean over the tokens of the step, however it is split
    a response that mask_truncated_completions left out still counts among the responses of grpo's
        mean there; ours is a mean over those that are left
    clip_ratio/low_min and high_max are of single responses there; ours of whole updates
    the clip ratios of a sequence-level ratio count responses there; ours count their tokens
    a token that delta bounds has no gradient, and is not counted there; ours counts it
    epsilon_high of cispo is the bound itself there; ours is 1 + clip_high
    cispo_clip_ratio counts only where the advantage is above 0 there; ours each bounded weight
    reward_std is of all rewards there; ours is the mean of the groups' own
    the ratio of RLOO is that of a whole response there; ours that of a token. At the first update,
        where both are 1, the gradients are the same up to a constant
    normalize_advantages of RLOO is not here
"""

import json
import math
from pathlib import Path
from statistics import fmean, stdev

import pytest
import torch
from torch import Tensor

from minirlhf.batches.credit import assign_group_credit
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, lm_pass, measure_lm
from minirlhf.evaluation.groups import GRPOStats, kl_statistics, reward_statistics
from minirlhf.models.alignment import pad_right
from minirlhf.recipes.grpo import grpo_step
from minirlhf.rewards.source import Scores
from minirlhf.setup.grpo_settings import GRPOConfig
from tests import trl_reference as reference
from tests.test_trl_direct_parity import lm
from tests.trl_reference import (
    ANSWER_SCORES,
    ANSWERS,
    CLIPS,
    DELTA,
    EOS,
    KL_BETA,
    LIMIT,
    NEW,
    OLD,
    QUERIES,
    REF,
    SAMPLES,
)

TRL = json.loads((Path(__file__).parent / "data/trl_1_16_0.json").read_text("utf-8"))["groups"]
NEAR = {"rel": 0, "abs": 1e-5}
B, TOKENS = len(ANSWERS), [len(ids) for ids in ANSWERS]
WHOLE = [ids[-1] == EOS for ids in ANSWERS]  # the others were cut
SETTINGS = {  # of ours, for the names of trl_reference.GROUPS
    "grpo": {"loss_mean": "sequence"}, "bnpo": {}, "dapo": {},
    "dr_grpo": {"advantage": "dr_grpo", "loss_mean": "fixed"},
    "batch": {"advantage": "lite_ppo"},
    "gspo": {"policy_loss": "gspo", "loss_mean": "sequence"},
    "cispo": {"policy_loss": "cispo", "clip_low": 1.0, "clip_high": reference.CISPO_BOUND - 1},
    "delta": {"dual_clip": DELTA},
    "kl": {"kl_coef": KL_BETA, "kl_estimator": "k3"},
    "truncated": {"mask_truncated": True},
    "truncated, grpo": {"mask_truncated": True, "loss_mean": "sequence"},
    "rloo": {"advantage": "rloo", "loss_mean": "fixed"},
    "rloo, kl": {"advantage": "rloo", "loss_mean": "fixed", "kl_coef": KL_BETA, "kl_in": "reward",
                 "kl_estimator": "k1"},
}
SAME = [name for name in SETTINGS if "rloo" not in name and name != "truncated, grpo"]
CLIPPED = {  # of ours -> of TRL
    "clip_low": "clip_ratio/low_mean", "clip_high": "clip_ratio/high_mean",
    "clipfrac": "clip_ratio/region_mean",
}


def rollout_of(old: float, micro_batch_size: int = B) -> RolloutBuffer:
    """TRL's rows, sampled and measured by the policy of phase `old`."""
    prompts = [QUERIES[row // SAMPLES] for row in range(B)]
    columns = torch.arange(max(TOKENS))
    buffer = RolloutBuffer(micro_batch_size, 99)
    buffer.add(Rollout(
        rows=torch.arange(B),
        tokens=pad_right([p + ids for p, ids in zip(prompts, ANSWERS, strict=True)]),
        prompt_lengths=torch.tensor([len(p) for p in prompts]),
        response_mask=columns < torch.tensor(TOKENS)[:, None],
        scores=torch.tensor(ANSWER_SCORES, dtype=torch.float64),
        truncated=~torch.tensor(WHOLE),
    ), SAMPLES)
    measure_lm(lm(old), lm(REF), buffer, 1.0)
    return buffer


def by_row(buffer: RolloutBuffer, field: str) -> list[list[float]]:
    """The values of each response's tokens, in the order of the batch."""
    found = {int(row): micro_field[mask].tolist() for micro in buffer.micro_batches
             for row, micro_field, mask in zip(
                 micro.rows, getattr(micro, field), micro.response_mask, strict=True)}
    return [found[row] for row in range(B)]


def ours(name: str, micro_batch_size: int = B) -> tuple[list[float], GRPOStats, list[float]]:
    """Advantages of the responses, statistics, gradient of one optimizer step."""
    values = {"kl_coef": 0.0, "clip_low": CLIPS[0], "clip_high": CLIPS[1], **SETTINGS[name]}
    config = GRPOConfig(
        model="m", data="d", reward=("r",), out="o", batch_size=B // SAMPLES,
        samples_per_prompt=SAMPLES, mini_batches=1, micro_batch_size=micro_batch_size,
        max_new_tokens=LIMIT, max_grad_norm=None, **values,
    )
    buffer = rollout_of(NEW if "rloo" in name else OLD, micro_batch_size)
    assign_group_credit(buffer, torch.tensor(ANSWER_SCORES, dtype=torch.float64), config)
    policy, before = lm(NEW), dict(lm(NEW).named_parameters())
    stats = grpo_step(policy, torch.optim.SGD(policy.parameters(), lr=1.0), buffer, config)
    gradient = [before[n].detach() - p.detach() for n, p in sorted(policy.named_parameters())]
    projected = [float((g * reference.direction(g)).sum()) for g in gradient]
    return [row[0] for row in by_row(buffer, "advantages")], stats, projected


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("micro_batch_size", [B, 2])
def test_advantages_loss_gradient_and_metrics_are_trls(name, micro_batch_size):
    advantages, stats, gradient = ours(name, micro_batch_size)
    theirs = TRL[name]
    assert advantages == pytest.approx(theirs["advantages"], **NEAR)
    assert stats.loss == pytest.approx(theirs["loss"], **NEAR)
    assert gradient == pytest.approx(theirs["gradient"], **NEAR)
    assert max(map(abs, gradient)) > 1e-3
    assert stats.entropy == pytest.approx(theirs["metrics"]["entropy"], **NEAR)
    if name not in ("gspo", "cispo", "delta"):
        found = {CLIPPED[n]: getattr(stats, n) for n in CLIPPED}
        assert found == pytest.approx({n: theirs["metrics"][n] for n in found}, **NEAR)
    if name == "kl":
        assert stats.kl_loss / KL_BETA == pytest.approx(theirs["metrics"]["kl"], **NEAR)


@pytest.mark.parametrize("name", ["rloo", "rloo, kl"])
def test_rloo_is_trls_at_the_first_update(name):
    advantages, _, gradient = ours(name)
    assert advantages == pytest.approx(TRL[name]["advantages"], **NEAR)
    # a sum over the tokens of a response there, here divided by the limit
    assert [LIMIT * g for g in gradient] == pytest.approx(TRL[name]["gradient"], **NEAR)
    kl = kl_statistics(rollout_of(NEW))["objective/kl"]  # of a response; there of a token
    if name == "rloo, kl":
        assert kl * B / sum(TOKENS) == pytest.approx(TRL[name]["metrics"]["kl"], **NEAR)


# ---- in plain Python -----------------------------------------------------------------------------


def logprobs_of(phase: float) -> list[list[float]]:
    buffer = rollout_of(OLD)
    (micro,) = buffer.micro_batches
    passed: Tensor = lm_pass(lm(phase), micro, 1.0).logprobs.detach()
    buffer.map(lambda micro: micro._replace(returns=passed))
    return by_row(buffer, "returns")


def losses_by_hand(name: str, advantages: list[float]) -> list[list[float]]:
    """The loss of each token."""
    new, old, ref = (logprobs_of(phase) for phase in (NEW, OLD, REF))
    found = []
    for row, A in enumerate(advantages):
        pairs = list(zip(new[row], old[row], strict=True))
        mean = fmean(n - o for n, o in pairs)
        losses = []
        for t, (n, o) in enumerate(pairs):
            ratio = math.exp(mean if name == "gspo" else n - o)
            if name == "cispo":
                losses.append(-min(ratio, reference.CISPO_BOUND) * A * n)
                continue
            clipped = min(max(ratio, 1 - CLIPS[0]), 1 + CLIPS[1])
            if name == "delta":
                ratio = min(ratio, DELTA)
            loss = -min(ratio * A, clipped * A)
            if name == "kl":
                gap = ref[row][t] - n
                loss += KL_BETA * (math.exp(gap) - gap - 1)
            losses.append(loss)
        found.append(losses)
    return found


@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo", "cispo", "delta", "kl"])
def test_trls_losses_by_hand(name):
    losses = losses_by_hand(name, TRL[name]["advantages"])
    if name in ("grpo", "gspo"):
        expected = fmean(map(fmean, losses))
    elif name == "dr_grpo":
        expected = sum(map(sum, losses)) / (B * LIMIT)
    else:
        expected = sum(map(sum, losses)) / sum(TOKENS)
    assert TRL[name]["loss"] == pytest.approx(expected, **NEAR)


# ---- where TRL differs ---------------------------------------------------------------------------


def test_bnpo_depends_on_the_split_there_and_on_nothing_here():
    losses = losses_by_hand("bnpo", TRL["bnpo"]["advantages"])
    for rows, theirs in zip((3, 2, 1), TRL["bnpo"]["split"], strict=True):
        parts = [[loss for row in losses[start : start + rows] for loss in row]
                 for start in range(0, B, rows)]
        assert theirs == pytest.approx(fmean(map(fmean, parts)), **NEAR)
        assert ours("bnpo", rows)[1].loss == pytest.approx(TRL["bnpo"]["loss"], **NEAR)
    assert abs(TRL["bnpo"]["split"][2] - TRL["bnpo"]["loss"]) > 0.2
    for name in ("grpo", "dapo"):
        assert TRL[name]["split"] == pytest.approx([TRL[name]["loss"]] * 3, **NEAR)


def test_responses_left_out_count_in_the_mean_over_responses_there_and_not_here():
    losses = losses_by_hand("grpo", TRL["truncated, grpo"]["advantages"])
    kept = [fmean(row) for row, whole in zip(losses, WHOLE, strict=True) if whole]
    assert len(kept) == 2
    assert TRL["truncated, grpo"]["loss"] == pytest.approx(sum(kept) / B, **NEAR)
    advantages, stats, gradient = ours("truncated, grpo")
    assert advantages == pytest.approx(TRL["truncated, grpo"]["advantages"], **NEAR)
    assert stats.loss == pytest.approx(fmean(kept), **NEAR)
    scaled = [g * B / len(kept) for g in TRL["truncated, grpo"]["gradient"]]
    assert gradient == pytest.approx(scaled, **NEAR)


def test_clip_ratios_of_single_responses_there_and_of_an_update_here():
    new, old, A = logprobs_of(NEW), logprobs_of(OLD), TRL["dapo"]["advantages"]
    high = [[A[row] > 0 and n - o > math.log1p(CLIPS[1])
             for n, o in zip(new[row], old[row], strict=True)] for row in range(B)]
    metrics, stats = TRL["dapo"]["metrics"], ours("dapo")[1]
    assert metrics["clip_ratio/high_max"] == pytest.approx(max(map(fmean, high)), **NEAR)
    assert stats.clip_high_max == pytest.approx(sum(map(sum, high)) / sum(TOKENS), **NEAR)


def test_clip_ratios_of_a_sequence_level_ratio_count_responses_there_and_tokens_here():
    new, old, A = logprobs_of(NEW), logprobs_of(OLD), TRL["gspo"]["advantages"]
    ratios = [math.exp(fmean(n) - fmean(o)) for n, o in zip(new, old, strict=True)]
    clipped = [(a > 0 and r > 1 + CLIPS[1]) or (a < 0 and r < 1 - CLIPS[0])
               for a, r in zip(A, ratios, strict=True)]
    assert TRL["gspo"]["metrics"]["clip_ratio/region_mean"] == pytest.approx(fmean(clipped), **NEAR)
    weighed = sum(n for n, yes in zip(TOKENS, clipped, strict=True) if yes) / sum(TOKENS)
    assert ours("gspo")[1].clipfrac == pytest.approx(weighed, **NEAR)


def test_tokens_that_delta_bounds_count_as_clipped_here():
    new, old, A = logprobs_of(NEW), logprobs_of(OLD), TRL["delta"]["advantages"]
    bounded = sum(A[row] < 0 and n - o > math.log(DELTA) for row in range(B)
                  for n, o in zip(new[row], old[row], strict=True))
    theirs, stats = TRL["delta"]["metrics"], ours("delta")[1]
    assert bounded > 0 and theirs["clip_ratio/region_mean"] == pytest.approx(
        stats.clipfrac - bounded / sum(TOKENS), **NEAR)


def test_bounded_weights_of_cispo_are_counted_whatever_the_advantage_here():
    new, old, A = logprobs_of(NEW), logprobs_of(OLD), TRL["cispo"]["advantages"]
    bounded = [(A[row], n - o > math.log(reference.CISPO_BOUND)) for row in range(B)
               for n, o in zip(new[row], old[row], strict=True)]
    share = fmean(yes and a > 0 for a, yes in bounded)
    assert TRL["cispo"]["metrics"]["cispo_clip_ratio"] == pytest.approx(share, **NEAR)
    assert ours("cispo")[1].clipfrac == pytest.approx(fmean(yes for _, yes in bounded), **NEAR)


def test_spread_of_rewards_is_of_all_there_and_within_groups_here():
    scores = torch.tensor(ANSWER_SCORES, dtype=torch.float64)
    told = reward_statistics(Scores(scores, {}), scores, SAMPLES)
    theirs = TRL["grpo"]["metrics"]
    assert theirs["reward_std"] == pytest.approx(stdev(ANSWER_SCORES), **NEAR)
    within = fmean([stdev(ANSWER_SCORES[:3]), stdev(ANSWER_SCORES[3:])])
    assert told["reward_std"] == pytest.approx(within, **NEAR)
    for name in ("reward", "frac_reward_zero_std"):
        assert told[name] == pytest.approx(theirs[name], **NEAR)


def test_normalized_advantages_of_rloo_by_hand():
    plain = TRL["rloo"]["advantages"]
    expected = [(a - fmean(plain)) / (stdev(plain) + 1e-4) for a in plain]
    assert TRL["rloo, normalized"]["advantages"] == pytest.approx(expected, **NEAR)
