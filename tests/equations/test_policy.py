"""The clipped losses of PPO by hand, with their gradients, at their bounds and under a mask."""

from functools import partial

import pytest
import torch

from minirlhf.equations.masking import masked_mean, masked_sum
from minirlhf.equations.policy import clipped_surrogate, clipped_value_loss

nan, inf = torch.nan, torch.inf
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


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


# ---- both ----


@pytest.mark.parametrize(
    ("function", "tensors", "numbers"),
    [(clipped_surrogate, 3, (0.2, 0.2)), (clipped_value_loss, 3, (0.2,))],
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
