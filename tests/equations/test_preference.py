"""Losses of preferences by hand, with their gradients, their estimands and what they refuse."""

import itertools
import math
from functools import partial

import pytest
import torch

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


def test_plackett_luce_loss_of_all_orders_is_a_distribution():
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


# ---- all of them ----


@pytest.mark.parametrize(
    ("function", "tensors", "numbers"),
    [(bradley_terry_loss, 3, ()), (preference_accuracy, 2, ()), (dpo_loss, 4, (0.1, 0.2))],
)
def test_losses_leave_their_inputs_unchanged(function, tensors, numbers):
    inputs = [f64([1.0, -2.0, 0.5]) * (i + 1) for i in range(tensors)]
    before = [x.clone() for x in inputs]
    function(*inputs, *numbers)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
