"""PPO's log-probs and KL are those of the distribution that is sampled, however it is narrowed."""

import math

import pytest
import torch

from minirlhf import streams
from minirlhf.batches.collect import sample
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, measure
from minirlhf.models.generation import generate
from minirlhf.models.sampling import sampling_distribution
from minirlhf.models.support import RowSupport
from minirlhf.setup.policy import sampling_of
from tests.tiny_ppo import (
    PROMPTS,
    Letters,
    assert_close,
    by_row,
    config_of,
    f64,
    full_distributions,
    gradient_of,
    other_ref,
    plain_step,
    run_steps,
    tiny_lm,
    tiny_policy,
)

NARROW = [
    {"top_k": 3},
    {"top_p": 0.6},
    {"min_p": 0.3},
    {"min_new_tokens": 4},
    {"top_p": 0.8, "min_new_tokens": 3, "temperature": 0.7},
]


@pytest.mark.parametrize("settings", NARROW)
def test_narrowed_sampling_starts_at_no_kl_and_ratio_one(settings):
    steps, _ = run_steps(config_of(steps=2, **settings))  # it stops where one of them is not so
    assert steps[0].metrics["objective/kl"] == 0 != steps[1].metrics["objective/kl"]
    for step in steps:
        assert all(map(math.isfinite, step.metrics.values()))


@pytest.mark.parametrize("settings", NARROW)
def test_measured_logprobs_are_those_that_were_drawn_from(settings):
    policy, config = tiny_policy(f64), config_of(**settings)
    keys = streams.key(0, "test", torch.arange(4))
    ids = [prompt.ids for prompt in PROMPTS]
    made = generate(policy.lm, ids, sampling_of(config), [0], keys)
    _, rollout = sample(policy.lm, PROMPTS, keys, sampling_of(config), Letters(), rows_at_once=3)
    buffer = RolloutBuffer(3, 99)
    buffer.add(rollout)
    measure(policy, tiny_lm(f64), buffer, config.temperature)
    for row, got in enumerate(by_row(buffer, "old_logprobs")):
        assert_close(got, made.logprobs[row][made.response_mask[row]], atol=1e-9)


@torch.no_grad()
def every_answer(policy, sampling, weigh) -> tuple[RolloutBuffer, torch.Tensor, list[int]]:
    """A rollout of every one-token answer that could be drawn to one prompt; their probabilities
    (K,), and their ids."""
    hidden = policy.lm(torch.tensor([[3, 4]]))[:, -1]
    logs = sampling_distribution(policy.lm.logits(hidden), sampling)[0]
    ids = (logs > -math.inf).nonzero()[:, 0]
    buffer, K, p = RolloutBuffer(2, 99), len(ids), logs[ids].exp()
    buffer.add(
        Rollout(
            rows=torch.arange(K),
            tokens=torch.stack([torch.tensor([3, 4, i]) for i in ids.tolist()]),
            prompt_lengths=torch.full((K,), 2),
            response_mask=torch.ones(K, 1, dtype=torch.bool),
            scores=weigh(ids, p),
            truncated=torch.zeros(K, dtype=torch.bool),
            support=RowSupport([ids.int()] * K, torch.full((K, 1), K)),
        )
    )
    return buffer, p, ids.tolist()


def test_full_kl_is_that_of_what_could_be_drawn():
    """On a support S of what is sampled both distributions are renormalised; the KL runs over S."""
    policy, ref, config = tiny_policy(f64), other_ref(), config_of(top_k=3)
    keys = streams.key(0, "test", torch.arange(len(PROMPTS)))
    _, rollout = sample(policy.lm, PROMPTS, keys, sampling_of(config), Letters(), len(PROMPTS))
    buffer = RolloutBuffer(2, 99)
    buffer.add(rollout)
    measure(policy, ref, buffer, 1.0, full_kl=True)
    logs, ref_logs = full_distributions(policy, ref, buffer)
    inside = logs >= logs.topk(3, dim=-1).values[:, -1:]
    p, q = (x.masked_fill(~inside, -torch.inf).log_softmax(-1) for x in (logs, ref_logs))
    kl = torch.where(inside, p.exp() * (p - q), 0).sum(-1)
    assert_close(buffer.flat("full_kl"), kl.detach(), atol=1e-9)


@torch.no_grad()
def test_the_kl_of_a_narrowed_distribution_is_a_kl():
    """Its expectation under what is sampled is the divergence of the two narrowed distributions; of
    the models' own log-probs the same sum is another number, which may be below 0."""
    policy, ref, sampling = tiny_policy(f64), other_ref(), sampling_of(config_of(top_k=3))
    buffer, p, ids = every_answer(policy, sampling, lambda ids, p: torch.zeros_like(p))
    measure(policy, ref, buffer, 1.0)
    order = torch.cat([micro.rows for micro in buffer.micro_batches])
    old, reference = buffer.flat("old_logprobs"), buffer.flat("ref_logprobs")
    assert_close(old.exp(), p[order])
    p_all, q_all = (lm.logits(lm(torch.tensor([[3, 4]]))[:, -1])[0].log_softmax(-1)
                    for lm in (policy.lm, ref))
    divergence = float((p * (p / q_all[ids].softmax(-1)).log()).sum())
    assert divergence > 0
    assert float((p[order] * (old - reference)).sum()) == pytest.approx(divergence, abs=1e-9)
    assert abs(float((p * (p_all - q_all)[ids]).sum()) - divergence) > 0.01


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.7, "temperature": 0.8}])
def test_the_policy_gradient_is_that_of_the_expected_score_under_what_is_sampled(settings):
    """Over all answers, weighted by their probability, the loss's gradient is that of minus the
    expected score: the estimand of PPO's first step, whatever sampling leaves out."""
    policy, config = tiny_policy(f64), config_of(**settings)
    with torch.no_grad():
        policy.v_head.weight.zero_()
    value = torch.linspace(-1, 2, 20, dtype=f64)  # the score of each token as an answer
    buffer, _, ids = every_answer(  # a mean over the K rows becomes the expectation
        policy, sampling_of(config), lambda ids, p: value[ids] * p * len(ids)
    )
    measure(policy, tiny_lm(f64), buffer, config.temperature)
    logits = policy.lm.logits(policy.lm(torch.tensor([[3, 4]]))[:, -1])[0, ids]
    expected_score = ((logits / config.temperature).softmax(-1) * value[ids]).sum()
    gradient = gradient_of(policy, expected_score)
    step, stats = plain_step(
        buffer, policy, **settings, whiten_advantages=False, kl_coef=0.0, vf_coef=0.0,
        batch_size=len(ids),
    )
    assert stats.first_ratio_gap == 0
    assert gradient.abs().max() > 1e-3
    assert_close(step, gradient, atol=1e-9)
