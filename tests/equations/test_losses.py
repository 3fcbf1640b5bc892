import doctest
import itertools
import math
from functools import partial

import pytest
import torch

from minirlhf.equations import policy, preference
from minirlhf.equations.masking import masked_mean, masked_sum
from minirlhf.equations.policy import clipped_surrogate, clipped_value_loss
from minirlhf.equations.preference import (
    Accuracy,
    bradley_terry_loss,
    dpo_loss,
    plackett_luce_loss,
    preference_accuracy,
)

nan, inf, log2 = torch.nan, torch.inf, math.log(2)
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def test_docstring_examples_hold():
    results = [doctest.testmod(module) for module in (policy, preference)]
    assert sum(result.attempted for result in results) >= 11
    assert not any(result.failed for result in results)


# ---- bradley_terry_loss ----


def test_bradley_terry_loss_by_hand():
    # difference 0: -log 1/2; log 3: sigmoid = 3/4; -log 3: sigmoid = 1/4
    chosen, rejected = f64([2, math.log(3), 1]), f64([2, 0, 1 + math.log(3)])
    assert_close(bradley_terry_loss(chosen, rejected), f64([log2, math.log(4 / 3), math.log(4)]))


def test_bradley_terry_loss_margin_by_hand():
    # (2, 1, margin 1): 2 - 1 - 1 = 0
    assert_close(bradley_terry_loss(f64([2]), f64([1]), margin=1.0), f64([log2]))
    assert_close(bradley_terry_loss(f64([2]), f64([1]), f64([1])), f64([log2]))


def test_bradley_terry_loss_meets_each_pair_with_its_own_margin():
    # three pairs, differences 1, 2, 3, margins the same: all log 2. An (N, N) would not be.
    loss = bradley_terry_loss(f64([1, 2, 3]), f64([0, 0, 0]), f64([1, 2, 3]))
    assert_close(loss, f64([log2, log2, log2]))


def test_bradley_terry_loss_margin_is_taken_off_the_chosen_reward():
    chosen, rejected, margin = f64([1.5, -2, 0]), f64([0.5, 1, 4]), f64([0.25, 3, -1])
    assert_close(
        bradley_terry_loss(chosen, rejected, margin),
        bradley_terry_loss(chosen - margin, rejected),
    )


def test_bradley_terry_loss_missing_margins_are_zeros():
    chosen, rejected = f64([1, 2]), f64([0, 3])
    mixed = bradley_terry_loss(chosen, rejected, f64([0, 0.5]))
    assert_close(mixed[:1], bradley_terry_loss(chosen[:1], rejected[:1]))


def test_bradley_terry_loss_gradient_by_hand():
    # d loss / d chosen = -sigmoid(-difference): differences 0, log 3, -log 3 -> 1/2, 1/4, 3/4
    chosen = f64([0, math.log(3), 0]).requires_grad_()
    rejected = f64([0, 0, math.log(3)]).requires_grad_()
    bradley_terry_loss(chosen, rejected).sum().backward()
    assert_close(chosen.grad, f64([-0.5, -0.25, -0.75]))
    assert_close(rejected.grad, f64([0.5, 0.25, 0.75]))


def test_bradley_terry_loss_margin_moves_the_gradient():
    chosen = f64([math.log(3)]).requires_grad_()
    bradley_terry_loss(chosen, f64([0]), margin=math.log(3)).sum().backward()
    assert_close(chosen.grad, f64([-0.5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bradley_terry_loss_of_huge_differences_is_finite(dtype):
    chosen = torch.tensor([6e4, -6e4], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-6e4, 6e4], dtype=dtype)
    loss = bradley_terry_loss(chosen, rejected)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    # 0 and the difference 120000, which float16 could not hold and bfloat16 holds as 6e4 rounded
    expected = torch.tensor([0.0, 2 * 6e4])
    torch.testing.assert_close(loss, expected, rtol=2**-8, atol=0)
    assert_close(chosen.grad.float(), torch.tensor([0.0, -1.0]))


def test_bradley_terry_loss_is_smallest_at_the_true_preference_odds():
    # Chosen wins with probability 3/4: E[gradient] = -3/4 σ(-d) + 1/4 σ(d) = 0 at d = log 3.
    d = f64([math.log(3)]).requires_grad_()
    zero = f64([0])
    (0.75 * bradley_terry_loss(d, zero) + 0.25 * bradley_terry_loss(zero, d)).sum().backward()
    assert_close(d.grad, f64([0]))


def test_bradley_terry_loss_refuses():
    with pytest.raises(ValueError, match=r"margin is \(4, 1\), chosen_rewards is \(4,\): drop the"):
        bradley_terry_loss(torch.zeros(4), torch.zeros(4), torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"margin is \(\), chosen_rewards is \(4,\): give margin"):
        bradley_terry_loss(torch.zeros(4), torch.zeros(4), torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"rejected_rewards is \(3,\), chosen_rewards is \(4,\)"):
        bradley_terry_loss(torch.zeros(4), torch.zeros(3))
    with pytest.raises(ValueError, match=r"chosen_rewards is \(4, 1\): one number a row is needed"):
        bradley_terry_loss(torch.zeros(4, 1), torch.zeros(4, 1))


# ---- bradley_terry_loss: soft labels ----


def test_bradley_terry_loss_of_a_probability_by_hand():
    # sigmoid(log 3) = 3/4. At p = 3/4: -3/4 log 3/4 - 1/4 log 1/4; at 0 the other side's loss
    d, zero = f64([math.log(3)] * 3), f64([0] * 3)
    right, wrong = math.log(4 / 3), math.log(4)
    expected = f64([right, 0.75 * right + 0.25 * wrong, wrong])
    assert_close(bradley_terry_loss(d, zero, 0.0, f64([1, 0.75, 0])), expected)
    assert_close(bradley_terry_loss(d, zero, 0.0, 0.75), expected[[1, 1, 1]])


def test_bradley_terry_loss_smoothing_mixes_the_label_by_hand():
    # p (1 - e) + (1 - p) e: 1 -> 3/4, 3/4 -> 5/8, 1/2 -> 1/2 at e = 1/4
    d, zero, p = f64([math.log(3)] * 3), f64([0] * 3), f64([1, 0.75, 0.5])
    right, wrong = math.log(4 / 3), math.log(4)
    expected = f64([q * right + (1 - q) * wrong for q in (0.75, 0.625, 0.5)])
    assert_close(bradley_terry_loss(d, zero, 0.0, p, 0.25), expected)


def test_bradley_terry_loss_margin_moves_both_terms():
    # 2 log 3 - 0 - log 3: the difference of the first test
    loss = bradley_terry_loss(f64([2 * math.log(3)]), f64([0]), f64([math.log(3)]), f64([0.5]))
    assert_close(loss, f64([(math.log(4 / 3) + math.log(4)) / 2]))


def test_bradley_terry_loss_of_a_probability_gradient_by_hand():
    # d loss / d difference = sigmoid(d) - q: 3/4 - 1, 3/4 - 1/2, 3/4 - 0; smoothed by 1/4: 3/4 - q
    for smoothing, expected in ((0.0, [-0.25, 0.25, 0.75]), (0.25, [0.0, 0.25, 0.5])):
        d = f64([math.log(3)] * 3).requires_grad_()
        bradley_terry_loss(d, f64([0] * 3), 0.0, f64([1, 0.5, 0]), smoothing).sum().backward()
        assert_close(d.grad, f64(expected))


def test_bradley_terry_loss_of_the_flipped_label_is_that_of_swapped_sides():
    chosen, rejected = f64([1.5, -2]), f64([0.5, 4])
    flipped = bradley_terry_loss(chosen, rejected, 0.0, f64([0.2, 0.0]))
    assert_close(flipped, bradley_terry_loss(rejected, chosen, 0.0, f64([0.8, 1.0])))


def test_bradley_terry_loss_of_a_certain_label_leaves_the_other_term_out():
    chosen = f64([inf, -inf, inf])
    loss = bradley_terry_loss(chosen, f64([0, 0, 0]), 0.0, f64([1, 0, 0.5]))
    assert loss.tolist() == [0.0, 0.0, inf]


def test_bradley_terry_loss_refuses_what_is_no_probability():
    zeros = torch.zeros(2)
    for p in (1.5, -0.1, nan, torch.tensor([0.5, 1.5])):
        with pytest.raises(ValueError, match=r"chosen_probability is .*: 0 to 1 is legal"):
            bradley_terry_loss(zeros, zeros, 0.0, p)
    with pytest.raises(ValueError, match=r"chosen_probability is \(3,\), chosen_rewards is \(2,\)"):
        bradley_terry_loss(zeros, zeros, 0.0, torch.ones(3))
    for smoothing in (0.5, -0.1, nan):
        with pytest.raises(ValueError, match=r"label_smoothing is .*: at least 0 and below 0.5"):
            bradley_terry_loss(zeros, zeros, label_smoothing=smoothing)


# ---- plackett_luce_loss ----

yes = torch.ones(1, 3, dtype=torch.bool)


def test_plackett_luce_loss_by_hand():
    # weights e^s = 3, 2, 1: the order has probability 3/6 · 2/3 · 1/1 = 1/3
    scores = f64([[math.log(3), math.log(2), 0]])
    assert_close(plackett_luce_loss(scores, torch.tensor([[1, 2, 3]]), yes), f64([math.log(3)]))
    # the reverse order: 1/6 · 2/5 = 1/15; ranks need not be columns, nor have no gaps
    assert_close(plackett_luce_loss(scores, torch.tensor([[9, 5, 2]]), yes), f64([math.log(15)]))


def test_plackett_luce_loss_of_all_orders_is_a_law():
    scores = f64([[0.3, -1.2, 2.0]])
    orders = torch.tensor(list(itertools.permutations([1, 2, 3])))
    losses = plackett_luce_loss(scores.expand(6, 3), orders, yes.expand(6, 3))
    assert_close((-losses).exp().sum(), f64(1))


def test_plackett_luce_loss_of_two_is_bradley_terry():
    chosen, rejected = f64([1.5, -2, 0, 30]), f64([0.5, 1, 4, -30])
    ranks = torch.tensor([[1, 2]]).expand(4, 2)
    scores = torch.stack((chosen, rejected), 1).requires_grad_()
    loss = plackett_luce_loss(scores, ranks, torch.ones(4, 2, dtype=torch.bool))
    expected = [math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True)]
    torch.testing.assert_close(loss, f64(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, bradley_terry_loss(chosen, rejected), rtol=0, atol=1e-12)


def test_plackett_luce_loss_of_a_choice_is_the_cross_entropy():
    # weights 3, 2, 1, the second is chosen: -log 2/6, the first factor alone
    scores = f64([[math.log(3), math.log(2), 0]])
    assert_close(plackett_luce_loss(scores, torch.tensor([[2, 1, 2]]), yes), f64([math.log(3)]))


def test_plackett_luce_loss_does_not_compare_ties():
    # weights 3, 2, 1, the first two tie: 3/4 · 2/3, each against the last alone
    scores = f64([[math.log(3), math.log(2), 0]])
    assert_close(plackett_luce_loss(scores, torch.tensor([[1, 1, 2]]), yes), f64([math.log(2)]))
    assert_close(plackett_luce_loss(scores, torch.tensor([[4, 4, 4]]), yes), f64([0]))


def test_plackett_luce_loss_gradient_by_hand():
    # d loss / d s_k = sum over factors that hold k of its share, minus 1 for its own factor.
    # Weights 3, 2, 1 in order: 3/6 - 1, 2/6 + 2/3 - 1, 1/6 + 1/3 + 1 - 1
    scores = f64([[math.log(3), math.log(2), 0]]).requires_grad_()
    plackett_luce_loss(scores, torch.tensor([[1, 2, 3]]), yes).sum().backward()
    assert_close(scores.grad, f64([[-0.5, 0.0, 0.5]]))


def test_plackett_luce_loss_ignores_what_is_masked():
    scores = f64([[math.log(3), math.log(2), nan], [0, inf, 0]]).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    for ranks in ([[1, 2, 0], [2, 0, 1]], [[1, 2, 9], [2, 9, 1]]):  # masked ahead, and behind
        scores.grad = None
        loss = plackett_luce_loss(scores, torch.tensor(ranks), mask)
        loss.sum().backward()
        assert_close(loss, f64([math.log(5 / 3), log2]))  # 3/5, and 1/2
        assert_close(scores.grad, f64([[-0.4, 0.4, 0], [0.5, 0, -0.5]]))


def test_plackett_luce_loss_of_huge_differences_is_finite():
    scores = torch.tensor([[6e4, 0, -6e4]], dtype=torch.float16)
    worst = plackett_luce_loss(scores, torch.tensor([[3, 2, 1]]), yes)
    assert worst.dtype == torch.float32
    # the last chosen first: 12e4 behind; then 0 against 6e4, which float16 holds as 6e4 rounded
    torch.testing.assert_close(worst, torch.tensor([18e4]), rtol=2**-8, atol=0)
    assert plackett_luce_loss(scores, torch.tensor([[1, 2, 3]]), yes).tolist() == [0.0]


def test_plackett_luce_loss_refuses():
    with pytest.raises(ValueError, match=r"ranks is \(1, 2\), scores is \(1, 3\)"):
        plackett_luce_loss(torch.zeros(1, 3), torch.ones(1, 2), yes)
    with pytest.raises(ValueError, match=r"scores is \(3,\): rows and tokens are needed"):
        plackett_luce_loss(torch.zeros(3), torch.ones(3), yes[0])
    with pytest.raises(ValueError, match=r"mask is torch.int64: bool is needed"):
        plackett_luce_loss(torch.zeros(1, 3), torch.ones(1, 3), yes.long())


# ---- preference_accuracy ----


def test_preference_accuracy_by_hand():
    # won, tied, lost, won, lost: 2/5, 1/5, 2/5 + 1/10
    out = preference_accuracy(f64([3, 1, 2, 5, 0]), f64([1, 1, 4, 0, 1]))
    assert out == Accuracy(strict=0.4, ties=0.2, half=0.5)
    assert all(isinstance(fraction, float) for fraction in out)


def test_preference_accuracy_of_a_constant_model_is_not_skill():
    assert preference_accuracy(torch.zeros(4), torch.zeros(4)) == (0, 1, 0.5)


def test_preference_accuracy_counts_nan_as_wrong():
    assert preference_accuracy(f64([nan, 2]), f64([0, 1])) == (0.5, 0, 0.5)


def test_preference_accuracy_refuses():
    with pytest.raises(ValueError, match=r"rejected_rewards is \(2, 1\), chosen_rewards is \(2,\)"):
        preference_accuracy(torch.zeros(2), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"chosen_rewards is \(2, 1\): one number a row"):
        preference_accuracy(torch.zeros(2, 1), torch.zeros(2, 1))
    with pytest.raises(ValueError, match="at least one pair is needed"):
        preference_accuracy(torch.zeros(0), torch.zeros(0))


# ---- dpo_loss ----


def test_dpo_loss_by_hand():
    # log-ratios: chosen -8 + 10 = 2, rejected -9 + 12 = 3; rewards at beta 1/2: 1, 1.5
    # margin -1/2, loss log(1 + e^(1/2)) = 0.974077; the second pair: -1/2 + 1/2 = 0, log 2
    out = dpo_loss(f64([-8, -4]), f64([-9, -4]), f64([-10, -3]), f64([-12, -3]), beta=0.5)
    assert_close(out.chosen_rewards, f64([1, -0.5]))
    assert_close(out.rejected_rewards, f64([1.5, -0.5]))
    assert_close(out.loss, f64([math.log(1 + math.exp(0.5)), log2]))


def test_dpo_loss_label_smoothing_by_hand():
    # margin log 3: 3/4 · -log 3/4 + 1/4 · -log 1/4
    smoothed = dpo_loss(f64([math.log(3)]), f64([0]), f64([0]), f64([0]), 1.0, label_smoothing=0.25)
    assert_close(smoothed.loss, f64([0.75 * math.log(4 / 3) + 0.25 * math.log(4)]))


def test_dpo_loss_gradient_by_hand():
    # d loss / d policy_chosen = -beta σ(-margin); policy_chosen log 3 / beta -> margin log 3
    chosen = f64([2 * math.log(3)]).requires_grad_()
    rejected = f64([0]).requires_grad_()
    dpo_loss(chosen, rejected, f64([0]), f64([0]), beta=0.5).loss.sum().backward()
    assert_close(chosen.grad, f64([-0.125]))
    assert_close(rejected.grad, f64([0.125]))


def test_dpo_loss_label_smoothing_gradient_vanishes_at_the_smoothed_odds():
    # -(1 - s) σ(-m) + s σ(m) = 0 where σ(m) = 1 - s: s = 1/4, m = log 3
    chosen = f64([math.log(3)]).requires_grad_()
    zero = f64([0])
    dpo_loss(chosen, zero, zero, zero, 1.0, label_smoothing=0.25).loss.sum().backward()
    assert_close(chosen.grad, f64([0]))


def test_dpo_loss_is_log_2_at_the_start():
    logprobs = f64([-3, -50])
    out = dpo_loss(logprobs, logprobs - 7, logprobs, logprobs - 7, beta=0.1)
    assert_close(out.loss, f64([log2, log2]))
    assert out.chosen_rewards.eq(0).all() and out.rejected_rewards.eq(0).all()


def test_dpo_loss_reduces_to_bradley_terry_on_its_rewards():
    out = dpo_loss(f64([-1, -2]), f64([-3, -1]), f64([-2, -2]), f64([-1, -5]), beta=0.3)
    assert_close(out.loss, bradley_terry_loss(out.chosen_rewards, out.rejected_rewards))


def test_dpo_loss_is_smallest_where_policy_is_ref_times_exp_reward():
    # Two responses, ref (1/2, 1/2), first preferred with probability 3/4, so reward difference
    # log 3. With beta 1 the optimum is policy ∝ ref · e^reward = (3/4, 1/4): no gradient there.
    logits = f64([math.log(3), 0]).requires_grad_()
    policy, ref = logits.log_softmax(0), f64([0.5, 0.5]).log()
    first, second = policy[:1], policy[1:]
    wins = dpo_loss(first, second, ref[:1], ref[1:], beta=1.0).loss
    upsets = dpo_loss(second, first, ref[1:], ref[:1], beta=1.0).loss
    (0.75 * wins + 0.25 * upsets).sum().backward()
    assert_close(logits.grad, f64([0, 0]))


def test_dpo_loss_of_huge_margins_is_finite():
    chosen = torch.tensor([-6e4, 0.0], dtype=torch.float16, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float16)
    rejected = torch.tensor([0.0, -6e4], dtype=torch.float16)
    out = dpo_loss(chosen, rejected, zero, zero, beta=2.0)
    out.loss.sum().backward()
    assert out.loss.dtype == torch.float32 and out.loss[1] == 0
    assert_close(out.loss[0], torch.tensor(-2.0 * float(chosen.detach()[0])))
    assert chosen.grad.tolist() == [-2, 0]


def test_dpo_loss_sends_its_gradient_to_the_policy_only():
    tensors = [f64([-1]).requires_grad_() for _ in range(4)]
    out = dpo_loss(*tensors, beta=0.1)
    out.loss.sum().backward()
    assert [x.grad is None for x in tensors] == [False, False, True, True]
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


def test_dpo_loss_refuses_shapes():
    zeros = torch.zeros(4)
    with pytest.raises(ValueError, match=r"ref_rejected is \(4, 1\), policy_chosen is \(4,\)"):
        dpo_loss(zeros, zeros, zeros, zeros[:, None], 0.1)
    per_token = torch.zeros(4, 7)
    with pytest.raises(ValueError, match=r"policy_chosen is \(4, 7\): one number a row is needed"):
        dpo_loss(per_token, per_token, per_token, per_token, 0.1)


@pytest.mark.parametrize("beta", [0, -0.1, nan, inf])
def test_dpo_loss_refuses_beta(beta):
    with pytest.raises(ValueError, match=f"beta is {beta}: a finite number above 0 is needed"):
        dpo_loss(*[torch.zeros(1)] * 4, beta)


@pytest.mark.parametrize("smoothing", [-0.01, 0.5, nan])
def test_dpo_loss_refuses_label_smoothing(smoothing):
    with pytest.raises(ValueError, match=f"label_smoothing is {smoothing}: at least 0 and below 0"):
        dpo_loss(*[torch.zeros(1)] * 4, 0.1, label_smoothing=smoothing)


# ---- clipped_surrogate ----


def corners():
    """Ratios 1.5 and 0.5, each with advantage 1 and -1."""
    logprobs = f64([[1.5, 1.5, 0.5, 0.5]]).log()
    return logprobs, torch.zeros_like(logprobs), f64([[1, -1, 1, -1]])


def test_clipped_surrogate_by_hand():
    # -min(1.5, 1.2), -min(-1.5, -1.2), -min(0.5, 0.8), -min(-0.5, -0.8)
    out = clipped_surrogate(*corners(), 0.2, 0.2)
    assert_close(out.loss, f64([[-1.2, 1.5, -0.5, 0.8]]))
    assert_close(out.ratio, f64([[1.5, 1.5, 0.5, 0.5]]))
    assert out.clipped.tolist() == [[True, False, False, True]]


def test_clipped_surrogate_with_an_asymmetric_clip_by_hand():
    # bounds 0.7 and 1.4; an advantage of 3 scales the loss
    logprobs, old_logprobs, advantages = corners()
    out = clipped_surrogate(logprobs, old_logprobs, 3 * advantages, clip_low=0.3, clip_high=0.4)
    assert_close(out.loss, f64([[-4.2, 4.5, -1.5, 2.1]]))


def test_clipped_surrogate_ratio_is_new_over_old():
    # probability 1/4 -> 1/2: ratio 2, not 1/2
    out = clipped_surrogate(f64([0.5]).log(), f64([0.25]).log(), f64([-1]), 0.2, 0.2)
    assert_close(out.ratio, f64([2]))
    assert_close(out.loss, f64([2]))


def test_clipped_surrogate_gradient_by_hand():
    # zero where clipped, -A · ratio elsewhere
    logprobs, old_logprobs, advantages = corners()
    logprobs.requires_grad_()
    clipped_surrogate(logprobs, old_logprobs, 2 * advantages, 0.2, 0.2).loss.sum().backward()
    assert_close(logprobs.grad, f64([[0, 3, -1, 0]]))
    assert logprobs.grad[0, 0] == 0 and logprobs.grad[0, 3] == 0


def test_clipped_surrogate_inside_the_range_keeps_its_gradient():
    # ratios 1.19 and 0.81 under clip 0.2: -A · ratio for either sign
    logprobs = f64([[1.19, 1.19, 0.81, 0.81]]).log().requires_grad_()
    zeros, advantages = torch.zeros(1, 4).double(), f64([[1, -1, 1, -1]])
    out = clipped_surrogate(logprobs, zeros, advantages, 0.2, 0.2)
    out.loss.sum().backward()
    assert_close(out.loss, f64([[-1.19, 1.19, -0.81, 0.81]]))
    assert_close(logprobs.grad, f64([[-1.19, 1.19, -0.81, 0.81]]))
    assert not out.clipped.any()


def test_clipped_surrogate_at_ratio_one_is_the_policy_gradient():
    # loss -A, gradient -A (REINFORCE), nothing clipped, ratio exactly 1, even with no clip range
    logprobs = torch.tensor([[-0.3, -7.0, -0.0]], requires_grad=True)
    advantages = torch.tensor([[2.0, -3.0, 0.0]])
    out = clipped_surrogate(logprobs, logprobs.detach().clone(), advantages, 0.0, 0.0)
    out.loss.sum().backward()
    assert out.ratio.eq(1).all() and not out.clipped.any()
    assert_close(out.loss, -advantages)
    assert_close(logprobs.grad, -advantages)


def test_clipped_surrogate_dual_clip_by_hand():
    # ratio 4 with A = -2: 8, bounded at -2 · -3 = 6; with A = 2 the clip rules, -2 · 1.2; ratio 2.9
    # stays below the bound, 5.8; below the range the clip rules as before, 2 · 0.8
    logprobs = f64([[4, 4, 2.9, 0.5]]).log().requires_grad_()
    advantages = f64([[-2, 2, -2, -2]])
    out = clipped_surrogate(logprobs, torch.zeros(1, 4).double(), advantages, 0.2, 0.2, 3.0)
    assert_close(out.loss, f64([[6, -2.4, 5.8, 1.6]]))
    assert out.clipped.tolist() == [[True, True, False, True]]
    out.loss.sum().backward()
    assert_close(logprobs.grad, f64([[0, 0, 5.8, 0]]))  # -A · ratio where it is free


def test_clipped_surrogate_dual_clip_bounds_a_ratio_that_overflows():
    logprobs = torch.tensor([[200.0]], requires_grad=True)
    out = clipped_surrogate(logprobs, torch.zeros(1, 1), torch.tensor([[-2.0]]), 0.2, 0.2, 3.0)
    out.loss.sum().backward()
    assert_close(out.loss, torch.tensor([[6.0]]))
    assert logprobs.grad.item() == 0


@pytest.mark.parametrize("dual_clip", [1.2, 0.5, -1.0, nan])
def test_clipped_surrogate_refuses_a_dual_clip_inside_the_range(dual_clip):
    with pytest.raises(ValueError, match=r"dual_clip is .*: above 1 \+ clip_high, 1.2, is legal"):
        clipped_surrogate(*corners(), 0.2, 0.2, dual_clip)


def test_clipped_surrogate_without_bounds_is_importance_sampling():
    out = clipped_surrogate(*corners(), clip_low=inf, clip_high=inf)
    assert_close(out.loss, f64([[-1.5, 1.5, -0.5, 0.5]]))
    assert not out.clipped.any()


@pytest.mark.parametrize("clip_low", [1.0, 3.0])
def test_clipped_surrogate_with_a_clip_low_of_one_never_clips_below(clip_low):
    out = clipped_surrogate(f64([1e-30]).log(), f64([0]), f64([-1]), clip_low, 0.2)
    assert_close(out.loss, f64([0]))
    assert not out.clipped.any()


def test_clipped_surrogate_expectation_over_two_tokens():
    # Sampled from old (3/4, 1/4), new (1/4, 3/4), A = (1, 5): E_old[ratio · A] is E_new[A] = 4.
    old, new, advantages = f64([0.75, 0.25]), f64([0.25, 0.75]), f64([1, 5])
    out = clipped_surrogate(new.log(), old.log(), advantages, inf, inf)
    assert_close((old * out.loss).sum(), f64(-4))
    # Clipped at 0.2: ratios 1/3 and 3 -> 1/3 and 1.2: 3/4 · 1/3 · 1 + 1/4 · 1.2 · 5 = 1.75
    out = clipped_surrogate(new.log(), old.log(), advantages, 0.2, 0.2)
    assert_close((old * out.loss).sum(), f64(-1.75))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "loss", "gradient", "clipped"),
    [
        (200.0, 2.0, -2.4, 0.0, True),  # the clipped side rules: -2 · 1.2
        (200.0, 0.0, 0.0, 0.0, False),  # no credit, no loss
        (200.0, -2.0, inf, 0.0, False),  # the loss is beyond float32: it shows
        (-200.0, 2.0, 0.0, 0.0, False),  # ratio 0 without clip: -2 · 0
        (-200.0, 0.0, 0.0, 0.0, False),
        (-200.0, -2.0, 1.6, 0.0, True),  # the clipped side rules: 2 · 0.8
    ],
)
def test_clipped_surrogate_of_huge_log_ratios(log_ratio, advantage, loss, gradient, clipped):
    logprobs = torch.tensor([log_ratio], requires_grad=True)  # e^200 overflows float32
    out = clipped_surrogate(logprobs, torch.zeros(1), torch.tensor([advantage]), 0.2, 0.2)
    out.loss.sum().backward()
    assert_close(out.loss.detach(), torch.tensor([loss]))
    assert logprobs.grad.item() == gradient
    assert out.clipped.item() is clipped


@pytest.mark.parametrize("garbage", [nan, inf, -inf, 200.0, -200.0])
@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_clipped_surrogate_garbage_under_a_mask_changes_nothing(argument, garbage, sign):
    mask = torch.tensor([[True, True, False]])
    clean = [torch.tensor(x) for x in ([[-1.0, -2.0, 0]], [[-1.5, -1.0, 0]], [[2.0, -1.0, sign]])]
    results = []
    for padding in (clean[argument][0, 2].item(), garbage):
        inputs = [x.clone() for x in clean]
        inputs[argument][0, 2] = padding
        inputs[0].requires_grad_()
        loss = masked_mean(clipped_surrogate(*inputs, 0.2, 0.2).loss, mask)
        loss.backward()
        results.append((loss.item(), *inputs[0].grad.flatten().tolist()))
    assert results[0] == results[1] and results[0][3] == 0


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_clipped_surrogate_shows_a_nan(argument):
    inputs = [torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    inputs[argument][0] = nan
    assert clipped_surrogate(*inputs, 0.2, 0.2).loss.isnan().all()


def test_clipped_surrogate_treats_old_logprobs_and_advantages_as_constants():
    inputs = [f64([0.1]).requires_grad_() for _ in range(3)]
    out = clipped_surrogate(*inputs, 0.2, 0.2)
    out.loss.sum().backward()
    assert [x.grad is None for x in inputs] == [False, True, True]
    assert not out.ratio.requires_grad and out.clipped.dtype == torch.bool


def test_clipped_surrogate_refuses_shapes():
    per_token = torch.zeros(4, 7)
    with pytest.raises(
        ValueError,
        match=r"advantages is \(4,\), logprobs is \(4, 7\): "
        r"expand per-sequence advantages with \[:, None\]\.expand\(-1, 7\)",
    ):
        clipped_surrogate(per_token, per_token, torch.zeros(4), 0.2, 0.2)
    with pytest.raises(ValueError, match=r"advantages is \(4, 1\), logprobs is \(4, 7\): expand"):
        clipped_surrogate(per_token, per_token, torch.zeros(4, 1), 0.2, 0.2)
    with pytest.raises(ValueError, match=r"old_logprobs is \(4, 6\), logprobs is \(4, 7\)"):
        clipped_surrogate(per_token, torch.zeros(4, 6), per_token, 0.2, 0.2)


@pytest.mark.parametrize("value", [-0.1, nan])
def test_clipped_surrogate_refuses_negative_clips(value):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"clip_low is {value}: 0 or more is legal"):
        clipped_surrogate(zeros, zeros, zeros, value, 0.2)
    with pytest.raises(ValueError, match=f"clip_high is {value}: 0 or more is legal"):
        clipped_surrogate(zeros, zeros, zeros, 0.2, value)


# ---- clipped_value_loss ----


def test_clipped_value_loss_by_hand():
    # old value 0, clip 1/2, return 3: V = 2 -> clipped to 1/2: 1/2 max(1, 2.5²) = 3.125
    # V = 6 -> clipped to 1/2: 1/2 max(9, 2.5²) = 4.5; V = 1/4 is inside: 1/2 · 2.75² = 3.78125
    # return -3, V = -2 -> clipped to -1/2: 1/2 max(1, 2.5²) = 3.125; V = -6: 1/2 · 9
    values, returns = f64([[2, 6, 0.25, -2, -6]]), f64([[3, 3, 3, -3, -3]])
    out = clipped_value_loss(values, torch.zeros_like(values), returns, clip=0.5)
    assert_close(out.loss, f64([[3.125, 4.5, 3.78125, 3.125, 4.5]]))
    assert out.clipped.tolist() == [[True, False, False, True, False]]


def test_clipped_value_loss_range_lies_around_the_old_value():
    # old value 10, clip 1: V = 12 -> 11; return 14: 1/2 max(2², 3²)
    out = clipped_value_loss(f64([12]), f64([10]), f64([14]), clip=1.0)
    assert_close(out.loss, f64([4.5]))


def test_clipped_value_loss_gradient_by_hand():
    # V - R where not clipped: 6 - 3, 1/4 - 3, -6 + 3; else 0
    values = f64([[2, 6, 0.25, -2, -6]]).requires_grad_()
    zeros, returns = torch.zeros(1, 5).double(), f64([[3, 3, 3, -3, -3]])
    clipped_value_loss(values, zeros, returns, clip=0.5).loss.sum().backward()
    assert_close(values.grad, f64([[0, 3, -2.75, 0, -3]]))


@pytest.mark.parametrize("clip", [None, inf])
def test_clipped_value_loss_without_a_bound_is_half_the_squared_error(clip):
    # 1/2 · 3² = 4.5, 1/2 · 4² = 8; gradient V - R
    values = f64([5, -4]).requires_grad_()
    out = clipped_value_loss(values, f64([0, 0]), f64([2, 0]), clip)
    out.loss.sum().backward()
    assert_close(out.loss, f64([4.5, 8]))
    assert_close(values.grad, f64([3, -4]))
    assert out.clipped.tolist() == [False, False]


def test_clipped_value_loss_inside_the_range_is_never_clipped_by_rounding():
    # old + (new - old) is not new in floating point; a clamp between bounds is
    generator = torch.Generator().manual_seed(0)
    old_values, returns = torch.randn(2, 1000, generator=generator)
    values = (old_values + 0.1 * torch.randn(1000, generator=generator).clamp(-1, 1)).clone()
    values.requires_grad_()
    out = clipped_value_loss(values, old_values, returns, clip=0.2)
    out.loss.sum().backward()
    assert not out.clipped.any()
    assert_close(values.grad, values.detach() - returns)


def test_clipped_value_loss_gradient_vanishes_at_the_mean_return():
    # returns 4 and 8 with probabilities 3/4 and 1/4: the mean is 5
    value = f64([5]).requires_grad_()
    low = clipped_value_loss(value, f64([5]), f64([4]), clip=0.2).loss
    high = clipped_value_loss(value, f64([5]), f64([8]), clip=0.2).loss
    (0.75 * low + 0.25 * high).sum().backward()
    assert_close(value.grad, f64([0]))


@pytest.mark.parametrize("clip", [None, 0.2])
@pytest.mark.parametrize("garbage", [nan, inf, -inf, 1e30])
@pytest.mark.parametrize("argument", [0, 1, 2])
def test_clipped_value_loss_garbage_under_a_mask_changes_nothing(argument, garbage, clip):
    mask = torch.tensor([[True, True, False]])
    clean = [torch.tensor(x) for x in ([[1.0, 2.0, 0]], [[1.1, 0.0, 0]], [[3.0, -1.0, 0]])]
    results = []
    for padding in (0.0, garbage):
        inputs = [x.clone() for x in clean]
        inputs[argument][0, 2] = padding
        inputs[0].requires_grad_()
        loss = masked_sum(clipped_value_loss(*inputs, clip).loss, mask)
        loss.backward()
        results.append((loss.item(), *inputs[0].grad.flatten().tolist()))
    assert results[0] == results[1] and results[0][3] == 0


@pytest.mark.parametrize("argument", [0, 1, 2])
def test_clipped_value_loss_shows_a_nan(argument):
    inputs = [torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    inputs[argument][0] = nan
    assert clipped_value_loss(*inputs, clip=0.2).loss.isnan().all()


def test_clipped_value_loss_treats_old_values_and_returns_as_constants():
    inputs = [f64([x]).requires_grad_() for x in (1.0, 0.9, 3.0)]
    clipped_value_loss(*inputs, clip=0.2).loss.sum().backward()
    assert [x.grad is None for x in inputs] == [False, True, True]


def test_clipped_value_loss_refuses():
    per_token = torch.zeros(4, 7)
    with pytest.raises(ValueError, match=r"returns is \(4,\), values is \(4, 7\): expand per-sequ"):
        clipped_value_loss(per_token, per_token, torch.zeros(4), 0.2)
    with pytest.raises(ValueError, match=r"old_values is \(4, 8\), values is \(4, 7\)"):
        clipped_value_loss(per_token, torch.zeros(4, 8), per_token, None)
    with pytest.raises(ValueError, match=r"clip is -0\.2: 0 or more is legal"):
        clipped_value_loss(per_token, per_token, per_token, -0.2)


# ---- all of them ----


@pytest.mark.parametrize(
    ("function", "tensors", "numbers"),
    [
        (bradley_terry_loss, 3, ()),
        (preference_accuracy, 2, ()),
        (dpo_loss, 4, (0.1, 0.2)),
        (clipped_surrogate, 3, (0.2, 0.2)),
        (clipped_value_loss, 3, (0.2,)),
    ],
)
def test_losses_leave_their_inputs_unchanged(function, tensors, numbers):
    inputs = [f64([1.0, -2.0, 0.5]) * (i + 1) for i in range(tensors)]
    before = [x.clone() for x in inputs]
    function(*inputs, *numbers)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize("cuts", [[6], [1, 5], [2, 2, 2], [1, 1, 1, 1, 1, 1]])
def test_gradient_does_not_depend_on_the_split_into_micro_batches(cuts):
    # sum over tokens divided by the token count of the whole step
    generator = torch.Generator().manual_seed(1)
    logprobs, old_logprobs, advantages = torch.randn(3, 6, 5, generator=generator).double()
    mask = torch.rand(6, 5, generator=generator) < 0.7
    whole = logprobs.clone().requires_grad_()
    masked_mean(clipped_surrogate(whole, old_logprobs, advantages, 0.2, 0.2).loss, mask).backward()
    split = logprobs.clone().requires_grad_()
    pieces = [x.split(cuts) for x in (split, old_logprobs, advantages, mask)]
    for new, old, credit, chosen in zip(*pieces, strict=True):
        loss = clipped_surrogate(new, old, credit, 0.2, 0.2).loss
        (masked_sum(loss, chosen) / mask.sum()).backward()
    assert_close(split.grad, whole.grad)
