"""Losses of preferences by hand, with their gradients, their estimands and what they refuse."""

import itertools
import math
from functools import partial

import pytest
import torch
from torch import ones, zeros

from minirlhf.equations.preference import (
    Accuracy,
    bradley_terry_loss,
    plackett_luce_loss,
    preference_accuracy,
)

nan, inf, log2, log3 = torch.nan, torch.inf, math.log(2), math.log(3)
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


RIGHT, WRONG = math.log(4 / 3), math.log(4)  # at difference log 3, sigmoid 3/4: -log 3/4, -log 1/4


@pytest.mark.parametrize(
    ("chosen", "rejected", "more", "expected"),
    [
        # differences 0, log 3, -log 3
        ([2, log3, 1], [2, 0, 1 + log3], (), [log2, RIGHT, WRONG]),
        ([2], [1], (1.0,), [log2]),  # 2 - 1 - 1 = 0
        # each pair with its own margin; an (N, N) would not be log 2
        ([1, 2, 3], [0, 0, 0], (f64([1, 2, 3]),), [log2] * 3),
        ([log3, log3], [0, 0], (f64([0, log3]),), [RIGHT, log2]),
        # probabilities 1, 3/4 and 0 of the label
        ([log3] * 3, [0] * 3, (0.0, f64([1, 0.75, 0])),
         [RIGHT, 0.75 * RIGHT + 0.25 * WRONG, WRONG]),
        ([log3] * 2, [0] * 2, (0.0, 0.75), [0.75 * RIGHT + 0.25 * WRONG] * 2),
        # p (1 - e) + (1 - p) e: 1 -> 3/4, 3/4 -> 5/8, 1/2 -> 1/2 at e = 1/4
        ([log3] * 3, [0] * 3, (0.0, f64([1, 0.75, 0.5]), 0.25),
         [q * RIGHT + (1 - q) * WRONG for q in (0.75, 0.625, 0.5)]),
        # 2 log 3 - 0 - log 3: the margin moves both terms
        ([2 * log3], [0], (f64([log3]), f64([0.5])), [(RIGHT + WRONG) / 2]),
        # a label that is certain leaves the other term out
        ([inf, -inf, inf], [0, 0, 0], (0.0, f64([1, 0, 0.5])), [0, 0, inf]),
    ],
)
def test_bradley_terry_loss_by_hand(chosen, rejected, more, expected):
    assert_close(bradley_terry_loss(f64(chosen), f64(rejected), *more), f64(expected))


@pytest.mark.parametrize(
    ("differences", "more", "expected"),
    [
        # d loss / d difference = sigmoid(d) - q: 1/2, 3/4 and 1/4, less 1
        ([0, log3, -log3], (), [-0.5, -0.25, -0.75]),
        ([log3], (log3,), [-0.5]),  # the margin moves it to 0
        # 3/4 - 1, 3/4 - 1/2, 3/4 - 0; smoothed by 1/4: q is 3/4, 1/2, 1/4
        ([log3] * 3, (0.0, f64([1, 0.5, 0])), [-0.25, 0.25, 0.75]),
        ([log3] * 3, (0.0, f64([1, 0.5, 0]), 0.25), [0.0, 0.25, 0.5]),
    ],
)
def test_bradley_terry_loss_gradient_by_hand(differences, more, expected):
    chosen = f64(differences).requires_grad_()
    rejected = torch.zeros_like(chosen).requires_grad_()
    bradley_terry_loss(chosen, rejected, *more).sum().backward()
    assert_close(chosen.grad, f64(expected))
    assert_close(rejected.grad, -f64(expected))


def test_bradley_terry_loss_identities():
    chosen, rejected, margin = f64([1.5, -2, 0]), f64([0.5, 1, 4]), f64([0.25, 3, -1])
    moved = bradley_terry_loss(chosen - margin, rejected)
    assert_close(bradley_terry_loss(chosen, rejected, margin), moved)
    # a flipped label is a pair with its sides swapped
    flipped = bradley_terry_loss(chosen, rejected, 0.0, f64([0.2, 0.0, 0.5]))
    assert_close(flipped, bradley_terry_loss(rejected, chosen, 0.0, f64([0.8, 1.0, 0.5])))


def test_bradley_terry_loss_is_smallest_at_the_true_preference_odds():
    # Chosen wins with probability 3/4: E[gradient] = -3/4 σ(-d) + 1/4 σ(d) = 0 at d = log 3.
    d, zero = f64([log3]).requires_grad_(), f64([0])
    (0.75 * bradley_terry_loss(d, zero) + 0.25 * bradley_terry_loss(zero, d)).sum().backward()
    assert_close(d.grad, f64([0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_bradley_terry_loss_of_huge_differences_is_finite(dtype):
    chosen = torch.tensor([6e4, -6e4], dtype=dtype, requires_grad=True)
    loss = bradley_terry_loss(chosen, torch.tensor([-6e4, 6e4], dtype=dtype))
    loss.sum().backward()
    assert loss.dtype == torch.float32
    # 0 and the difference 120000, which float16 could not hold and bfloat16 holds as 6e4 rounded
    torch.testing.assert_close(loss, torch.tensor([0.0, 12e4]), rtol=2**-8, atol=0)
    assert_close(chosen.grad.float(), torch.tensor([0.0, -1.0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((zeros(4), zeros(4), zeros(4, 1)),
         r"margin is \(4, 1\), chosen_rewards is \(4,\): drop the"),
        ((zeros(4), zeros(4), torch.tensor(1.0)),
         r"margin is \(\), chosen_rewards is \(4,\): give margin"),
        ((zeros(4), zeros(3)), r"rejected_rewards is \(3,\), chosen_rewards is \(4,\)"),
        ((zeros(4, 1), zeros(4, 1)), r"chosen_rewards is \(4, 1\): one number a row is needed"),
        ((zeros(2), zeros(2), 0.0, ones(3)),
         r"chosen_probability is \(3,\), chosen_rewards is \(2,\)"),
        *[((zeros(2), zeros(2), 0.0, p), r"chosen_probability is .*: 0 to 1 is legal")
          for p in (1.5, -0.1, nan, torch.tensor([0.5, 1.5]))],
        *[((zeros(2), zeros(2), 0.0, 1.0, smoothing),
           r"label_smoothing is .*: at least 0 and below 0.5") for smoothing in (0.5, -0.1, nan)],
    ],
)
def test_bradley_terry_loss_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        bradley_terry_loss(*arguments)


YES = ones(1, 3, dtype=torch.bool)
WEIGHTS = [[log3, log2, 0]]  # e^s = 3, 2, 1


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([1, 2, 3], log3),  # 3/6 · 2/3 · 1/1
        ([9, 5, 2], math.log(15)),  # the reverse, 1/6 · 2/5; ranks may have gaps
        ([2, 1, 2], log3),  # a choice of the second, 2/6: the cross-entropy, the first factor alone
        ([1, 1, 2], log2),  # the first two tie: 3/4 · 2/3, each against the last alone
        ([4, 4, 4], 0),
    ],
)
def test_plackett_luce_loss_by_hand(ranks, expected):
    assert_close(plackett_luce_loss(f64(WEIGHTS), torch.tensor([ranks]), YES), f64([expected]))


def test_plackett_luce_loss_of_all_orders_is_a_distribution():
    scores = f64([[0.3, -1.2, 2.0]])
    orders = torch.tensor(list(itertools.permutations([1, 2, 3])))
    losses = plackett_luce_loss(scores.expand(6, 3), orders, YES.expand(6, 3))
    assert_close((-losses).exp().sum(), f64(1))


def test_plackett_luce_loss_of_two_is_bradley_terry():
    chosen, rejected = f64([1.5, -2, 0, 30]), f64([0.5, 1, 4, -30])
    ranks = torch.tensor([[1, 2]]).expand(4, 2)
    scores = torch.stack((chosen, rejected), 1)
    loss = plackett_luce_loss(scores, ranks, ones(4, 2, dtype=torch.bool))
    expected = [math.log1p(math.exp(r - c)) for c, r in zip(chosen, rejected, strict=True)]
    torch.testing.assert_close(loss, f64(expected), rtol=0, atol=1e-12)
    torch.testing.assert_close(loss, bradley_terry_loss(chosen, rejected), rtol=0, atol=1e-12)


def test_plackett_luce_loss_gradient_by_hand():
    # d loss / d s_k = sum over factors that hold k of its share, minus 1 for its own factor.
    # Weights 3, 2, 1 in order: 3/6 - 1, 2/6 + 2/3 - 1, 1/6 + 1/3 + 1 - 1
    scores = f64(WEIGHTS).requires_grad_()
    plackett_luce_loss(scores, torch.tensor([[1, 2, 3]]), YES).sum().backward()
    assert_close(scores.grad, f64([[-0.5, 0.0, 0.5]]))


@pytest.mark.parametrize("ranks", [[[1, 2, 0], [2, 0, 1]], [[1, 2, 9], [2, 9, 1]]])
def test_plackett_luce_loss_ignores_what_is_masked_ahead_and_behind(ranks):
    scores = f64([[log3, log2, nan], [0, inf, 0]]).requires_grad_()
    mask = torch.tensor([[True, True, False], [True, False, True]])
    loss = plackett_luce_loss(scores, torch.tensor(ranks), mask)
    loss.sum().backward()
    assert_close(loss, f64([math.log(5 / 3), log2]))  # 3/5, and 1/2
    assert_close(scores.grad, f64([[-0.4, 0.4, 0], [0.5, 0, -0.5]]))


def test_plackett_luce_loss_of_huge_differences_is_finite():
    scores = torch.tensor([[6e4, 0, -6e4]], dtype=torch.float16)
    worst = plackett_luce_loss(scores, torch.tensor([[3, 2, 1]]), YES)
    assert worst.dtype == torch.float32
    # the last chosen first: 12e4 behind; then 0 against 6e4, which float16 holds as 6e4 rounded
    torch.testing.assert_close(worst, torch.tensor([18e4]), rtol=2**-8, atol=0)
    assert plackett_luce_loss(scores, torch.tensor([[1, 2, 3]]), YES).tolist() == [0.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((zeros(1, 3), ones(1, 2), YES), r"ranks is \(1, 2\), scores is \(1, 3\)"),
        ((zeros(3), ones(3), YES[0]), r"scores is \(3,\): rows and tokens are needed"),
        ((zeros(1, 3), ones(1, 3), YES.long()), r"mask is torch.int64: bool is needed"),
    ],
)
def test_plackett_luce_loss_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        plackett_luce_loss(*arguments)


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        # won, tied, lost, won, lost: 2/5, 1/5, 2/5 + 1/10
        ([3, 1, 2, 5, 0], [1, 1, 4, 0, 1], (0.4, 0.2, 0.5)),
        ([0, 0, 0, 0], [0, 0, 0, 0], (0, 1, 0.5)),  # a constant model has no skill
        ([nan, 2], [0, 1], (0.5, 0, 0.5)),  # a NaN is wrong
    ],
)
def test_preference_accuracy_by_hand(chosen, rejected, expected):
    found = preference_accuracy(f64(chosen), f64(rejected))
    assert found == Accuracy(*expected) and all(isinstance(share, float) for share in found)


@pytest.mark.parametrize(
    ("chosen", "rejected", "message"),
    [
        (zeros(2), zeros(2, 1), r"rejected_rewards is \(2, 1\), chosen_rewards is \(2,\)"),
        (zeros(2, 1), zeros(2, 1), r"chosen_rewards is \(2, 1\): one number a row"),
        (zeros(0), zeros(0), "at least one pair is needed"),
    ],
)
def test_preference_accuracy_refuses(chosen, rejected, message):
    with pytest.raises(ValueError, match=message):
        preference_accuracy(chosen, rejected)


@pytest.mark.parametrize(
    ("function", "tensors", "numbers"),
    [(bradley_terry_loss, 3, ()), (preference_accuracy, 2, ())],
)
def test_losses_leave_their_inputs_unchanged(function, tensors, numbers):
    inputs = [f64([1.0, -2.0, 0.5]) * (i + 1) for i in range(tensors)]
    before = [x.clone() for x in inputs]
    function(*inputs, *numbers)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
