"""`minirlhf learn --gradcheck` finds a wrong gradient, and knows every loss."""

import inspect
from functools import partial

import pytest
import torch
from torch import tensor

from minirlhf.cli import main
from minirlhf.equations import critic_free, dpo, kl, policy, preference
from minirlhf.tools.learn import gradcheck
from minirlhf.tools.learn.gradcheck import Loss, compare, losses

f64 = partial(tensor, dtype=torch.float64)


class Cube(torch.autograd.Function):
    """x^3, whose backward forgets the 3."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0] ** 2


def test_a_right_gradient_is_ok_and_its_difference_small():
    result = compare(Loss("cube", lambda x: x**3, (f64([2.0, -1.0]),)))
    assert result.ok and result.numbers == 2 and result.difference < 1e-8


def test_a_wrong_gradient_is_found_with_its_size():
    # at 2: 3 · 4 is right, 4 was said, of weight 1/2: (6 - 2) / 2; at -1 of weight 3/2: 4.5, 1.5
    result = compare(Loss("cube", Cube.apply, (f64([2.0, -1.0]),)))
    assert not result.ok
    assert result.difference == pytest.approx(2.0, abs=1e-6)


def test_a_gradient_that_is_detached_is_found():
    loss = Loss("half", lambda x: x * x.detach(), (f64([2.0]),))
    assert not compare(loss).ok


def test_a_point_on_a_kink_is_refused_and_beside_it_is_not():
    relu = Loss("relu", torch.relu, (f64([0.5, 0.0]),))
    with pytest.raises(ValueError, match="relu: number 1 of input 0 lies on a kink"):
        compare(relu)
    assert compare(relu._replace(inputs=(f64([0.5, 0.01, -0.01]),))).ok


def test_every_loss_of_the_package_is_right(capsys):
    assert main(["learn", "--gradcheck"]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["loss", "numbers", "largest", "difference", "ok"]
    assert len(lines) == len(losses()) and all(line.endswith("  yes") for line in lines)


def test_a_wrong_loss_ends_with_exit_code_1(monkeypatch, capsys):
    wrong = Loss("cube", Cube.apply, (f64([2.0]),))
    monkeypatch.setattr(gradcheck, "losses", lambda: [losses()[0], wrong])
    assert main(["learn", "--gradcheck"]) == 1
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == [
        "ok", "yes", "NO"]


def test_every_function_of_equations_that_is_a_loss_is_compared():
    names = {loss.name.partition(",")[0].partition(" (")[0] for loss in losses()}
    for module in (critic_free, dpo, kl, policy, preference):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            ours = function.__module__ == module.__name__ and name[0] != "_"
            if ours and (name.endswith(("_loss", "_surrogate")) or name.startswith("kl_")):
                assert name in names
    assert {"token_divergence", "token_logprobs"} <= names


@pytest.mark.parametrize("loss", losses(), ids=lambda loss: loss.name)
def test_points_have_gradients_worth_comparing(loss):
    inputs = [x.clone().requires_grad_(True) for x in loss.inputs]
    grads = torch.autograd.grad(loss.function(*inputs).sum(), inputs)
    assert all(grad.abs().max() > 1e-3 for grad in grads)
