from functools import partial

import pytest
import torch
from torch import zeros

from minirlhf.equations.advantages import gae, token_rewards

nan, inf = torch.nan, torch.inf
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)


def full(*shape):
    return torch.ones(shape, dtype=torch.bool)


def random_rows(rows=5, width=9):
    """Rewards, values and a mask with holes, from a fixed seed; a True in each row."""
    generator = torch.Generator().manual_seed(3)
    rewards = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, width, generator=generator) < 0.6
    mask[:, 4] = True
    return rewards, values, mask


def brute_force_row(rewards, values, gamma, lam, bootstrap):
    """A_t = sum over k of (gamma lam)^k delta_t+k on plain lists, O(n²)."""
    following = [*values[1:], bootstrap]
    n = len(rewards)
    return [
        sum(
            (gamma * lam) ** (k - t) * (rewards[k] + gamma * following[k] - values[k])
            for k in range(t, n)
        )
        for t in range(n)
    ]


def test_token_rewards_by_hand():
    # the score lands on the last True token: column 2, column 0, and column 3 beyond a hole
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 1]]).bool()
    kl = f64([[1, 2, -3, nan], [4, inf, nan, nan], [5, nan, 6, 8]])
    rewards = token_rewards(f64([10, 20, 30]), kl, mask, kl_coef=0.5)
    expected = f64([[-0.5, -1, 11.5, 0], [18, 0, 0, 0], [-2.5, 0, 0, 26]])
    assert_close(rewards, expected)
    assert rewards[~mask].eq(0).all()


def test_token_rewards_sum_is_score_minus_the_sequence_kl():
    rewards = token_rewards(f64([2]), f64([[0.5, 0.25, -1]]), full(1, 3), kl_coef=2.0)
    assert_close(rewards.sum(1), f64([2.5]))  # 2 - 2 · (-0.25)


@pytest.mark.parametrize(
    ("scores", "kl", "mask", "message"),
    [
        (zeros(3), zeros(3, 2), torch.tensor([[True, False], [False, False], [False, False]]),
         r"row 1 of response_mask has no True token \(2 such rows"),
        (zeros(1), zeros(1, 0), full(1, 0), "row 0 of response_mask has no True token"),
        (zeros(2, 1), zeros(2, 3), full(2, 3),
         r"scores is \(2, 1\), response_mask is \(2, 3\): one"),
        (zeros(2), zeros(2, 1), full(2, 3), r"response_mask is \(2, 3\), kl is \(2, 1\)"),
        (zeros(2), zeros(2), full(2), r"response_mask is \(2,\): rows and tokens are needed"),
        (zeros(2), zeros(2, 3), full(2, 3).long(), "response_mask is torch.int64: bool is needed"),
    ],
)
def test_token_rewards_refuses(scores, kl, mask, message):
    with pytest.raises(ValueError, match=message):
        token_rewards(scores, kl, mask, 0.1)


@pytest.mark.parametrize(
    ("rewards", "values", "gamma", "lam", "bootstrap", "advantages", "returns"),
    [
        # 3; 2 + 0.1 · 3; 1 + 0.1 · 2.3
        ([1, 2, 3], [0, 0, 0], 0.1, 1.0, None, [1.23, 2.3, 3], [1.23, 2.3, 3]),
        # V = 2, 4, state after the last token worth 8.
        # delta_1 = 3 + 4 - 4 = 3; delta_0 = 1 + 2 - 2 = 1; A_1 = 3; A_0 = 1 + 3/4; R = A + V
        ([1, 3], [2, 4], 0.5, 0.5, f64([8]), [1.75, 3], [3.75, 7]),
        # gamma = lam = 1: returns are sums of future rewards, 1 + 2 + 4, 2 + 4, 4, whatever V
        ([1, 2, 4], [5, -7, 11], 1.0, 1.0, None, [2, 13, -7], [7, 6, 4]),
        # lam = 0: the TD error, 1 + 0.5 · 6 - 4 = 0; 2 + 0.5 · 8 - 6 = 0; 3 + 0 - 8 = -5
        ([1, 2, 3], [4, 6, 8], 0.5, 0.0, None, [0, 0, -5], [4, 6, 3]),
    ],
)
def test_gae_by_hand(rewards, values, gamma, lam, bootstrap, advantages, returns):
    out = gae(f64([rewards]), f64([values]), full(1, len(rewards)), gamma, lam, bootstrap)
    assert_close(out.advantages, f64([advantages]))
    assert_close(out.returns, f64([returns]))


@pytest.mark.parametrize(("gamma", "lam"), [(1, 0.95), (0.9, 0.7), (0.5, 1), (0.99, 0), (0, 0.5)])
def test_gae_equals_brute_force_over_the_compressed_rows(gamma, lam):
    rewards, values, mask = random_rows()
    bootstrap = f64([0, 1.5, -2, 0, 3])
    out = gae(rewards, values, mask, gamma, lam, bootstrap)
    for row, chosen in enumerate(mask):
        kept = values[row][chosen]
        expected = f64(
            brute_force_row(
                rewards[row][chosen].tolist(), kept.tolist(), gamma, lam, bootstrap[row].item()
            )
        )
        assert_close(out.advantages[row][chosen], expected)
        assert_close(out.returns[row][chosen], expected + kept)
    assert out.advantages[~mask].eq(0).all() and out.returns[~mask].eq(0).all()


def test_gae_skips_holes_instead_of_zeroing_them():
    # Constant value 1 and a final reward of 1 promise nothing new: every advantage is 0. A hole
    # whose value counts as 0 would give -1 before it and +1 after it, discounted by lam.
    mask = torch.tensor([[True, False, True]])
    out = gae(f64([[0, 0, 1]]), f64([[1, 0, 1]]), mask, gamma=1.0, lam=0.95)
    assert_close(out.advantages, f64([[0, 0, 0]]))
    assert_close(out.returns, f64([[1, 0, 1]]))


@pytest.mark.parametrize("garbage", [nan, inf])
def test_gae_garbage_under_the_mask_changes_nothing(garbage):
    rewards, values, mask = random_rows()
    clean = gae(rewards, values, mask, 0.9, 0.8)
    dirty = gae(rewards.where(mask, garbage), values.where(mask, garbage), mask, 0.9, 0.8)
    assert torch.equal(clean.advantages, dirty.advantages)
    assert torch.equal(clean.returns, dirty.returns)


def test_gae_does_not_depend_on_padding_or_row_order():
    rewards, values, mask = random_rows()
    out = gae(rewards, values, mask, 0.9, 0.8)
    order = torch.tensor([3, 0, 4, 1, 2])
    wide = [torch.nn.functional.pad(x[order], (0, 4)) for x in (rewards, values, mask)]
    assert_close(gae(*wide, 0.9, 0.8).advantages[:, :9], out.advantages[order])


def test_gae_of_true_values_is_zero_in_expectation():
    # Two tokens with probabilities 3/4 and 1/4 and rewards 4 and 8: V = 3 + 2 = 5 is exact, so
    # E[A] = 3/4 · (4 - 5) + 1/4 · (8 - 5) = 0.
    out = gae(f64([[4], [8]]), f64([[5], [5]]), full(2, 1), 1.0, 0.95)
    assert_close(out.advantages, f64([[-1], [3]]))
    assert_close((f64([[0.75], [0.25]]) * out.advantages).sum(), f64(0))


def test_gae_of_a_row_without_tokens_is_zero():
    mask = torch.tensor([[False, False], [True, False]])
    out = gae(f64([[nan, 1], [2, nan]]), f64([[nan, 1], [1, nan]]), mask, 1.0, 0.95)
    assert out.advantages.tolist() == [[0, 0], [1, 0]]


def test_gae_has_no_gradient_to_the_bootstrap_and_is_float32_at_least():
    half = torch.ones(1, 2, dtype=torch.bfloat16)
    out = gae(half, half, full(1, 2), 1.0, 0.95, half[0, :1].clone().requires_grad_())
    assert not out.advantages.requires_grad and not out.returns.requires_grad
    assert out.advantages.dtype == out.returns.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"values": zeros(2, 4)}, r"values is \(2, 4\), rewards is \(2, 3\): give values"),
        ({"response_mask": full(2)}, r"response_mask is \(2,\), rewards is \(2, 3\): expand"),
        ({"response_mask": full(2, 3).float()}, r"response_mask is torch.float32: bool is needed"),
        ({"rewards": zeros(3), "values": zeros(3), "response_mask": full(3)},
         r"response_mask is \(3,\): rows and tokens are needed"),
        ({"bootstrap": zeros(2, 3)}, r"bootstrap is \(2, 3\), response_mask is \(2, 3\): one"),
        *[({name: value}, f"{name} is {value}: at least 0 and at most 1 is legal")
          for name in ("gamma", "lam") for value in (-0.1, 1.1, nan)],
    ],
)
def test_gae_refuses(changes, message):
    right = {"rewards": zeros(2, 3), "values": zeros(2, 3), "response_mask": full(2, 3),
             "gamma": 1.0, "lam": 0.95}
    with pytest.raises(ValueError, match=message):
        gae(**right | changes)


@pytest.mark.parametrize(
    ("function", "inputs", "numbers"),
    [
        (token_rewards, (f64([1, 2]), f64([[3, 4], [5, 6]]), full(2, 2)), (0.5,)),
        (partial(gae, bootstrap=f64([1, 2, 3, 4, 5])), random_rows(), (0.9, 0.8)),
    ],
)
def test_inputs_stay_as_they_are_and_get_no_gradient(function, inputs, numbers):
    before = [x.clone() for x in inputs]
    inputs = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    found = function(*inputs, *numbers)
    for out in found if isinstance(found, tuple) else [found]:
        assert not out.requires_grad
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
