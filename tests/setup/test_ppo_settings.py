"""What each of PPO's settings does to rewards, losses and updates: by hand, and on a tiny model."""

import json
import math
from math import log

import pytest
import torch

from minirlhf import streams
from minirlhf.batches.collect import sample
from minirlhf.batches.credit import assign_credit
from minirlhf.batches.demonstrations import TextMix
from minirlhf.batches.rollouts import Rollout, RolloutBuffer, TokenPass, measure, policy_pass
from minirlhf.data.batching import next_rows
from minirlhf.data.examples import Text
from minirlhf.errors import UserError
from minirlhf.models.alignment import response_states
from minirlhf.models.generation import generate
from minirlhf.models.heads import RewardModel, critic_from_reward_model, initialize_score
from minirlhf.models.lora import add_lora
from minirlhf.models.sampling import sampling_distribution
from minirlhf.models.support import RowSupport
from minirlhf.recipes import ppo as recipe
from minirlhf.recipes.ppo import ppo, ppo_step
from minirlhf.rewards.source import Scores
from minirlhf.run.checkpoint import load_checkpoint, save_checkpoint
from minirlhf.run.optim import make_optimizer
from minirlhf.setup.ppo import sampling_of
from tests.recipes.test_ppo import (
    HAND,
    PROMPTS,
    Letters,
    Table,
    assert_close,
    by_row,
    config_of,
    hand_buffer,
    letter_d,
    measured,
    moved_table,
    parameters,
    plain_step,
    run_steps,
    state_of,
    table_pass,
    tiny_lm,
    tiny_policy,
)

f64 = torch.float64


def changed(**settings):
    return config_of(**{**vars(HAND), **settings})


# ---- rewards -------------------------------------------------------------------------------------

# log(policy / ref) of the hand-made rollout: 0.5, -1 and 0.2
PENALTIES = {
    "k1": (0.5, -1.0, 0.2),
    "k2": (0.125, 0.5, 0.02),
    "k3": (math.exp(-0.5) - 0.5, math.e - 2, math.exp(-0.2) - 0.8),  # exp(-d) - 1 + d
    "abs": (0.5, 1.0, 0.2),
}


@pytest.mark.parametrize("estimator", PENALTIES)
def test_kl_estimator_is_what_a_token_pays_for(estimator):
    buffer, (a, b, c) = hand_buffer(), PENALTIES[estimator]
    assign_credit(buffer, changed(kl_estimator=estimator), kl_coef=0.1)
    first, second = by_row(buffer, "rewards")
    assert_close(first, [-0.1 * a, 1 - 0.1 * b])
    assert_close(second, [-1 - 0.1 * c])


def test_kl_in_the_loss_leaves_the_reward_to_the_score():
    buffer = hand_buffer()
    assign_credit(buffer, changed(kl_in="loss", kl_estimator="k2"), kl_coef=0.1)
    first, second = by_row(buffer, "rewards")
    assert_close(first, [0.0, 1.0])
    assert_close(second, [-1.0])


@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_whiten_rewards_by_hand(micro_batch_size):
    buffer = hand_buffer(micro_batch_size)
    assign_credit(buffer, changed(whiten_rewards=True), kl_coef=0.1)
    # -0.05, 1.1, -1.02: mean 0.01, variance (0.06² + 1.09² + 1.03²) / 3, its root 0.8665256
    first, second = by_row(buffer, "rewards")
    assert_close(first, [-0.06 / 0.8665256 + 0.01, 1.09 / 0.8665256 + 0.01])
    assert_close(second, [-1.03 / 0.8665256 + 0.01])


def test_bootstrap_truncated_by_hand():
    buffer = hand_buffer()
    cut, ends = torch.tensor([True, False]), torch.tensor([0.6, 9.0], dtype=f64)
    buffer.update(lambda m: m._replace(truncated=cut[m.rows], last_values=ends[m.rows]))
    assign_credit(buffer, changed(bootstrap_truncated=True), kl_coef=0.1)
    # The cut row has no score: 0.1 alone at its end, and the value 0.6 of what would follow:
    # A_1 = 0.1 + 0.5 · 0.6 - 0.4 = 0;  A_0 = -0.05 + 0.5 · 0.4 - 0.2 + 0.25 · 0
    first, second = by_row(buffer, "advantages")
    assert_close(first, [-0.05, 0.0])
    assert_close(by_row(buffer, "returns")[0], [0.15, 0.4])
    assert_close(second, [-1.12])  # that ended by itself: as without it


def test_rewards_of_single_tokens_come_beside_the_score_by_hand():
    buffer = hand_buffer()
    extra = torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=f64)
    buffer.update(lambda m: m._replace(given_rewards=extra[m.rows]))
    assign_credit(buffer, HAND, kl_coef=0.1)
    first, second = by_row(buffer, "rewards")
    assert_close(first, [0.95, 3.1])
    assert_close(second, [1.98])


def test_rewards_of_single_tokens_reach_their_tokens():
    def by_place(completions):
        total = torch.zeros(len(completions.completions))
        return Scores(total, {}, [list(map(float, ids)) for ids in completions.response_ids])

    steps, _ = run_steps(config_of(steps=1, save_rollouts=True), by_place)
    for row in steps[0].samples:
        assert row["rewards"] == pytest.approx(row["response_ids"], abs=1e-6)  # KL is 0 here
    mean = sum(sum(row["response_ids"]) for row in steps[0].samples) / 4
    assert steps[0].metrics["objective/scores"] == pytest.approx(mean, abs=1e-5)
    assert steps[0].metrics["objective/rlhf_reward"] == pytest.approx(mean, abs=1e-5)


# ---- scores --------------------------------------------------------------------------------------


def test_scores_are_scaled_by_all_of_the_run_so_far():
    given = iter([[1.0, 3.0, 5.0, 7.0], [2.0, 2.0, 2.0, 2.0]])
    config = config_of(steps=2, score_scaling="normalize", score_clip=1.1, save_rollouts=True)
    steps, state = run_steps(config, lambda completions: torch.tensor(next(given)))
    first, second = ([row["score"] for row in step.samples] for step in steps)
    std = math.sqrt(20 / 3)  # the first four: mean 4
    assert first == pytest.approx([-1.1, -1 / std, 1 / std, 1.1], abs=1e-6)
    assert second == pytest.approx([-0.5] * 4, abs=1e-6)  # all eight: mean 3, std 2
    assert [step.metrics["objective/scores"] for step in steps] == [4.0, 2.0]
    assert steps[1].metrics["objective/learned_scores"] == pytest.approx(-0.5, abs=1e-6)
    assert state.score_moments == [8, 3.0, 28.0]


def test_scores_are_scaled_as_the_rule_for_cut_responses_leaves_them():
    config = config_of(steps=1, score_scaling="scale", missing_eos_penalty=3.0, max_new_tokens=3)
    steps, state = run_steps(config, lambda c: torch.full((len(c.completions),), 2.0))
    ended = steps[0].metrics["health/eos_rate"] * 4
    assert 0 < ended < 4
    # scores of 2, and -1 for those that were cut
    count, mean, squares = state.score_moments
    assert (count, mean) == (4, pytest.approx((2 * ended - (4 - ended)) / 4))
    assert squares == pytest.approx(ended * (2 - mean) ** 2 + (4 - ended) * (-1 - mean) ** 2)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"missing_eos_penalty": 0.5}, 1.5),
        ({"missing_eos_penalty": 0.5, "missing_eos": "replace"}, -0.5),
        ({"missing_eos": "replace"}, 0.0),
    ],
)
def test_missing_eos_rule_meets_cut_responses_alone(settings, expected):
    config = config_of(steps=1, save_rollouts=True, **settings)
    steps, _ = run_steps(config, lambda c: torch.full((4,), 2.0))
    seen = {(row["finish_reason"], row["score"]) for row in steps[0].samples}
    assert seen == {("eos", 2.0), ("length", expected)}


def test_missing_eos_ramp_grows_before_the_limit():
    config = config_of(
        steps=1, save_rollouts=True, missing_eos="ramp", missing_eos_penalty=2.0,
        missing_eos_buffer=4,
    )
    steps, _ = run_steps(config, lambda c: torch.zeros(4))
    for row in steps[0].samples:  # of 6 tokens: nothing up to 2, then 0.5 a token
        assert row["score"] == pytest.approx(-0.5 * max(0, len(row["response_ids"]) - 2))
    assert len({row["score"] for row in steps[0].samples}) > 1


# ---- the loss ------------------------------------------------------------------------------------


def hand_step(monkeypatch, policy=None, **settings):
    """One step of rate 1 on the hand-made rollout: (minus the gradient of the log-probs, stats)."""
    monkeypatch.setattr(recipe, "policy_pass", table_pass)
    policy = policy or moved_table()
    before = policy.logprobs.detach().clone()
    counters: dict[str, int] = {}
    config = changed(**settings)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    stats = ppo_step(policy, optimizer, hand_buffer(), config, counters=counters)
    return policy.logprobs.detach() - before, stats, counters


def test_kl_loss_by_hand(monkeypatch):
    settings = {"kl_coef": 0.3, "kl_in": "loss", "kl_estimator": "k2"}
    step, stats, _ = hand_step(monkeypatch, **settings)
    # log(new / ref): -1 + log 1.5 + 1.5, -2 - log 2 + 1, -0.5 - log 2 + 0.7; k2 is half its square
    d = [0.5 + log(1.5), -1 - log(2), 0.2 - log(2)]
    assert stats.kl_loss == pytest.approx(0.3 * sum(x * x / 2 for x in d) / 3, abs=1e-7)
    assert stats.non_score_reward == 0
    # the rewards are the scores alone: A_1 = 1 - 0.4, A_0 = 0.5 · 0.4 - 0.2 + 0.25 · 0.6, A = -1.1;
    # the first and the last are clipped (ratios 1.5 and 0.5), so the policy moves the second only
    expected = [[-0.3 * d[0] / 3, 0.6 * 0.5 / 3 - 0.3 * d[1] / 3], [-0.3 * d[2] / 3, 0.0]]
    assert_close(step, expected)


def test_entropy_bonus_by_hand(monkeypatch):
    _, stats, _ = hand_step(monkeypatch, entropy_coef=0.5)
    # as without it, less half the mean of 1, 2 and 3
    assert stats.loss == pytest.approx(0.132 + 0.1 * 0.2558375 - 0.5 * 2.0, abs=1e-7)


def test_dual_clip_bounds_the_loss_of_a_bad_token_by_hand(monkeypatch):
    logprobs = [[-1.0, -2.0], [-0.5 + log(4.0), 0.0]]  # ratios 1, 1 and 4
    for clip, loss in ((None, 4 * 1.12), (3.0, 3 * 1.12)):
        policy = Table(logprobs, [[0.2, 0.4], [0.1, 0.0]], [[1.0, 1.0], [1.0, 0.0]])
        step, stats, _ = hand_step(monkeypatch, policy, dual_clip=clip)
        assert stats.policy_loss == pytest.approx((-0.125 - 0.7 + loss) / 3, abs=1e-7)
        assert_close(step[1, 0], 0.0 if clip else -4 * 1.12 / 3)


def test_max_ratio_leaves_an_update_out_and_counts_it(monkeypatch):
    logprobs = [[-1 + log(3.0), -2.0], [-0.5, 0.0]]  # ratios 3, 1 and 1: mean 5 / 3
    for limit, made in ((1.67, True), (1.66, False)):
        policy = Table(logprobs, [[0.5, 0.4], [0.1, 0.0]], [[1.0, 1.0], [1.0, 0.0]])
        before = parameters(policy).clone()
        _, stats, counters = hand_step(monkeypatch, policy, max_ratio=limit)
        assert torch.equal(parameters(policy), before) != made
        assert counters == ({} if made else {"skipped_ratio": 1})
        assert stats.ratio == pytest.approx(5 / 3, abs=1e-7)  # it is told all the same


@pytest.mark.parametrize(("limit", "epochs"), [(0.1602, 1), (0.1604, 3), (None, 3)])
def test_early_stop_by_hand(monkeypatch, limit, epochs):
    monkeypatch.setattr(recipe, "policy_pass", table_pass)
    policy, counters = moved_table(), {}
    # ratio - 1 - log ratio of 1.5, 0.5 and 0.5: 0.0945349 and twice 0.1931472; mean 0.1602764
    config = changed(early_stop_kl=limit, epochs=3)
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    stats = ppo_step(policy, optimizer, hand_buffer(), config, counters=counters)
    assert stats.epochs == epochs
    assert counters == ({} if epochs == 3 else {"early_stops": 1})
    # Where the last epoch goes too far there is none left to end.
    counters.clear()
    config = changed(early_stop_kl=limit, epochs=2)
    monkeypatch.setattr(recipe, "moved_too_far", lambda *_: len(moved) or moved.append(1))
    moved: list[int] = []
    stats = ppo_step(policy, optimizer, hand_buffer(), config, counters=counters)
    assert (stats.epochs, counters, len(moved)) == (2, {}, 1)


@pytest.mark.parametrize("far", [0, 1])
def test_early_stop_looks_at_the_last_epoch_as_a_whole(monkeypatch, far):
    """Two mini-batches an epoch, one of two tokens and one of one; in the second epoch one of them
    has moved by 1 nat: k3 is e - 2 = 0.718, whose mean over three tokens is 0.239 or 0.479."""
    passes = []

    def moved(policy, micro, temperature):
        new = table_pass(policy, micro, temperature)
        shift = 1.0 if len(passes) == 2 + far else 0.0
        passes.append(shift)
        return new._replace(logprobs=micro.old_logprobs + shift)

    monkeypatch.setattr(recipe, "policy_pass", moved)
    for limit, epochs in ((0.2, 2), (0.5, 3)):
        passes.clear()
        policy, counters = moved_table(), {}
        config = changed(early_stop_kl=limit, epochs=3, mini_batches=2)
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        stats = ppo_step(policy, optimizer, hand_buffer(1), config, counters=counters)
        assert (stats.epochs, len(passes)) == (epochs, 2 * epochs)
        assert counters == ({"early_stops": 1} if epochs == 2 else {})


def full_laws(policy, ref, buffer, temperature=1.0):
    """(N, V) log-laws of policy and reference at all response tokens, in the buffer's order."""
    laws = []
    for lm in (policy.lm, ref):
        rows = []
        for micro in buffer.micro_batches:
            mask = micro.response_mask
            states = response_states(lm(micro.tokens), micro.prompt_lengths, mask.shape[1])
            rows.append((lm.logits(states[mask]) / temperature).log_softmax(-1))
        laws.append(torch.cat(rows))
    return laws


def other_ref():
    ref = tiny_lm(f64)
    with torch.no_grad():
        ref.lm_head.weight.mul_(0.7)
    return ref


def gradient_of(policy, loss) -> torch.Tensor:
    grads = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
    zeros = (torch.zeros_like(p) for p in policy.parameters())
    return torch.cat([(z if g is None else g).flatten() for g, z in zip(grads, zeros, strict=True)])


def test_entropy_bonus_has_the_gradient_of_the_mean_entropy():
    policy = tiny_policy(f64)
    buffer = measured(policy)
    law, _ = full_laws(policy, tiny_lm(f64), buffer)
    expected = gradient_of(policy, -(law.exp() * law).sum(-1).mean())
    start = {name: p.clone() for name, p in policy.state_dict().items()}
    without, _ = plain_step(measured(policy), policy)
    policy.load_state_dict(start)
    with_it, _ = plain_step(buffer, policy, entropy_coef=1.0)
    assert_close(with_it - without, expected, atol=1e-9)


@pytest.mark.parametrize(
    "changes", [{"score_scaling": "scale"}, {"score_clip": 1.0}, {"missing_eos": "replace"}]
)
def test_rewards_of_tokens_are_refused_where_they_would_pass_by_a_setting(changes):
    def each(completions):
        tokens = [[1.0] * len(ids) for ids in completions.response_ids]
        total = torch.zeros(len(tokens))
        return Scores(total, {"each": total}, tokens)

    name = next(iter(changes))
    with pytest.raises(UserError, match=f"^{name}.* changes the score .*step 1"):
        run_steps(config_of(steps=1, **changes), each)
    run_steps(config_of(steps=1), each)


def test_learned_scores_of_cut_responses_are_those_of_the_critic():
    """What PPO learns from: the score of those that ended, 0 for those that the length cut."""
    config = config_of(steps=1, bootstrap_truncated=True, max_new_tokens=3)
    steps, _ = run_steps(config, lambda c: torch.full((len(c.completions),), 2.0))
    metrics = steps[0].metrics
    assert 0 < metrics["health/eos_rate"] < 1
    expected = 2 * metrics["health/eos_rate"]
    assert metrics["objective/learned_scores"] == pytest.approx(expected, abs=1e-6)


def test_full_kl_in_the_loss_needs_a_reference():
    policy = tiny_policy(f64)
    config = config_of(kl_in="loss", kl_estimator="full")
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=r"^ref is None: a full KL in the loss needs it"):
        ppo_step(policy, optimizer, measured(policy), config)


@pytest.mark.parametrize("rows", [1, 5])
def test_full_kl_in_the_loss_has_its_gradient(rows):
    policy, ref = tiny_policy(f64), other_ref()

    def buffer_of():
        buffer = measured(policy, rows, ref=ref)
        measure(policy, ref, buffer, 1.0, keep_ref_states=True)
        return buffer

    law, ref_law = full_laws(policy, ref, buffer_of())
    kl = (law.exp() * (law - ref_law.detach())).sum(-1).mean()
    expected, kl = gradient_of(policy, kl), float(kl.detach())
    start = {name: p.clone() for name, p in policy.state_dict().items()}
    settings = {"epochs": 1, "max_grad_norm": None, "kl_in": "loss", "kl_estimator": "full"}
    moved = []
    for coef in (0.0, 2.0):
        policy.load_state_dict(start)
        before = parameters(policy)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        config = config_of(**settings, kl_coef=coef)
        stats = ppo_step(policy, optimizer, buffer_of(), config, ref=ref)
        moved.append(parameters(policy) - before)
    assert stats.kl_loss == pytest.approx(2 * kl, abs=1e-9)
    assert_close(moved[1] - moved[0], -2 * expected, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_kl_in_the_reward_is_that_of_the_whole_law(temperature):
    policy, ref = tiny_policy(f64), other_ref()
    buffer = measured(policy, ref=ref, temperature=temperature)
    measure(policy, ref, buffer, temperature, full_kl=True)
    law, ref_law = full_laws(policy, ref, buffer, temperature)
    kl = (law.exp() * (law - ref_law)).sum(-1)
    assert kl.min() > 0
    assert_close(buffer.tokens("full_kl"), kl.detach(), atol=1e-9)
    assert all(micro.ref_states is None for micro in buffer.micro_batches)  # not held for nothing
    assign_credit(buffer, config_of(kl_estimator="full"), kl_coef=0.5)
    for micro in buffer.micro_batches:
        for b, length in enumerate(micro.response_lengths.tolist()):
            expected = -0.5 * micro.full_kl[b, :length]
            expected[-1] += micro.scores[b]
            assert_close(micro.rewards[b, :length], expected)


def test_full_kl_is_that_of_what_could_be_drawn():
    """On a support S of the sampled law both laws are renormalised, and the KL runs over S."""
    policy, ref, config = tiny_policy(f64), other_ref(), config_of(top_k=3)
    keys = streams.key(0, "test", torch.arange(len(PROMPTS)))
    _, rollout = sample(policy.lm, PROMPTS, keys, sampling_of(config), Letters(), len(PROMPTS))
    buffer = RolloutBuffer(2, 99)
    buffer.add(rollout)
    measure(policy, ref, buffer, 1.0, full_kl=True)
    law, ref_law = full_laws(policy, ref, buffer)
    least = law.topk(3, dim=-1).values[:, -1:]
    inside = law >= least
    p, q = (x.masked_fill(~inside, -torch.inf).log_softmax(-1) for x in (law, ref_law))
    kl = torch.where(inside, p.exp() * (p - q), 0).sum(-1)
    assert_close(buffer.tokens("full_kl"), kl.detach(), atol=1e-9)


def text(*ids: int) -> Text:
    return Text(list(ids), 0, "texts:1", {})


TEXTS = [text(0, 3, 4, 5), text(0, 6), text(0, 7, 8), text(0, 2, 2, 2, 2)]


@pytest.mark.parametrize("micro_batch_tokens", [1, 99])
def test_text_mix_adds_the_gradient_of_the_mean_loss_of_its_texts(micro_batch_tokens):
    lm, mix = tiny_lm(f64), TextMix(TEXTS, 0.5, 2, micro_batch_tokens, seed=0)
    seen = []
    for update in (0, 1):  # two texts each: together all four
        rows = next_rows(2 * update, 2, 4, 0, "text order").tolist()
        seen += rows
        losses = []
        for row in rows:
            ids = torch.tensor(TEXTS[row].ids)
            law = lm.logits(lm(ids[None]))[0, :-1].log_softmax(-1)
            losses.append(-law.gather(-1, ids[1:, None])[:, 0])
        expected = torch.cat(losses).mean()  # every token weighs the same
        gradients = torch.autograd.grad(0.5 * expected, list(lm.parameters()))
        lm.zero_grad()
        assert mix.backward(lm, update) == pytest.approx(float(expected.detach()), abs=1e-9)
        for p, gradient in zip(lm.parameters(), gradients, strict=True):
            assert_close(p.grad, gradient, atol=1e-9)
    assert sorted(seen) == [0, 1, 2, 3]


def test_ppo_step_mixes_texts_into_each_update_but_not_while_the_critic_warms_up():
    policy = tiny_policy(f64)
    start = {name: p.clone() for name, p in policy.state_dict().items()}
    moved = {}
    for mixed, warmup in ((False, 0), (True, 0), (False, 1), (True, 1)):
        policy.load_state_dict(start)
        mix = TextMix(TEXTS, 0.5, 2, 99, seed=0) if mixed else None
        config = config_of(
            epochs=1, max_grad_norm=None, critic_warmup_steps=warmup
        )
        before, optimizer = parameters(policy), torch.optim.SGD(policy.parameters(), lr=1.0)
        stats = ppo_step(policy, optimizer, measured(policy), config, 0, mix=mix)
        moved[mixed, warmup] = parameters(policy) - before
        policy.load_state_dict(start)
        policy.zero_grad()
        loss = TextMix(TEXTS, 0.5, 2, 99, seed=0).backward(policy.lm, 0)
        expected = loss if mixed and not warmup else 0.0
        assert stats.ptx_loss == pytest.approx(expected, abs=1e-9)
        parts = stats.policy_loss + config.vf_coef * stats.value_loss + 0.5 * expected
        assert stats.loss == pytest.approx(parts, abs=1e-9)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
        gradient = torch.cat([g.flatten() for g in grads])
    assert_close(moved[True, 0] - moved[False, 0], -gradient, atol=1e-9)
    assert torch.equal(moved[True, 1], moved[False, 1])


def test_the_kl_coefficient_waits_for_the_policy_to_learn():
    config = config_of(steps=4, critic_warmup_steps=2, kl_target=5.0, kl_horizon=100.0)
    steps, state = run_steps(config)
    used = [step.metrics["objective/kl_coef"] for step in steps]
    assert used[:3] == [config.kl_coef] * 3  # in force, not changed before step 3 is done
    assert used[3] < config.kl_coef and state.kl_coef < used[3]


def test_a_token_that_the_reference_lacks_is_named():
    config, policy = config_of(steps=1), tiny_policy()
    ref = tiny_lm(vocab_size=4)
    loop = ppo(state_of(policy, config), PROMPTS, letter_d, ref, Letters(), config)
    with pytest.raises(UserError, match=r"^vocabulary: token \d+ was sampled, the reference has 4"):
        next(loop)
    policy = critic_from_reward_model(tiny_lm(), RewardModel(tiny_lm(vocab_size=4)))
    loop = ppo(state_of(policy, config), PROMPTS, letter_d, tiny_lm(), Letters(), config)
    with pytest.raises(UserError, match=r"^vocabulary: token \d+ was sampled, the critic has 4"):
        next(loop)


def test_each_update_of_a_run_mixes_its_own_texts():
    class Recorded(TextMix):
        def backward(self, lm, number):
            numbers.append(number)
            return super().backward(lm, number)

    numbers: list[int] = []
    config = config_of(steps=2, mini_batches=2, ptx_coef=0.5, ptx_data="texts")
    state = state_of(tiny_policy(), config)
    mix = Recorded(TEXTS, 0.5, 2, 99, seed=0)
    list(ppo(state, PROMPTS, letter_d, tiny_lm(), Letters(), config, mix))
    assert numbers == list(range(8))


# ---- the critic ----------------------------------------------------------------------------------


def own_critic(dtype=torch.float32):
    scorer = initialize_score(RewardModel(tiny_lm(dtype)), torch.Generator().manual_seed(5))
    return critic_from_reward_model(tiny_lm(dtype), scorer)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [tiny_policy, own_critic])
def test_only_the_critic_learns_while_it_warms_up(make, dtype):
    policy = make(dtype)
    config = config_of(steps=3, critic_warmup_steps=2, epochs=1)
    state = state_of(policy, config)
    loop, lm, critic = ppo(state, PROMPTS, letter_d, tiny_lm(dtype), Letters(), config), [], []
    for step in loop:
        lm.append(parameters(policy.lm).clone())
        critic.append(torch.cat([p.detach().flatten() for p in policy.value_parameters()]))
        assert (step.metrics["objective/kl"] == 0) == (step.number <= 3)  # of the rollout before it
    start = parameters(make(dtype).lm)
    assert torch.equal(lm[0], start) and torch.equal(lm[1], start) and not torch.equal(lm[2], start)
    assert not torch.equal(critic[0], critic[1])


def own_critic_with_adapters():
    return add_lora(own_critic(), 2, 8.0, 0)


@pytest.mark.parametrize("make", [tiny_policy, own_critic, own_critic_with_adapters])
def test_a_policy_that_waits_for_its_critic_keeps_no_graph(make, monkeypatch):
    policy, config = make(), config_of(critic_warmup_steps=1)
    trained = [p for p in policy.lm.parameters() if p.requires_grad]

    def passed(*args):
        made.append(policy_pass(*args))
        return made[-1]

    made: list[TokenPass] = []
    monkeypatch.setattr(recipe, "policy_pass", passed)
    buffer, optimizer = measured(policy), torch.optim.SGD(policy.parameters(), lr=0.1)
    ppo_step(policy, optimizer, buffer, config, iteration=0)
    assert made and all(x.values.requires_grad and not x.logprobs.requires_grad for x in made)
    made.clear()
    with pytest.raises(ValueError, match="iteration is None: critic_warmup_steps needs it"):
        ppo_step(policy, optimizer, buffer, config)
    ppo_step(policy, optimizer, buffer, config, iteration=1)
    assert all(x.logprobs.requires_grad for x in made)
    assert trained == [p for p in policy.lm.parameters() if p.requires_grad]


def test_a_critic_of_its_own_is_clipped_by_itself():
    policy = own_critic(f64)
    buffer = measured(policy)
    start = {name: p.clone() for name, p in policy.state_dict().items()}
    (_, free) = plain_step(buffer, policy)
    policy.load_state_dict(start)
    step, clipped = plain_step(measured(policy), policy, max_grad_norm=1e-3)
    assert clipped.grad_norm == pytest.approx(free.grad_norm) and free.grad_norm > 1e-3
    assert clipped.critic_grad_norm == pytest.approx(free.critic_grad_norm)
    assert free.critic_grad_norm > 1e-3
    size = sum(p.numel() for p in policy.lm.parameters())
    assert float(step[:size].norm()) == pytest.approx(1e-3, rel=1e-6)
    assert float(step[size:].norm()) == pytest.approx(1e-3, rel=1e-6)


def test_gradient_checkpointing_changes_no_bit():
    ends = []
    for checkpointing in (False, True):
        policy = tiny_policy()
        policy.lm.model.checkpointing = checkpointing
        _, state = run_steps(config_of(steps=2), policy=policy)
        ends.append(parameters(state.model))
    assert torch.equal(*ends)


# ---- the law that is sampled ---------------------------------------------------------------------

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
def every_answer(policy, sampling, weigh) -> tuple[RolloutBuffer, torch.Tensor]:
    """A rollout of every one-token answer that could be drawn to one prompt, and the law (K,)."""
    hidden = policy.lm(torch.tensor([[3, 4]]))[:, -1]
    law = sampling_distribution(policy.lm.logits(hidden), sampling)[0]
    ids = (law > -math.inf).nonzero()[:, 0]
    buffer, K = RolloutBuffer(2, 99), len(ids)
    buffer.add(
        Rollout(
            rows=torch.arange(K),
            tokens=torch.stack([torch.tensor([3, 4, i]) for i in ids.tolist()]),
            prompt_lengths=torch.full((K,), 2),
            response_mask=torch.ones(K, 1, dtype=torch.bool),
            scores=weigh(ids, law[ids].exp()),
            truncated=torch.zeros(K, dtype=torch.bool),
            support=RowSupport([ids.int()] * K, torch.full((K, 1), K)),
        )
    )
    return buffer, law[ids].exp()


@torch.no_grad()
def test_the_kl_of_a_narrowed_law_is_a_kl():
    """Its expectation under the law that is sampled is the divergence of the two narrowed laws; of
    the models' own log-probs the same sum is another number, which may be below 0."""
    policy, ref, sampling = tiny_policy(f64), other_ref(), sampling_of(config_of(top_k=3))
    buffer, law = every_answer(policy, sampling, lambda ids, law: torch.zeros(len(ids), dtype=f64))
    measure(policy, ref, buffer, 1.0)
    order = torch.cat([micro.rows for micro in buffer.micro_batches])
    old, reference = buffer.tokens("old_logprobs"), buffer.tokens("ref_logprobs")
    assert_close(old.exp(), law[order])
    (ids,) = {tuple(row.tolist()) for m in buffer.micro_batches for row in m.support.rows}
    q = ref.logits(ref(torch.tensor([[3, 4]]))[:, -1])[0, list(ids)].softmax(-1)
    divergence = float((law * (law / q).log()).sum())
    assert divergence > 0
    assert float((law[order] * (old - reference)).sum()) == pytest.approx(divergence, abs=1e-9)
    p_all, q_all = (lm.logits(lm(torch.tensor([[3, 4]]))[:, -1])[0].log_softmax(-1)
                    for lm in (policy.lm, ref))
    naive = float((law * (p_all - q_all)[list(ids)]).sum())
    assert abs(naive - divergence) > 0.01


@pytest.mark.parametrize("settings", [{"top_k": 3}, {"top_p": 0.7, "temperature": 0.8}])
def test_the_policy_gradient_is_that_of_the_expected_score_under_the_law_sampled(settings):
    """Over all answers, weighted by their probability, the loss's gradient is that of minus the
    expected score: the estimand of PPO's first step, whatever sampling leaves out."""
    policy, config = tiny_policy(f64), config_of(**settings)
    with torch.no_grad():
        policy.v_head.weight.zero_()
    value = torch.linspace(-1, 2, 20, dtype=f64)  # the score of each token as an answer

    def weigh(ids, law):  # a mean over the K rows becomes the expectation
        return value[ids] * law * len(ids)

    buffer, _ = every_answer(policy, sampling_of(config), weigh)
    measure(policy, tiny_lm(f64), buffer, config.temperature)
    (ids,) = {tuple(row.tolist()) for m in buffer.micro_batches for row in m.support.rows}
    logits = policy.lm.logits(policy.lm(torch.tensor([[3, 4]]))[:, -1])[0, list(ids)]
    expected_score = ((logits / config.temperature).softmax(-1) * value[list(ids)]).sum()
    gradient = gradient_of(policy, expected_score)
    step, stats = plain_step(
        buffer, policy, **settings, whiten_advantages=False, kl_coef=0.0, vf_coef=0.0,
        batch_size=len(ids),
    )
    assert stats.first_ratio_gap == 0
    assert gradient.abs().max() > 1e-3
    assert_close(step, gradient, atol=1e-9)


# ---- resuming ------------------------------------------------------------------------------------

EVERYTHING = [
    {
        "score_scaling": "normalize", "score_clip": 1.0, "top_p": 0.9, "min_new_tokens": 2,
        "kl_estimator": "full", "early_stop_kl": 1e-3, "max_ratio": 1.2, "whiten_rewards": True,
        "critic_warmup_steps": 1, "critic_learning_rate": 0.05, "dual_clip": 3.0, "mini_batches": 2,
    },
    {
        "kl_in": "loss", "kl_estimator": "full", "bootstrap_truncated": True, "entropy_coef": 0.01,
        "score_scaling": "scale", "kl_target": 0.1, "kl_horizon": 20.0,
    },
]


def fresh_state(config):
    policy = tiny_policy()
    state, critic = state_of(policy, config), policy.value_parameters()
    state.optimizer = make_optimizer(policy, 1e-2, critic=critic, critic_lr_scale=5.0)
    return state


def steps_from(state, config):
    return ppo(state, PROMPTS, letter_d, tiny_lm(), Letters(), config)


@pytest.mark.parametrize("settings", EVERYTHING)
def test_dropping_and_rebuilding_the_generator_changes_no_bit_of_any_setting(settings, tmp_path):
    config = config_of(save_rollouts=True, **settings)
    whole = fresh_state(config)
    expected = [(step.metrics, step.samples) for step in steps_from(whole, config)]
    state, got = fresh_state(config), []
    for _ in range(4):
        step = next(steps_from(state, config))
        got.append((step.metrics, step.samples))
        commit = save_checkpoint(state, tmp_path)
        state = fresh_state(config)
        load_checkpoint(state, commit)
    assert json.dumps(got) == json.dumps(expected)
    assert torch.equal(parameters(state.model), parameters(whole.model))
    assert (state.counters, state.score_moments) == (whole.counters, whole.score_moments)


def test_the_first_of_these_settings_count_early_stops():
    """Else the test above would compare counters in which nothing was counted."""
    config = config_of(**EVERYTHING[0])
    state = fresh_state(config)
    assert len(list(steps_from(state, config))) == 4
    assert state.counters["early_stops"] > 0
