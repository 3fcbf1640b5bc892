"""What each of PPO's settings does to rewards, losses and updates: by hand, and on a tiny model."""

import math
from math import log

import pytest
import torch

from minirlhf.batches.credit import assign_credit
from minirlhf.batches.demonstrations import TextMix
from minirlhf.batches.rollouts import TokenPass, measure, policy_pass
from minirlhf.data.batching import next_rows
from minirlhf.data.examples import Text
from minirlhf.errors import UserError
from minirlhf.models.heads import RewardModel, critic_from_reward_model, initialize_score
from minirlhf.models.lora import add_lora
from minirlhf.recipes import ppo as recipe
from minirlhf.recipes.ppo import ppo_step
from minirlhf.rewards.source import Scores
from tests.tiny_ppo import (
    Table,
    assert_close,
    assert_rows,
    config_of,
    f64,
    full_distributions,
    gradient_of,
    hand_buffer,
    hand_config,
    hand_step,
    measured,
    other_ref,
    parameters,
    plain_step,
    run_steps,
    state_of,
    steps_from,
    table_pass,
    tiny_lm,
    tiny_policy,
)

# ---- rewards -------------------------------------------------------------------------------------


# log(policy / ref) of the hand-made rollout: 0.5, -1 and 0.2; scores 1 and -1; kl_coef 0.1
@pytest.mark.parametrize(
    ("settings", "rewards"),
    [
        ({"kl_estimator": "k1"}, [[-0.05, 1.1], [-1.02]]),
        ({"kl_estimator": "k2"}, [[-0.0125, 0.95], [-1.002]]),  # half the square
        (
            {"kl_estimator": "k3"},  # exp(-d) - 1 + d
            [[-0.1 * (math.exp(-0.5) - 0.5), 1.2 - 0.1 * math.e], [-0.92 - 0.1 * math.exp(-0.2)]],
        ),
        ({"kl_estimator": "abs"}, [[-0.05, 0.9], [-1.02]]),
        ({"kl_estimator": "k2", "kl_in": "loss"}, [[0.0, 1.0], [-1.0]]),
        # -0.05, 1.1, -1.02: mean 0.01, variance (0.06² + 1.09² + 1.03²) / 3, its root 0.8665256
        (
            {"whiten_rewards": True},
            [[-0.06 / 0.8665256 + 0.01, 1.09 / 0.8665256 + 0.01], [-1.03 / 0.8665256 + 0.01]],
        ),
    ],
    ids=["k1", "k2", "k3", "abs", "in the loss", "whitened"],
)
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_rewards_by_hand(settings, rewards, micro_batch_size):
    buffer = hand_buffer(micro_batch_size)
    assign_credit(buffer, hand_config(**settings), kl_coef=0.1)
    assert_rows(buffer, "rewards", rewards)


def test_bootstrap_truncated_by_hand():
    buffer = hand_buffer()
    truncated, ends = torch.tensor([True, False]), torch.tensor([0.6, 9.0], dtype=f64)
    buffer.map(lambda m: m._replace(truncated=truncated[m.rows], last_values=ends[m.rows]))
    assign_credit(buffer, hand_config(bootstrap_truncated=True), kl_coef=0.1)
    # The truncated row has no score: 0.1 alone at its end, and the value 0.6 of what would follow:
    # A_1 = 0.1 + 0.5 · 0.6 - 0.4 = 0;  A_0 = -0.05 + 0.5 · 0.4 - 0.2 + 0.25 · 0
    # The row that ended by itself is as without it.
    assert_rows(buffer, "advantages", [[-0.05, 0.0], [-1.12]])
    assert_rows(buffer, "returns", [[0.15, 0.4], [-1.02]])


def tokens_alone(completions) -> Scores:
    """Each token is rewarded with its id, the response with nothing."""
    total = torch.zeros(len(completions.completions))
    return Scores(total, {}, [list(map(float, ids)) for ids in completions.response_ids])


def test_rewards_of_single_tokens_reach_their_tokens():
    steps, _ = run_steps(config_of(steps=1, save_rollouts=True), tokens_alone)
    for row in steps[0].samples:
        assert row["rewards"] == pytest.approx(row["response_ids"], abs=1e-6)  # KL is 0 here
    mean = sum(sum(row["response_ids"]) for row in steps[0].samples) / 4
    assert steps[0].metrics["objective/scores"] == pytest.approx(mean, abs=1e-5)
    assert steps[0].metrics["objective/rlhf_reward"] == pytest.approx(mean, abs=1e-5)


@pytest.mark.parametrize(
    "changes", [{"score_scaling": "scale"}, {"score_clip": 1.0}, {"missing_eos": "replace"}]
)
def test_rewards_of_tokens_are_refused_where_they_would_pass_by_a_setting(changes):
    name = next(iter(changes))
    with pytest.raises(UserError, match=f"^{name}.* changes the score .*step 1"):
        run_steps(config_of(steps=1, **changes), tokens_alone)


# ---- scores --------------------------------------------------------------------------------------


def twos(completions) -> torch.Tensor:
    return torch.full((len(completions.completions),), 2.0)


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


def test_scores_are_scaled_as_the_rule_for_truncated_responses_leaves_them():
    config = config_of(steps=1, score_scaling="scale", missing_eos_penalty=3.0, max_new_tokens=3)
    steps, state = run_steps(config, twos)
    ended = steps[0].metrics["health/eos_rate"] * 4
    assert 0 < ended < 4
    # scores of 2, and -1 for those that were truncated
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
def test_missing_eos_rule_meets_truncated_responses_alone(settings, expected):
    steps, _ = run_steps(config_of(steps=1, save_rollouts=True, **settings), twos)
    seen = {(row["finish_reason"], row["score"]) for row in steps[0].samples}
    assert seen == {("eos", 2.0), ("length", expected)}


def test_missing_eos_ramp_grows_before_the_limit():
    ramp = {"missing_eos": "ramp", "missing_eos_penalty": 2.0, "missing_eos_buffer": 4}
    steps, _ = run_steps(config_of(steps=1, save_rollouts=True, **ramp), twos)
    for row in steps[0].samples:  # of 6 tokens: nothing up to 2, then 0.5 a token
        assert row["score"] == pytest.approx(2 - 0.5 * max(0, len(row["response_ids"]) - 2))
    assert len({row["score"] for row in steps[0].samples}) > 1


def test_learned_scores_of_truncated_responses_are_those_of_the_critic():
    """What PPO learns from: the score of those that ended, 0 for those that were truncated."""
    config = config_of(steps=1, bootstrap_truncated=True, max_new_tokens=3)
    (step,), _ = run_steps(config, twos)
    assert 0 < step.metrics["health/eos_rate"] < 1
    expected = 2 * step.metrics["health/eos_rate"]
    assert step.metrics["objective/learned_scores"] == pytest.approx(expected, abs=1e-6)


# ---- the loss ------------------------------------------------------------------------------------


def test_kl_loss_by_hand():
    step = hand_step(hand_config(kl_coef=0.3, kl_in="loss", kl_estimator="k2"))
    # log(new / ref): -1 + log 1.5 + 1.5, -2 - log 2 + 1, -0.5 - log 2 + 0.7; k2 is half its square
    d = [0.5 + log(1.5), -1 - log(2), 0.2 - log(2)]
    assert step.stats.kl_loss == pytest.approx(0.3 * sum(x * x / 2 for x in d) / 3, abs=1e-7)
    assert step.stats.non_score_reward == 0
    # the rewards are the scores alone: A_1 = 1 - 0.4, A_0 = 0.5 · 0.4 - 0.2 + 0.25 · 0.6, A = -1.1;
    # the first and the last are clipped (ratios 1.5 and 0.5), so the policy moves the second only
    expected = [[-0.3 * d[0] / 3, 0.6 * 0.5 / 3 - 0.3 * d[1] / 3], [-0.3 * d[2] / 3, 0.0]]
    assert_close(step.logprobs, expected)


def test_entropy_bonus_by_hand():
    # as without it, less half the mean of 1, 2 and 3
    stats = hand_step(hand_config(entropy_coef=0.5)).stats
    assert stats.loss == pytest.approx(0.132 + 0.1 * 0.2558375 - 0.5 * 2.0, abs=1e-7)


@pytest.mark.parametrize(("clip", "bound"), [(None, 4), (3.0, 3)])
def test_dual_clip_bounds_the_loss_of_a_bad_token_by_hand(clip, bound):
    logprobs = [[-1.0, -2.0], [-0.5 + log(4.0), 0.0]]  # ratios 1, 1 and 4
    policy = Table(logprobs, [[0.2, 0.4], [0.1, 0.0]], [[1.0, 1.0], [1.0, 0.0]])
    step = hand_step(hand_config(dual_clip=clip), policy)
    assert step.stats.policy_loss == pytest.approx((-0.125 - 0.7 + bound * 1.12) / 3, abs=1e-7)
    assert_close(step.logprobs[1, 0], 0.0 if clip else -4 * 1.12 / 3)


@pytest.mark.parametrize(("limit", "made"), [(1.67, True), (1.66, False)])
def test_max_ratio_leaves_an_update_out_and_counts_it(limit, made):
    logprobs = [[-1 + log(3.0), -2.0], [-0.5, 0.0]]  # ratios 3, 1 and 1: mean 5 / 3
    policy = Table(logprobs, [[0.5, 0.4], [0.1, 0.0]], [[1.0, 1.0], [1.0, 0.0]])
    before = parameters(policy)
    step = hand_step(hand_config(max_ratio=limit), policy)
    assert torch.equal(parameters(policy), before) != made
    assert step.counters == ({} if made else {"skipped_ratio": 1})
    assert step.stats.ratio == pytest.approx(5 / 3, abs=1e-7)  # it is told all the same


# ratio - 1 - log ratio of 1.5, 0.5 and 0.5: 0.0945349 and twice 0.1931472; mean 0.1602764. Where
# the last epoch goes too far there is none left to end.
@pytest.mark.parametrize(
    ("limit", "epochs", "made"), [(0.1602, 3, 1), (0.1604, 3, 3), (None, 3, 3), (0.1602, 1, 1)]
)
def test_early_stop_by_hand(limit, epochs, made):
    step = hand_step(hand_config(early_stop_kl=limit, epochs=epochs), rate=0.0)
    assert step.stats.epochs == made
    assert step.counters == ({} if made == epochs else {"early_stops": 1})


@pytest.mark.parametrize("far", [0, 1])
@pytest.mark.parametrize(("limit", "epochs"), [(0.2, 2), (0.5, 3)])
def test_early_stop_looks_at_the_last_epoch_as_a_whole(far, limit, epochs):
    """Two mini-batches an epoch, one of two tokens and one of one; in the second epoch one of them
    has moved by 1 nat: k3 is e - 2 = 0.718, whose mean over three tokens is 0.239 or 0.479."""
    passes = []

    def moved(policy, micro, temperature):
        new = table_pass(policy, micro, temperature)
        passes.append(1.0 if len(passes) == 2 + far else 0.0)
        return new._replace(logprobs=micro.old_logprobs + passes[-1])

    config = hand_config(early_stop_kl=limit, epochs=3, mini_batches=2)
    step = hand_step(config, buffer=hand_buffer(1), rate=0.0, passes=moved)
    assert (step.stats.epochs, len(passes)) == (epochs, 2 * epochs)
    assert step.counters == ({"early_stops": 1} if epochs == 2 else {})


# ---- the loss on a tiny model --------------------------------------------------------------------


def test_entropy_bonus_has_the_gradient_of_the_mean_entropy():
    policy = tiny_policy(f64)
    buffer = measured(policy)
    logs, _ = full_distributions(policy, tiny_lm(f64), buffer)
    expected = gradient_of(policy, -(logs.exp() * logs).sum(-1).mean())
    with_it, _ = plain_step(buffer, policy, entropy_coef=1.0)
    policy = tiny_policy(f64)
    without, _ = plain_step(measured(policy), policy)
    assert_close(with_it - without, expected, atol=1e-9)


def test_full_kl_in_the_loss_needs_a_reference():
    policy = tiny_policy(f64)
    with pytest.raises(ValueError, match=r"^ref is None: a full KL in the loss needs it"):
        plain_step(measured(policy), policy, kl_in="loss", kl_estimator="full")


@pytest.mark.parametrize("rows", [1, 5])
def test_full_kl_in_the_loss_has_its_gradient(rows):
    ref, moved = other_ref(), []
    for coef in (0.0, 2.0):
        policy = tiny_policy(f64)
        buffer = measured(policy, rows, ref=ref)
        measure(policy, ref, buffer, 1.0, keep_ref_states=True)
        logs, ref_logs = full_distributions(policy, ref, buffer)
        kl = (logs.exp() * (logs - ref_logs.detach())).sum(-1).mean()
        expected, kl = gradient_of(policy, kl), float(kl.detach())
        settings = {"kl_in": "loss", "kl_estimator": "full", "kl_coef": coef}
        step, stats = plain_step(buffer, policy, {"ref": ref}, **settings)
        moved.append(step)
    assert stats.kl_loss == pytest.approx(2 * kl, abs=1e-9)
    assert_close(moved[1] - moved[0], -2 * expected, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_full_kl_in_the_reward_is_that_of_the_whole_distribution(temperature):
    policy, ref = tiny_policy(f64), other_ref()
    buffer = measured(policy, ref=ref, temperature=temperature)
    measure(policy, ref, buffer, temperature, full_kl=True)
    logs, ref_logs = full_distributions(policy, ref, buffer, temperature)
    kl = (logs.exp() * (logs - ref_logs)).sum(-1)
    assert kl.min() > 0
    assert_close(buffer.flat("full_kl"), kl.detach(), atol=1e-9)
    assert all(micro.ref_states is None for micro in buffer.micro_batches)  # not held for nothing
    assign_credit(buffer, config_of(kl_estimator="full"), kl_coef=0.5)
    for micro in buffer.micro_batches:
        for b, length in enumerate(micro.response_lengths.tolist()):
            expected = -0.5 * micro.full_kl[b, :length]
            expected[-1] += micro.scores[b]
            assert_close(micro.rewards[b, :length], expected)


def test_the_kl_coefficient_waits_for_the_policy_to_learn():
    config = config_of(steps=4, critic_warmup_steps=2, kl_target=5.0, kl_horizon=100.0)
    steps, state = run_steps(config)
    used = [step.metrics["objective/kl_coef"] for step in steps]
    assert used[:3] == [config.kl_coef] * 3  # in force, not changed before step 3 is done
    assert used[3] < config.kl_coef and state.kl_coef < used[3]


def test_a_token_that_the_reference_lacks_is_named():
    small, config = tiny_lm(vocab_size=4), config_of(steps=1)
    with pytest.raises(UserError, match=r"^vocabulary: token \d+ was sampled, the reference has 4"):
        run_steps(config, ref=small)
    policy = critic_from_reward_model(tiny_lm(), RewardModel(small))
    with pytest.raises(UserError, match=r"^vocabulary: token \d+ was sampled, the critic has 4"):
        run_steps(config, policy=policy)


# ---- texts mixed in ------------------------------------------------------------------------------

TEXTS = [
    Text(ids, 0, "texts:1", {}) for ids in ([0, 3, 4, 5], [0, 6], [0, 7, 8], [0, 2, 2, 2, 2])
]


@pytest.mark.parametrize("micro_batch_tokens", [1, 99])
def test_text_mix_adds_the_gradient_of_the_mean_loss_of_its_texts(micro_batch_tokens):
    lm, mix, seen = tiny_lm(f64), TextMix(TEXTS, 0.5, 2, micro_batch_tokens, seed=0), []
    for update in (0, 1):  # two texts each: together all four
        rows = next_rows(2 * update, 2, 4, 0, "text order").tolist()
        seen += rows
        losses = []
        for row in rows:
            ids = torch.tensor(TEXTS[row].ids)
            logs = lm.logits(lm(ids[None]))[0, :-1].log_softmax(-1)
            losses.append(-logs.gather(-1, ids[1:, None])[:, 0])
        expected = torch.cat(losses).mean()  # every token weighs the same
        gradients = torch.autograd.grad(0.5 * expected, list(lm.parameters()))
        lm.zero_grad()
        assert mix.backward(lm, update) == pytest.approx(float(expected.detach()), abs=1e-9)
        for p, gradient in zip(lm.parameters(), gradients, strict=True):
            assert_close(p.grad, gradient, atol=1e-9)
    assert sorted(seen) == [0, 1, 2, 3]


@pytest.mark.parametrize("warmup", [0, 1])
def test_ppo_step_mixes_texts_into_each_update_but_not_while_the_critic_warms_up(warmup):
    def step_with(mix):
        policy = tiny_policy(f64)
        more = {"iteration": 0, "mix": mix}
        return plain_step(measured(policy), policy, more, critic_warmup_steps=warmup)

    (plain, without), (mixed, stats) = step_with(None), step_with(TextMix(TEXTS, 0.5, 2, 99, 0))
    policy = tiny_policy(f64)
    loss = TextMix(TEXTS, 0.5, 2, 99, seed=0).backward(policy.lm, 0)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in policy.parameters()]
    expected = 0.0 if warmup else loss
    assert (without.ptx_loss, stats.ptx_loss) == pytest.approx((0.0, expected), abs=1e-9)
    parts = stats.policy_loss + 0.1 * stats.value_loss + 0.5 * expected
    assert stats.loss == pytest.approx(parts, abs=1e-9)
    if warmup:
        assert torch.equal(mixed, plain)
    else:
        assert_close(mixed - plain, -torch.cat([g.flatten() for g in grads]), atol=1e-9)


def test_each_update_of_a_run_mixes_its_own_texts():
    class Recorded(TextMix):
        def backward(self, lm, number):
            numbers.append(number)
            return super().backward(lm, number)

    numbers: list[int] = []
    config = config_of(steps=2, mini_batches=2, ptx_coef=0.5, ptx_data="texts")
    run_steps(config, mix=Recorded(TEXTS, 0.5, 2, 99, seed=0))
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
    lm, critic = [parameters(policy.lm)], []
    for step in steps_from(state_of(policy, config), config):
        lm.append(parameters(policy.lm))
        critic.append(torch.cat([p.detach().flatten() for p in policy.value_parameters()]))
        assert (step.metrics["objective/kl"] == 0) == (step.number <= 3)  # of the rollout before it
    assert [torch.equal(lm[0], later) for later in lm[1:]] == [True, True, False]
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
    _, free = plain_step(measured(policy), policy)
    policy = own_critic(f64)
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
