from functools import partial

import pytest
import torch

from minirlhf.equations.masking import masked_mean, masked_rescale, masked_standardize, masked_sum

nan, inf = torch.nan, torch.inf
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
REDUCTIONS = [masked_sum, masked_mean]
WHITENINGS = [masked_standardize, masked_rescale]


def test_masked_sum_by_hand():
    x = f64([[1, 2, 100], [4, 100, 100]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_close(masked_sum(x, mask), f64(7))  # 1 + 2 + 4
    assert_close(masked_sum(x, mask, dim=1), f64([3, 4]))
    assert_close(masked_sum(x, mask, dim=0), f64([5, 2, 0]))
    assert_close(masked_sum(x, mask, dim=(0, 1)), f64(7))


def test_masked_mean_by_hand():
    x = f64([[1, 2, 100], [6, 100, 100]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert_close(masked_mean(x, mask), f64(3))  # (1 + 2 + 6) / 3, not the mean of row means 3.75
    assert_close(masked_mean(x, mask, dim=1), f64([1.5, 6]))
    assert_close(masked_mean(x, mask, dim=0), f64([3.5, 2, 0]))


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_an_empty_mask_gives_zero_with_zero_gradient(reduce):
    x = f64([[nan, 2], [inf, 4]]).requires_grad_()
    mask = torch.zeros(2, 2, dtype=torch.bool)
    assert reduce(x, mask).item() == reduce(x[:0], mask[:0]).item() == 0
    assert reduce(x, mask, dim=1).tolist() == [0, 0]
    reduce(x, mask).backward()
    assert x.grad.tolist() == [[0, 0], [0, 0]]


@pytest.mark.parametrize("garbage", [nan, inf, -inf])
@pytest.mark.parametrize(("reduce", "share"), [(masked_mean, 0.5), (masked_sum, 1.0)])
def test_reductions_gradient_by_hand_under_garbage(reduce, share, garbage):
    x = f64([1, garbage, 3]).requires_grad_()
    reduce(x, torch.tensor([True, False, True])).backward()
    assert x.grad.tolist() == [share, 0, share]  # d mean / d x = 1 / 2 tokens


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_garbage_under_a_true_mask_shows(reduce):
    assert reduce(f64([1, nan]), torch.tensor([True, True])).isnan()


def test_masked_mean_of_a_bool_is_a_fraction():
    clipped = torch.tensor([True, False, False, True])
    assert_close(masked_mean(clipped, torch.tensor([True, True, True, False])), torch.tensor(1 / 3))


def test_masked_sum_of_half_precision_is_float32():
    x = torch.full((100_000,), 1.0, dtype=torch.float16)  # float16 ends at 65504
    total = masked_sum(x, torch.ones(100_000, dtype=torch.bool))
    assert total.dtype == torch.float32 and total.item() == 100_000


def test_whitening_by_hand():
    # 2, 4, 6, 8: mean 5, squares 9, 1, 1, 9, population variance 5
    x = f64([[2, nan, 4], [6, 8, inf]])
    mask = torch.tensor([[True, False, True], [True, True, False]])
    s = 5**-0.5
    assert_close(masked_standardize(x, mask), f64([[-3 * s, 0, -s], [s, 3 * s, 0]]))
    # the same numbers, plus the mean 5
    assert_close(masked_rescale(x, mask), f64([[5 - 3 * s, 0, 5 - s], [5 + s, 5 + 3 * s, 0]]))


def test_whitening_adds_its_epsilon_to_the_variance():
    # ±1e-4: variance 1e-8, so 1e-4 / sqrt(1e-8 + 1e-8) = sqrt(1/2)
    x, mask = f64([1e-4, -1e-4]), torch.tensor([True, True])
    assert_close(masked_standardize(x, mask), f64([0.5**0.5, -(0.5**0.5)]))
    assert_close(masked_rescale(x, mask), f64([0.5**0.5, -(0.5**0.5)]))


@pytest.mark.parametrize("value", [0.1, -3.3, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_whitening_of_equal_cells_is_exact(value, dtype):
    x = torch.tensor([[value, nan, value], [value, value, value]], dtype=dtype)
    mask = torch.tensor([[True, False, True], [True, True, True]])
    assert torch.equal(masked_standardize(x, mask), torch.zeros(2, 3, dtype=dtype))
    assert torch.equal(masked_rescale(x, mask), x.nan_to_num(0))


@pytest.mark.parametrize("whiten", WHITENINGS)
def test_whitening_of_one_cell_or_none_is_exact(whiten):
    x, mask = torch.tensor([7.3, nan]), torch.tensor([True, False])
    kept = 0 if whiten is masked_standardize else x[0].item()
    assert whiten(x, mask).tolist() == [kept, 0]
    assert whiten(x, mask & False).tolist() == [0, 0]


@pytest.mark.parametrize(("whiten", "kept_mean"), [(masked_standardize, 0.0), (masked_rescale, 1)])
def test_whitening_gradient_is_zero_in_masked_cells(whiten, kept_mean):
    # The sum of the standardized cells is 0 whatever x is, and that of the rescaled ones is the sum
    # of x: gradients 0 and 1.
    x = f64([1, nan, 3, inf, 8]).requires_grad_()
    whiten(x, torch.tensor([True, False, True, False, True])).sum().backward()
    assert_close(x.grad, kept_mean * f64([1, 0, 1, 0, 1]))
    assert x.grad[1] == 0 and x.grad[3] == 0


@pytest.mark.parametrize("function", REDUCTIONS + WHITENINGS)
def test_masking_refuses_other_shapes_and_dtypes(function):
    for x, mask, message in (
        ((2, 3), (2,), r"mask is \(2,\), x is \(2, 3\): expand per-sequence mask with"),
        ((2, 3), (2, 1), r"mask is \(2, 1\), x is \(2, 3\): expand .*\.expand\(-1"),
        ((1, 3), (3, 1), r"mask is \(3, 1\), x is \(1, 3\): give mask the shape"),
        ((), (3,), r"mask is \(3,\), x is \(\): give mask the shape"),
    ):
        with pytest.raises(ValueError, match=message):
            function(torch.zeros(x), torch.ones(mask, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"mask is torch.float32: bool is needed.*mask\.bool\(\)"):
        function(torch.zeros(2), torch.ones(2))


@pytest.mark.parametrize("function", REDUCTIONS + WHITENINGS)
def test_masking_leaves_its_inputs_unchanged(function):
    x, mask = f64([1, 5, 9]), torch.tensor([True, False, True])
    function(x, mask)
    assert x.tolist() == [1, 5, 9] and mask.tolist() == [True, False, True]
