import pytest
import torch
import torch.nn.functional as F

from minirlhf.models.linear import BLOCKS, MOST_COLUMNS, MOST_ROWS, Linear, linear

f64 = torch.float64


def numbers(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=f64)


def assert_close(got, expected):
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("tokens", [1, MOST_COLUMNS + 1])
def test_linear_by_hand(tokens):
    # Output j is row j of W times x, plus j: 1 · 10 + 0 · 1 + 0, 0 · 10 + 1 · 1 + 1, …
    rows = [[1, 0], [0, 1], [1, 1], [2, 0], [0, 2], [2, 2], [3, 0], [0, 3]]
    weight, bias = torch.tensor(rows, dtype=f64), torch.arange(8, dtype=f64)
    x = torch.tensor([10, 1], dtype=f64).expand(tokens, 1, 2)
    with torch.no_grad():
        got = linear(x, weight, bias)
    assert got.tolist() == [[[10, 2, 13, 23, 6, 27, 36, 10]]] * tokens


TOKENS = [0, 1, 2, MOST_COLUMNS, MOST_COLUMNS + 1, MOST_ROWS, MOST_ROWS + 1]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("out", [BLOCKS, 5 * BLOCKS, BLOCKS + 1, 3])
def test_linear_is_the_plain_product_for_any_number_of_tokens(tokens, out):
    x, weight, bias = numbers(tokens, 1, 6), numbers(out, 6), numbers(out)
    with torch.no_grad():
        assert_close(linear(x, weight), F.linear(x, weight))
        assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        strided = numbers(1, tokens, 6).transpose(0, 1)
        assert_close(linear(strided, weight), F.linear(strided, weight))


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (5, 1, 6)])
def test_whole_rows_are_computed_alike_with_and_without_a_gradient(shape):
    layer, x = Linear(6, 16).to(f64), numbers(*shape).requires_grad_()
    trained = layer(x)
    with torch.no_grad():
        measured = layer(x)
    if shape == (5, 1, 6):
        assert_close(measured, trained)
    else:
        assert torch.equal(measured, trained)
    trained.square().sum().backward()
    # d sum y^2 / dx = 2 y W
    assert_close(x.grad, (2 * trained @ layer.weight).detach())
    assert layer.weight.grad is not None and layer.bias.grad is not None
