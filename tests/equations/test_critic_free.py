"""Policy gradients without a critic: advantages and losses by hand, and under masks."""

from functools import partial
from math import log

import pytest
import torch

from minirlhf.equations.advantages import gae, token_rewards
from minirlhf.equations.critic_free import (
    batch_scaled_advantages,
    cispo_loss,
    group_advantages,
    leave_one_out_advantages,
    rewards_to_go,
    sequence_surrogate,
    without_spread,
)
from minirlhf.equations.masking import masked_mean, masked_standardize
from minirlhf.equations.policy import clipped_surrogate

nan, inf = torch.nan, torch.inf
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)

# ---- advantages of groups ------------------------------------------------------------------------


def test_group_advantages_by_hand():
    # 1, 2, 3: mean 2, sample variance (1 + 0 + 1) / 2 = 1, so ±1 / (1 + 1e-4)
    # 0, 0, 6: mean 2, sample variance (4 + 4 + 16) / 2 = 12
    scores = f64([1, 2, 3, 0, 0, 6])
    a, b = 1 / 1.0001, 1 / (12**0.5 + 1e-4)
    assert_close(group_advantages(scores, 3), f64([-a, 0, a, -2 * b, -2 * b, 4 * b]))
    assert_close(group_advantages(scores, 3, divide_by_std=False), f64([-1, 0, 1, -2, -2, 4]))


def test_group_advantages_rows_of_a_group_are_adjacent():
    # groups (0, 2) and (10, 20), not (0, 10) and (2, 20)
    assert_close(group_advantages(f64([0, 2, 10, 20]), 2, divide_by_std=False), f64([-1, 1, -5, 5]))


def test_group_advantages_adds_its_epsilon_to_the_deviation():
    # ±5e-5: sample variance 2 · 25e-10 / 1, deviation sqrt(2) · 5e-5
    expected = 5e-5 / (2**0.5 * 5e-5 + 1e-4)
    assert_close(group_advantages(f64([5e-5, -5e-5]), 2), f64([expected, -expected]))


@pytest.mark.parametrize("divide_by_std", [True, False])
@pytest.mark.parametrize("value", [0.1, -3.3, 1e6])
def test_group_advantages_are_exact_zeros_where_scores_agree(value, divide_by_std):
    # seven, because the rounded mean of seven equal numbers may be another number
    scores = torch.tensor([value] * 7 + [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    out = group_advantages(scores, 7, divide_by_std)
    assert out[:7].tolist() == [0] * 7 and out[7:].ne(0).all()


def test_group_advantages_of_integer_scores():
    found = group_advantages(torch.tensor([0, 1]), 2, divide_by_std=False)
    assert_close(found, torch.tensor([-0.5, 0.5]))


def test_group_advantages_expectation_over_two_tokens():
    # policy (3/4, 1/4), scores 1 and 0, groups of two. Without the division, the mean holds the
    # row's own score, so that E[A · grad log p] is (1 - 1/2) of the true gradient, as Bessel has
    # it. With the logit z of the first token: grad log p = 1/4 and -3/4, true gradient
    # dE[S]/dz = p (1 - p) = 3/16.
    p, grad, score = [0.75, 0.25], [0.25, -0.75], [1.0, 0.0]
    expectation = 0.0
    for i in range(2):
        for j in range(2):
            out = group_advantages(f64([score[i], score[j]]), 2, divide_by_std=False)
            expectation += p[i] * p[j] * (out[0] * grad[i] + out[1] * grad[j]) / 2
    assert_close(expectation, f64(3 / 16 / 2))


@pytest.mark.parametrize(
    ("rows", "group_size", "message"),
    [
        ((4, 1), 2, r"scores is \(4, 1\): one number a row is needed, \(N,\)"),
        (10, 4, "scores has 10 rows, not a multiple of group_size 4: use 8 or 12$"),
        (3, 4, "scores has 3 rows, not a multiple of group_size 4: use 4$"),
        (4, 1, "group_size is 1: use 2 or more"),
        (4, 0, "group_size is 0: use 2 or more"),
        (4, -2, "group_size is -2: use 2 or more"),
    ],
)
@pytest.mark.parametrize(
    "function",
    [group_advantages, batch_scaled_advantages, leave_one_out_advantages, without_spread],
)
def test_functions_of_groups_refuse(function, rows, group_size, message):
    with pytest.raises(ValueError, match=message):
        function(torch.zeros(rows), group_size)


def test_batch_scaled_advantages_by_hand():
    # deviations of groups -1, 0, 1 and -2, -2, 4; of all: mean 2, squares 1 + 0 + 1 + 4 + 4 + 16
    std = (26 / 5) ** 0.5 + 1e-4
    expected = f64([-1, 0, 1, -2, -2, 4]) / std
    assert_close(batch_scaled_advantages(f64([1, 2, 3, 0, 0, 6]), 3), expected)


def test_batch_scaled_advantages_of_one_group_are_those_of_the_group():
    scores = f64([0.3, -1.2, 5.0, 0.7])
    assert_close(batch_scaled_advantages(scores, 4), group_advantages(scores, 4))


@pytest.mark.parametrize("value", [0.1, -3.3, 1e6])
def test_batch_scaled_advantages_are_exact_zeros_where_scores_agree(value):
    scores = torch.tensor([value] * 7 + [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    out = batch_scaled_advantages(scores, 7)
    assert out[:7].tolist() == [0] * 7 and out[7:].ne(0).all()
    assert not batch_scaled_advantages(torch.tensor([value] * 7), 7).any()


def test_leave_one_out_advantages_by_hand():
    # 1, 2, 3: 1 - 2.5, 2 - 2, 3 - 1.5; 0, 0, 6: 0 - 3, 0 - 3, 6 - 0
    scores = f64([1, 2, 3, 0, 0, 6])
    assert_close(leave_one_out_advantages(scores, 3), f64([-1.5, 0, 1.5, -3, -3, 6]))


def test_leave_one_out_advantages_of_two_are_their_difference():
    # groups (0, 2) and (10, 20), not (0, 10) and (2, 20)
    assert_close(leave_one_out_advantages(f64([0, 2, 10, 20]), 2), f64([-2, 2, -10, 10]))


def test_leave_one_out_is_the_centred_score_without_bessels_bias():
    scores = f64([0.3, -1.2, 5.0, 0.7, 2.0, 2.5, -3.0, 0.1])
    centred = group_advantages(scores, 4, divide_by_std=False)
    assert_close(leave_one_out_advantages(scores, 4), centred * 4 / 3)


@pytest.mark.parametrize("value", [0.1, -3.3, 1e6])
def test_leave_one_out_advantages_are_exact_zeros_where_scores_agree(value):
    scores = torch.tensor([value] * 7 + [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    out = leave_one_out_advantages(scores, 7)
    assert out[:7].tolist() == [0] * 7 and out[7:].ne(0).all()


def test_leave_one_out_gradient_is_unbiased_over_two_tokens():
    # As for groups above, but the baseline is the other row's score: the true 3/16.
    p, grad, score = [0.75, 0.25], [0.25, -0.75], [1.0, 0.0]
    expectation = 0.0
    for i in range(2):
        for j in range(2):
            out = leave_one_out_advantages(f64([score[i], score[j]]), 2)
            expectation += p[i] * p[j] * (out[0] * grad[i] + out[1] * grad[j]) / 2
    assert_close(expectation, f64(3 / 16))


def test_without_spread_finds_groups_that_agree():
    third = 0.1 + 0.2  # is not 0.3
    scores = f64([1, 1, 0.3, third, 2, 5, -1, -1])
    assert without_spread(scores, 2).tolist() == [True, False, False, True]
    assert without_spread(f64([4, 4, 4, 4, 4, 5]), 3).tolist() == [True, False]


# ---- rewards to go -------------------------------------------------------------------------------


def test_rewards_to_go_by_hand():
    # -1 + 2 + 3 = 4, 2 + 3, 3; 5 alone
    mask = torch.tensor([[True, True, True], [True, False, False]])
    found = rewards_to_go(f64([[-1, 2, 3], [5, 7, 9]]), mask)
    assert_close(found, f64([[4, 5, 3], [5, 0, 0]]))


@pytest.mark.parametrize("garbage", [nan, inf, 1e30])
def test_rewards_to_go_skips_holes_and_what_lies_behind(garbage):
    mask = torch.tensor([[True, False, True, False]])
    found = rewards_to_go(f64([[1, garbage, 4, garbage]]), mask)
    assert found.tolist() == [[5, 0, 4, 0]]


def test_rewards_to_go_is_gae_of_a_critic_that_says_nothing():
    generator = torch.Generator().manual_seed(2)
    rewards = torch.randn(4, 7, generator=generator, dtype=torch.float64)
    mask = torch.rand(4, 7, generator=generator) < 0.6
    plain = gae(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    assert_close(rewards_to_go(rewards, mask), plain.advantages)


def test_reinforce_plus_plus_by_hand():
    # Scores 3 and 1, KL of 1 and 2 nats a token at 0.5: rewards (-0.5, 2) and (0); to go 1.5, 2, 0;
    # mean 7/6, variance (1/9 + 25/36 + 49/36) / 3 = 13/18
    mask = torch.tensor([[True, True], [True, False]])
    rewards = token_rewards(f64([3, 1]), f64([[1, 2], [2, nan]]), mask, kl_coef=0.5)
    found = masked_standardize(rewards_to_go(rewards, mask), mask)
    std = (13 / 18) ** 0.5
    expected = f64([[1 / 3 / std, 5 / 6 / std], [-7 / 6 / std, 0]])
    assert_close(found, expected)


@pytest.mark.parametrize(
    ("rewards", "mask", "message"),
    [
        (torch.zeros(2, 3), torch.ones(2, 2) > 0, r"mask is \(2, 2\), rewards is \(2, 3\)"),
        (torch.zeros(3), torch.ones(3) > 0, r"response_mask is \(3,\): rows and tokens"),
        (torch.zeros(2, 3), torch.ones(2, 3), "response_mask is torch.float32: bool is needed"),
    ],
)
def test_rewards_to_go_refuses(rewards, mask, message):
    with pytest.raises(ValueError, match=message):
        rewards_to_go(rewards, mask)


# ---- one ratio a response ------------------------------------------------------------------------

MASK = torch.tensor([[True, True, False], [True, True, True]])


@pytest.mark.parametrize(
    ("advantages", "clips", "loss", "gradient", "clipped"),
    [
        # ratios sqrt(4 · 1) = 2 and cbrt(1/8) = 1/2: min(2, 1.2) and min(0.5, 0.8); the gradient of
        # a row's loss is -A s / |y| a token, times the row's cells that are summed
        ([1, 1], (0.2, 0.2), [-1.2, -0.5], [0, -0.5 / 3], [True, False]),
        ([-1, -1], (0.2, 0.2), [2, 0.8], [1, 0], [False, True]),
        ([3, 2], (inf, inf), [-6, -1], [-3, -1 / 3], [False, False]),
        ([-2, -2], (0.2, 0.2, 1.5), [3, 1.6], [0, 0], [True, True]),
    ],
)
def test_sequence_surrogate_by_hand(advantages, clips, loss, gradient, clipped):
    logprobs = torch.log(f64([[4, 1, 1], [0.5, 0.25, 1]])).requires_grad_()
    spread = f64(advantages)[:, None].expand(2, 3)
    out = sequence_surrogate(logprobs, torch.zeros(2, 3).double(), spread, MASK, *clips)
    assert_close(out.loss.detach(), f64(loss)[:, None].expand(2, 3))
    assert_close(out.ratio, f64([[2] * 3, [0.5] * 3]))
    assert out.clipped.tolist() == [[row] * 3 for row in clipped]
    masked_mean(out.loss, MASK, dim=1).sum().backward()  # the paper's sum over responses
    first, second = gradient
    assert_close(logprobs.grad, f64([[first, first, 0], [second] * 3]))


def test_sequence_surrogate_of_one_token_is_the_clipped_surrogate():
    logprobs, old, advantages = (f64([[0.3], [-0.4]]), f64([[0.0], [0.1]]), f64([[1.0], [-2.0]]))
    one = torch.ones(2, 1, dtype=torch.bool)
    whole = sequence_surrogate(logprobs, old, advantages, one, 0.2, 0.3)
    single = clipped_surrogate(logprobs, old, advantages, 0.2, 0.3)
    for found, expected in zip(whole, single, strict=True):
        assert torch.equal(found, expected)


def test_sequence_surrogate_at_ratio_one_is_reinforce():
    logprobs = torch.tensor([[-0.3, -7.0, 0.0], [-1.0, -2.0, -3.0]], requires_grad=True)
    advantages = torch.tensor([[2.0], [-3.0]]).expand(2, 3)
    out = sequence_surrogate(logprobs, logprobs.detach(), advantages, MASK, 0.0, 0.0)
    masked_mean(out.loss, MASK, dim=1).sum().backward()
    assert out.ratio.eq(1).all() and not out.clipped.any()
    # the gradient of the mean log-prob of a response: -A / |y|
    assert_close(logprobs.grad, torch.tensor([[-1.0, -1.0, 0.0], [1.0, 1.0, 1.0]]))


def test_sequence_surrogate_refuses():
    two = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"response_mask is \(2, 2\), logprobs is \(2, 3\)"):
        sequence_surrogate(two, two, two, torch.ones(2, 2) > 0, 0.2, 0.2)
    with pytest.raises(ValueError, match=r"response_mask is torch\.float32: bool is needed"):
        sequence_surrogate(two, two, two, torch.ones(2, 3), 0.2, 0.2)
    with pytest.raises(ValueError, match=r"advantages is \(2,\), logprobs is \(2, 3\): expand"):
        sequence_surrogate(two, two, torch.zeros(2), torch.ones(2, 3) > 0, 0.2, 0.2)
    with pytest.raises(ValueError, match=r"response_mask is \(3,\): rows and tokens"):
        sequence_surrogate(*[torch.zeros(3)] * 3, torch.ones(3) > 0, 0.2, 0.2)


# ---- clipped weights -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "advantages", "clips", "weights", "clipped"),
    [
        ([1.5, 1.5, 0.5, 0.5], [1, -1, 1, -1], (0.2, 0.2), [1.2, 1.2, 0.8, 0.8], [True] * 4),
        ([1.1, 0.9], [2, -3], (0.2, 0.2), [1.1, 0.9], [False] * 2),
        # no lower bound, as in the paper; none at all
        ([1e-3, 5], [1, 1], (1.0, 0.2), [1e-3, 1.2], [False, True]),
        ([1e-3, 5], [1, 1], (inf, inf), [1e-3, 5], [False] * 2),
    ],
)
def test_cispo_loss_by_hand(ratios, advantages, clips, weights, clipped):
    logprobs = (f64([ratios]).log() - 2).requires_grad_()  # old log-probs of -2
    out = cispo_loss(logprobs, torch.full_like(logprobs, -2), f64([advantages]), *clips)
    a_w = f64([[a * w for a, w in zip(advantages, weights, strict=True)]])
    assert_close(out.loss.detach(), -a_w * f64([[log(r) - 2 for r in ratios]]))
    assert_close(out.ratio, f64([ratios]))
    assert out.clipped.tolist() == [clipped]
    out.loss.sum().backward()
    assert_close(logprobs.grad, -a_w)  # where clipped, too


def test_cispo_loss_at_ratio_one_is_reinforce():
    logprobs = torch.tensor([[-0.3, -7.0]], requires_grad=True)
    advantages = torch.tensor([[2.0, -3.0]])
    out = cispo_loss(logprobs, logprobs.detach(), advantages, 0.0, 0.0)
    out.loss.sum().backward()
    assert out.ratio.eq(1).all() and not out.clipped.any()
    assert_close(logprobs.grad, -advantages)


def test_cispo_loss_of_huge_log_ratios():
    # e^200 overflows float32: the weight is 1.2, the loss -1.2 · -2 · 200
    logprobs = torch.tensor([200.0, -200.0], requires_grad=True)
    out = cispo_loss(logprobs, torch.zeros(2), torch.tensor([-2.0, -2.0]), 0.2, 0.2)
    out.loss.sum().backward()
    assert_close(out.loss.detach() / 80, torch.tensor([6.0, -4.0]))
    assert_close(logprobs.grad, torch.tensor([2.4, 1.6]))


@pytest.mark.parametrize(
    ("shapes", "clips", "message"),
    [
        ([(4, 7), (4, 7), 4], (0.2, 0.2), r"advantages is \(4,\), logprobs is \(4, 7\): expand"),
        ([2] * 3, (-0.1, 0.2), "clip_low is -0.1: 0 or more is legal"),
        ([2] * 3, (0.2, nan), "clip_high is nan: 0 or more is legal"),
    ],
)
def test_cispo_loss_refuses(shapes, clips, message):
    with pytest.raises(ValueError, match=message):
        cispo_loss(*map(torch.zeros, shapes), *clips)


def test_losses_have_the_policy_gradient_as_expectation():
    # Sampled from old (3/4, 1/4), new (1/4, 3/4), A = (1, 5), no clips. Of the logit z of the first
    # token: grad log new = 3/4 and -1/4. E_old[ratio · A · grad log new] = E_new[A · grad log new]
    # = 1/4 · 3/4 - 3/4 · 5/4 = -3/4.
    old, new, advantages = f64([0.75, 0.25]), f64([0.25, 0.75]), f64([1, 5])
    one = torch.ones(2, 1, dtype=torch.bool)
    sequences = partial(sequence_surrogate, response_mask=one, clip_low=inf, clip_high=inf)
    for function in (sequences, partial(cispo_loss, clip_low=inf, clip_high=inf)):
        logprobs = new.log()[:, None].requires_grad_()
        out = function(logprobs, old.log()[:, None], advantages[:, None])
        (old * out.loss[:, 0]).sum().backward()
        assert_close(-(logprobs.grad[:, 0] * f64([0.75, -0.25])).sum(), f64(-0.75))


both = pytest.mark.parametrize("function", ["sequence", "cispo"])


def loss_of(function: str, inputs: list, mask):
    if function == "cispo":
        return cispo_loss(*inputs, 0.2, 0.2)
    return sequence_surrogate(*inputs, mask, 0.2, 0.2)


@pytest.mark.parametrize("garbage", [nan, inf, -inf, 200.0, -200.0, 1e30])
@pytest.mark.parametrize("argument", [0, 1, 2])
@both
def test_garbage_under_a_mask_changes_nothing(function, argument, garbage):
    mask = torch.tensor([[True, True, False]])
    clean = [torch.tensor(x) for x in ([[-1.0, -2.0, 0]], [[-1.5, -1.0, 0]], [[2.0, -1.0, 1.0]])]
    results = []
    for padding in (clean[argument][0, 2].item(), garbage):
        inputs = [x.clone() for x in clean]
        inputs[argument][0, 2] = padding
        inputs[0].requires_grad_()
        loss = masked_mean(loss_of(function, inputs, mask).loss, mask)
        loss.backward()
        results.append((loss.item(), *inputs[0].grad.flatten().tolist()))
    assert results[0] == results[1] and results[0][3] == 0


@pytest.mark.parametrize("argument", [0, 1, 2])
@both
def test_a_nan_shows(function, argument):
    inputs = [torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 2)]
    inputs[argument][0, 0] = nan
    assert loss_of(function, inputs, torch.ones(1, 2) > 0).loss[0, 0].isnan()


@both
def test_the_gradient_goes_to_the_first_argument_only_and_none_is_changed(function):
    inputs = [f64([[x, -2 * x]]).requires_grad_() for x in (1.0, 0.9, 3.0)]
    before = [x.detach().clone() for x in inputs]
    out = loss_of(function, inputs, torch.ones(1, 2) > 0)
    out.loss.sum().backward()
    assert [x.grad is None for x in inputs] == [False, True, True]
    assert out.clipped.dtype == torch.bool and not out.ratio.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))


@pytest.mark.parametrize(
    ("function", "inputs", "numbers"),
    [
        (group_advantages, (f64([1, 5, 2, 8]),), (2,)),
        (leave_one_out_advantages, (f64([1, 5, 2, 8]),), (2,)),
        (rewards_to_go, (f64([[1, 2], [3, 4]]), torch.ones(2, 2) > 0), ()),
    ],
)
def test_advantages_get_no_gradient_and_inputs_stay_as_they_are(function, inputs, numbers):
    before = [x.clone() for x in inputs]
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    assert not function(*inputs, *numbers).requires_grad
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
