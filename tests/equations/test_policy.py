"""The clipped losses of PPO by hand, with their gradients, at their bounds and under a mask."""

from functools import partial

import pytest
import torch

from minirlhf.equations.masking import masked_mean, masked_sum
from minirlhf.equations.policy import (
    clipped_surrogate,
    clipped_value_loss,
    truncated_weights,
    with_mask,
)

nan, inf = torch.nan, torch.inf
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("ratios", "advantages", "clips", "loss", "clipped", "gradient"),
    [
        # the corners: -min(1.5, 1.2), -min(-1.5, -1.2), -min(0.5, 0.8), -min(-0.5, -0.8);
        # the gradient is zero where clipped, -A · ratio elsewhere
        ([1.5, 1.5, 0.5, 0.5], [1, -1, 1, -1], (0.2, 0.2), [-1.2, 1.5, -0.5, 0.8],
         [True, False, False, True], [0, 1.5, -0.5, 0]),
        # bounds 0.7 and 1.4; an advantage of 3 scales the loss
        ([1.5, 1.5, 0.5, 0.5], [3, -3, 3, -3], (0.3, 0.4), [-4.2, 4.5, -1.5, 2.1],
         [True, False, False, True], [0, 4.5, -1.5, 0]),
        # inside the range, for either sign
        ([1.19, 1.19, 0.81, 0.81], [1, -1, 1, -1], (0.2, 0.2), [-1.19, 1.19, -0.81, 0.81],
         [False] * 4, [-1.19, 1.19, -0.81, 0.81]),
        # without bounds: importance sampling
        ([1.5, 1.5, 0.5, 0.5], [1, -1, 1, -1], (inf, inf), [-1.5, 1.5, -0.5, 0.5],
         [False] * 4, [-1.5, 1.5, -0.5, 0.5]),
        # a clip_low of 1 or more never clips below
        ([1e-30], [-1], (1.0, 0.2), [0], [False], [0]),
        ([1e-30], [-1], (3.0, 0.2), [0], [False], [0]),
        # a dual clip: 8, bounded at -2 · -3 = 6; with A = 2 the clip rules, -2 · 1.2; ratio 2.9
        # stays below the bound, 5.8; below the range the clip rules as before, 2 · 0.8
        ([4, 4, 2.9, 0.5], [-2, 2, -2, -2], (0.2, 0.2, 3.0), [6, -2.4, 5.8, 1.6],
         [True, True, False, True], [0, 0, 5.8, 0]),
    ],
)
def test_clipped_surrogate_by_hand(ratios, advantages, clips, loss, clipped, gradient):
    logprobs = f64([ratios]).log().requires_grad_()
    out = clipped_surrogate(logprobs, torch.zeros_like(logprobs), f64([advantages]), *clips)
    assert_close(out.loss.detach(), f64([loss]))
    assert_close(out.ratio, f64([ratios]))
    assert out.clipped.tolist() == [clipped]
    out.loss.sum().backward()
    assert_close(logprobs.grad, f64([gradient]))
    assert logprobs.grad[out.clipped].eq(0).all()


def test_clipped_surrogate_at_ratio_one_is_the_policy_gradient():
    # loss -A, gradient -A (REINFORCE), nothing clipped, ratio exactly 1, even with no clip range
    logprobs = torch.tensor([[-0.3, -7.0, -0.0]], requires_grad=True)
    advantages = torch.tensor([[2.0, -3.0, 0.0]])
    out = clipped_surrogate(logprobs, logprobs.detach().clone(), advantages, 0.0, 0.0)
    out.loss.sum().backward()
    assert out.ratio.eq(1).all() and not out.clipped.any()
    assert_close(out.loss, -advantages)
    assert_close(logprobs.grad, -advantages)


def test_clipped_surrogate_expectation_over_two_tokens():
    # Sampled from old (3/4, 1/4), new (1/4, 3/4), A = (1, 5): E_old[ratio · A] is E_new[A] = 4.
    old, new, advantages = f64([0.75, 0.25]), f64([0.25, 0.75]), f64([1, 5])
    out = clipped_surrogate(new.log(), old.log(), advantages, inf, inf)
    assert_close((old * out.loss).sum(), f64(-4))
    # Clipped at 0.2: ratios 1/3 and 3 -> 1/3 and 1.2: 3/4 · 1/3 · 1 + 1/4 · 1.2 · 5 = 1.75
    out = clipped_surrogate(new.log(), old.log(), advantages, 0.2, 0.2)
    assert_close((old * out.loss).sum(), f64(-1.75))


@pytest.mark.parametrize(
    ("log_ratio", "advantage", "dual_clip", "loss", "clipped"),
    [
        (200.0, 2.0, None, -2.4, True),  # the clipped side rules: -2 · 1.2
        (200.0, 0.0, None, 0.0, False),  # no credit, no loss
        (200.0, -2.0, None, inf, False),  # the loss is beyond float32: it shows
        (200.0, -2.0, 3.0, 6.0, True),  # bounded: -2 · -3
        (-200.0, 2.0, None, 0.0, False),  # ratio 0 without clip: -2 · 0
        (-200.0, 0.0, None, 0.0, False),
        (-200.0, -2.0, None, 1.6, True),  # the clipped side rules: 2 · 0.8
    ],
)
def test_clipped_surrogate_of_huge_log_ratios(log_ratio, advantage, dual_clip, loss, clipped):
    logprobs = torch.tensor([log_ratio], requires_grad=True)  # e^200 overflows float32
    advantages = torch.tensor([advantage])
    out = clipped_surrogate(logprobs, torch.zeros(1), advantages, 0.2, 0.2, dual_clip)
    out.loss.sum().backward()
    assert_close(out.loss.detach(), torch.tensor([loss]))
    assert logprobs.grad.item() == 0
    assert out.clipped.item() is clipped


@pytest.mark.parametrize(
    ("shapes", "clips", "message"),
    [
        ([(4, 7), (4, 7), 4], (0.2, 0.2), r"advantages is \(4,\), logprobs is \(4, 7\): "
         r"expand per-sequence advantages with \[:, None\]\.expand\(-1, 7\)"),
        ([(4, 7), (4, 7), (4, 1)], (0.2, 0.2),
         r"advantages is \(4, 1\), logprobs is \(4, 7\): expand"),
        ([(4, 7), (4, 6), (4, 7)], (0.2, 0.2),
         r"old_logprobs is \(4, 6\), logprobs is \(4, 7\)"),
        *[([2] * 3, (value, 0.2), f"clip_low is {value}: 0 or more is legal")
          for value in (-0.1, nan)],
        *[([2] * 3, (0.2, value), f"clip_high is {value}: 0 or more is legal")
          for value in (-0.1, nan)],
        *[([2] * 3, (0.2, 0.2, value), r"dual_clip is .*: above 1 \+ clip_high, 1.2, is legal")
          for value in (1.2, 0.5, -1.0, nan)],
    ],
)
def test_clipped_surrogate_refuses(shapes, clips, message):
    with pytest.raises(ValueError, match=message):
        clipped_surrogate(*map(torch.zeros, shapes), *clips)


@pytest.mark.parametrize(
    ("values", "old", "returns", "clip", "loss", "clipped", "gradient"),
    [
        # V = 2 -> 1/2: 1/2 max(1, 2.5²) = 3.125; V = 6 -> 1/2: 1/2 max(9, 2.5²) = 4.5; V = 1/4 is
        # inside: 1/2 · 2.75² = 3.78125. V = -2 -> -1/2: 3.125; V = -6: 1/2 · 9. The gradient is
        # V - R where not clipped, else 0
        ([2, 6, 0.25, -2, -6], 0, [3, 3, 3, -3, -3], 0.5, [3.125, 4.5, 3.78125, 3.125, 4.5],
         [True, False, False, True, False], [0, 3, -2.75, 0, -3]),
        # the range lies around the old value: V = 12 -> 11; 1/2 max(2², 3²)
        ([12], 10, [14], 1.0, [4.5], [True], [0]),
        # without a bound half the squared error: 1/2 · 3², 1/2 · 4²
        ([5, -4], 0, [2, 0], None, [4.5, 8], [False] * 2, [3, -4]),
        ([5, -4], 0, [2, 0], inf, [4.5, 8], [False] * 2, [3, -4]),
    ],
)
def test_clipped_value_loss_by_hand(values, old, returns, clip, loss, clipped, gradient):
    values = f64([values]).requires_grad_()
    out = clipped_value_loss(values, torch.full_like(values, old), f64([returns]), clip)
    assert_close(out.loss.detach(), f64([loss]))
    assert out.clipped.tolist() == [clipped]
    out.loss.sum().backward()
    assert_close(values.grad, f64([gradient]))


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


@pytest.mark.parametrize(
    ("shapes", "clip", "message"),
    [
        ([(4, 7), (4, 7), 4], 0.2, r"returns is \(4,\), values is \(4, 7\): expand per-sequence"),
        ([(4, 7), (4, 8), (4, 7)], None, r"old_values is \(4, 8\), values is \(4, 7\)"),
        ([(4, 7)] * 3, -0.2, r"clip is -0\.2: 0 or more is legal"),
    ],
)
def test_clipped_value_loss_refuses(shapes, clip, message):
    with pytest.raises(ValueError, match=message):
        clipped_value_loss(*map(torch.zeros, shapes), clip)


both = pytest.mark.parametrize(
    ("function", "clips"),
    [(clipped_surrogate, (0.2, 0.2)), (clipped_value_loss, (0.2,)), (clipped_value_loss, (None,))],
)


@pytest.mark.parametrize("garbage", [nan, inf, -inf, 200.0, -200.0, 1e30])
@pytest.mark.parametrize("argument", [0, 1, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@both
def test_garbage_under_a_mask_changes_nothing(function, clips, argument, garbage, sign):
    mask = torch.tensor([[True, True, False]])
    clean = [torch.tensor(x) for x in ([[-1.0, -2.0, 0]], [[-1.5, -1.0, 0]], [[2.0, -1.0, sign]])]
    results = []
    for padding in (clean[argument][0, 2].item(), garbage):
        inputs = [x.clone() for x in clean]
        inputs[argument][0, 2] = padding
        inputs[0].requires_grad_()
        loss = masked_mean(function(*inputs, *clips).loss, mask)
        loss.backward()
        results.append((loss.item(), *inputs[0].grad.flatten().tolist()))
    assert results[0] == results[1] and results[0][3] == 0


@pytest.mark.parametrize("argument", [0, 1, 2])
@both
def test_a_nan_shows(function, clips, argument):
    inputs = [torch.zeros(1), torch.zeros(1), torch.zeros(1)]
    inputs[argument][0] = nan
    unused = argument == 1 and clips == (None,)  # without a clip the old values play no part
    assert function(*inputs, *clips).loss.isnan().all() == (not unused)


@both
def test_the_gradient_goes_to_the_first_argument_only_and_none_is_changed(function, clips):
    inputs = [f64([x, -2 * x]).requires_grad_() for x in (1.0, 0.9, 3.0)]
    before = [x.detach().clone() for x in inputs]
    out = function(*inputs, *clips)
    out.loss.sum().backward()
    assert [x.grad is None for x in inputs] == [False, True, True]
    assert out.clipped.dtype == torch.bool and not getattr(out, "ratio", out.clipped).requires_grad
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


def test_a_loss_that_names_the_mask_is_given_it():
    new, old, credit = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2, 3)
    mask = credit > 0

    def whole(logprobs, old_logprobs, advantages, response_mask):
        return logprobs, old_logprobs, advantages, response_mask

    found = with_mask(whole)(new, old, credit, mask)
    assert all(x is y for x, y in zip(found, (new, old, credit, mask), strict=True))
    clipped = partial(clipped_surrogate, clip_low=0.2, clip_high=0.2)
    assert_close(with_mask(clipped)(new, old, credit, mask).loss, torch.full((2, 3), -1.2))


# ---- what another policy sampled -----------------------------------------------------------------


def test_truncated_weights_by_hand():
    # 0.6 / 0.5, 0.9 / 0.1 = 9 cut to 2, 0.1 / 0.4
    old, sampled = f64([[0.6, 0.9, 0.1]]).log(), f64([[0.5, 0.1, 0.4]]).log().requires_grad_()
    weights = truncated_weights(old, sampled, 2.0)
    assert_close(weights, f64([[1.2, 2.0, 0.25]]))
    assert not weights.requires_grad
    assert_close(truncated_weights(old, old, 1.0), f64([[1, 1, 1]]))


def test_truncated_weights_estimate_what_the_policy_itself_would():
    """Over a vocabulary of three tokens, exactly: the sampler draws, the weights correct."""
    logits = f64([0.2, -0.4, 0.1]).requires_grad_()
    old, sampled = logits.detach().softmax(0), f64([0.5, 0.1, 0.4])
    credit = f64([1.0, -2.0, 3.0])
    weights = truncated_weights(old.log()[None], sampled.log()[None], inf)[0]
    # the mean of any number, and the gradient of the loss at ratio 1: that of -sum_a pi(a) A(a)
    assert_close((sampled * weights * credit).sum(), (old * credit).sum())
    new = logits.log_softmax(0)
    out = clipped_surrogate(new[None], new.detach()[None], (weights * credit)[None], 0.2, 0.2)
    (sampled * out.loss[0]).sum().backward()
    found, logits.grad = logits.grad, None
    (-(logits.softmax(0) * credit).sum()).backward()
    assert_close(found, logits.grad)
    # exp(0.2, -0.4, 0.1) = (1.221403, 0.670320, 1.105171), so pi = (0.407556, 0.223672, 0.368772).
    # With a cap of 1.5 the second token, whose ratio is 2.24, counts with 1.5 · 0.1 = 0.15:
    # 0.4075562 · 1 - 0.15 · 2 + 0.3687721 · 3 = 1.2138727
    cut = truncated_weights(old.log()[None], sampled.log()[None], 1.5)[0]
    assert_close((sampled * cut * credit).sum(), f64(1.2138727))


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_a_weighted_advantage_is_a_weighted_loss(dual_clip):
    logprobs, old = f64([[-0.1, -2.0, -0.5, -0.3]]), f64([[-1.0, -1.0, -1.0, -2.0]])
    credit, weights = f64([[1, -1, 2, -2]]), f64([[0.3, 1.7, 2.0, 0.9]])
    plain = clipped_surrogate(logprobs, old, credit, 0.2, 0.2, dual_clip)
    weighted = clipped_surrogate(logprobs, old, weights * credit, 0.2, 0.2, dual_clip)
    assert_close(weighted.loss, weights * plain.loss)
    assert torch.equal(weighted.clipped, plain.clipped)


def test_truncated_weights_refuse_a_cap_below_one_and_other_shapes():
    with pytest.raises(ValueError, match=r"cap is 0\.9: 1 or more is legal"):
        truncated_weights(torch.zeros(1, 2), torch.zeros(1, 2), 0.9)
    with pytest.raises(ValueError, match="sampled_logprobs"):
        truncated_weights(torch.zeros(1, 2), torch.zeros(2), 2.0)
