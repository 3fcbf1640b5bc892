import pytest
import torch
import torch.nn.functional as F

from minirlhf.linear import A_HANDFUL, BLOCKS, FEW, Linear, linear

f64 = torch.float64


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=f64)


def test_linear_by_hand():
    # Output j is row j of W times x, plus j: rows (1, 0), (0, 1), (1, 1), (2, 0), … of 8
    rows = [[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [2, 2], [3, 0], [0, 3]]
    weight = torch.tensor(rows, dtype=f64)
    x, bias = torch.tensor([[10, 1]], dtype=f64), torch.arange(8, dtype=f64)
    with torch.no_grad():
        got = linear(x, weight, bias)
    assert got.tolist() == [[10, 2, 13, 23, 6, 27, 36, 10]]


@pytest.mark.parametrize("rows", [0, 1, 2, A_HANDFUL, A_HANDFUL + 1, FEW, FEW + 1])
@pytest.mark.parametrize("out", [BLOCKS, 5 * BLOCKS, BLOCKS + 1, 3])
def test_linear_is_the_plain_product_for_any_number_of_rows(rows, out):
    x, weight, bias = numbers(rows, 6), numbers(out, 6), numbers(out)
    with torch.no_grad():
        torch.testing.assert_close(linear(x, weight), F.linear(x, weight), rtol=0, atol=1e-12)
        expected = F.linear(x, weight, bias)
        torch.testing.assert_close(linear(x, weight, bias), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(6,), (1, 6), (2, 3, 6), (2, 1, 6), (0, 4, 6), (2, 30, 6)])
def test_linear_keeps_leading_dimensions(shape):
    x, weight = numbers(*shape), numbers(16, 6)
    with torch.no_grad():
        got = linear(x, weight)
        strided = linear(x.transpose(0, -2) if len(shape) == 3 else x, weight)
    torch.testing.assert_close(got, x @ weight.T, rtol=0, atol=1e-12)
    assert got.shape == (*shape[:-1], 16)
    expected = (x.transpose(0, -2) if len(shape) == 3 else x) @ weight.T
    torch.testing.assert_close(strided, expected, rtol=0, atol=1e-12)


def test_a_layer_learns_as_any_other():
    layer = Linear(6, 16).to(f64)
    x = numbers(3, 6).requires_grad_()
    layer(x).square().sum().backward()
    # d sum y^2 / dx = 2 y W
    expected = 2 * F.linear(x, layer.weight, layer.bias) @ layer.weight
    torch.testing.assert_close(x.grad, expected.detach(), rtol=0, atol=1e-12)
    assert layer.weight.grad is not None and layer.bias.grad is not None
