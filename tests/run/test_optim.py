"""Learning rates by hand, clipping, and what is refused."""

import math

import pytest
import torch

from minirlhf.errors import NON_FINITE, UserError
from minirlhf.run.optim import (
    check_finite,
    check_weights,
    clip_gradients,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    total_norm,
)

# ---- learning rate -------------------------------------------------------------------------------


def rates(steps: int, warmup: int, schedule: str) -> list[float]:
    return [learning_rate(step, steps, 12.0, warmup, schedule) for step in range(steps + 1)]


def test_learning_rate_constant_by_hand():
    assert rates(4, 0, "constant") == [12.0] * 5


def test_learning_rate_linear_by_hand():
    # 12 (1 - step / 4): the last step that is taken still has 12 / 4, the one after it has 0
    assert rates(4, 0, "linear") == [12.0, 9.0, 6.0, 3.0, 0.0]


def test_learning_rate_cosine_by_hand():
    # 12 (1 + cos(pi step / 4)) / 2 = 6 + 6 cos: cos is 1, 1/sqrt 2, 0, -1/sqrt 2, -1
    r = 6 / math.sqrt(2)
    expected = [12.0, 6 + r, 6.0, 6 - r, 0.0]
    assert rates(4, 0, "cosine") == pytest.approx(expected, rel=0, abs=1e-12)
    assert rates(4, 0, "cosine")[-1] == 0.0


@pytest.mark.parametrize(
    ("schedule", "after"),
    [("constant", [12, 12, 12]), ("linear", [12, 6, 0]), ("cosine", [12, 6, 0])],
)
def test_learning_rate_rises_over_the_warmup_then_decays(schedule, after):
    # 3 steps of warm-up: 1/4, 2/4, 3/4 of the peak; the peak itself at step 3; then 2 steps to go
    assert rates(5, 3, schedule) == pytest.approx([3, 6, 9, *after], rel=0, abs=1e-12)


def test_learning_rate_refuses_steps_beyond_its_horizon():
    for step in (-1, 5):
        with pytest.raises(ValueError, match=f"step {step} lies outside the schedule's 0 to 4"):
            learning_rate(step, 4, 1.0, 0, "linear")


def test_learning_rate_refuses_an_unknown_schedule():
    with pytest.raises(ValueError, match="'step': use constant, linear, cosine"):
        learning_rate(0, 4, 1.0, 9, "step")


# ---- optimizer -----------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["score", "v_head"])
@pytest.mark.parametrize("rows", [1, 3])
def test_make_optimizer_decays_matrices_only_and_leaves_out_what_is_frozen(head, rows):
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1, bias=False))
    model.register_module(head, torch.nn.Linear(3, rows))
    scalars = getattr(model, head)
    scalars.bias.requires_grad_(False)
    optimizer = make_optimizer(model, 0.5, weight_decay=0.1, eps=1e-5)
    groups = [([id(p) for p in g["params"]], g["weight_decay"]) for g in optimizer.param_groups]
    assert groups == [
        ([id(model[0].weight), id(model[1].weight)], 0.1),  # a matrix of one row is one, too
        ([id(model[0].bias), id(scalars.weight)], 0.0),  # heads, one or several, are left out
    ]
    assert optimizer.defaults["betas"] == (0.9, 0.999) and optimizer.defaults["eps"] == 1e-5


def test_make_optimizer_gives_a_critic_its_own_rate():
    model = torch.nn.Sequential(
        torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 2, bias=False)
    )
    model.v_head = torch.nn.Linear(2, 1)
    critic = [*model[1].parameters(), *model.v_head.parameters()]
    optimizer = make_optimizer(model, 0.5, weight_decay=0.1, critic=critic, critic_lr_scale=10.0)
    set_learning_rate(optimizer, 0.25)
    groups = [
        ([id(p) for p in g["params"]], g["lr"], g["weight_decay"]) for g in optimizer.param_groups
    ]
    head = [id(model.v_head.weight), id(model.v_head.bias)]
    assert groups == [
        ([id(model[0].weight)], 0.25, 0.1), ([id(model[1].weight)], 2.5, 0.1), (head, 2.5, 0.0)
    ]


def one_weight() -> torch.nn.Linear:
    layer = torch.nn.Linear(1, 1, bias=False).bfloat16()
    torch.nn.init.ones_(layer.weight)
    return layer


def test_half_precision_keeps_updates_that_its_weights_cannot_hold():
    # Under a constant gradient Adam moves by the learning rate a step: 0.999, 0.998, 0.997. Below 1
    # bfloat16 has steps of 1/256 = 0.0039, so the weight stays 1 until the master has passed
    # 1 - 1/512 = 0.99805; a weight without master would stay there for ever.
    layer = one_weight()
    optimizer = make_optimizer(layer, 0.001, eps=0.0)
    seen = []
    for _ in range(3):
        layer(torch.ones(1, 1).bfloat16()).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(layer.weight.item())
    assert seen == [1.0, 1 - 1 / 256, 1 - 1 / 256]
    master = optimizer.state[layer.weight]["master"]
    assert master.dtype == torch.float32 and float(master) == pytest.approx(0.997, rel=0, abs=1e-6)


def test_half_precision_adds_up_gradients_in_float32():
    # dw = x: 1 and 1/512, whose sum has no bfloat16 (1, or 1 + 1/128)
    layer = one_weight()
    make_optimizer(layer, 0.001)
    for x in (1.0, 1 / 512):
        layer(torch.tensor([[x]]).bfloat16()).sum().backward()
    assert layer.weight.grad.dtype == torch.float32 and float(layer.weight.grad) == 1 + 1 / 512


def test_half_precision_decays_and_takes_the_rates_of_its_groups():
    # w (1 - lr decay) - lr = 1 (1 - 0.5 x 0.25) - 0.5 = 0.375; the bias, 1 too, does not decay: 0.5
    layer = torch.nn.Linear(2, 2).bfloat16()
    torch.nn.init.ones_(layer.weight), torch.nn.init.ones_(layer.bias)
    optimizer = make_optimizer(layer, 0.5, weight_decay=0.25, eps=0.0)
    layer(torch.ones(1, 2).bfloat16()).sum().backward()
    optimizer.step()
    assert layer.weight.tolist() == [[0.375] * 2] * 2 and layer.bias.tolist() == [0.5, 0.5]
    layer.weight.grad.zero_()
    set_learning_rate(optimizer, 0.0)
    optimizer.step()
    assert layer.weight.tolist() == [[0.375] * 2] * 2


def test_half_precision_leaves_alone_what_has_no_gradient():
    model = torch.nn.Sequential(one_weight(), one_weight())
    optimizer = make_optimizer(model, 0.5)
    model[0](torch.ones(1, 1).bfloat16()).sum().backward()
    optimizer.step()
    assert model[0].weight.item() == 0.5 and model[1].weight.item() == 1.0
    assert list(optimizer.state) == [model[0].weight]


def test_half_precision_leaves_alone_a_group_that_has_no_gradient():
    model = torch.nn.Linear(1, 1).bfloat16()
    optimizer = make_optimizer(model, 0.5)  # weight and bias are a group each
    before = model.bias.item()
    (model.weight * 2).sum().backward()
    optimizer.step()
    assert model.bias.item() == before and list(optimizer.state) == [model.weight]


def test_make_optimizer_without_vectors_has_one_group():
    assert len(make_optimizer(torch.nn.Linear(2, 3, bias=False), 0.5).param_groups) == 1


def test_set_learning_rate_scales_groups_that_ask_for_it():
    first, second = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1))
    groups = [{"params": [first]}, {"params": [second], "lr_scale": 10.0}]
    optimizer = torch.optim.SGD(groups, lr=1.0)
    set_learning_rate(optimizer, 0.5)
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 2.5]


# ---- gradients -----------------------------------------------------------------------------------


def with_gradients(*gradients: list[float]) -> torch.nn.Module:
    model = torch.nn.Module()
    for i, gradient in enumerate(gradients):
        parameter = torch.nn.Parameter(torch.ones(len(gradient)))
        parameter.grad = torch.tensor(gradient)
        setattr(model, f"p{i}", parameter)
    model.unused = torch.nn.Parameter(torch.ones(1))
    return model


def test_clip_gradients_by_hand():
    model = with_gradients([3.0, 0.0], [0.0, 4.0])  # norm sqrt(9 + 16) = 5, over both parameters
    assert clip_gradients(model, 1.0, "step 1") == 5.0
    torch.testing.assert_close(model.p0.grad, torch.tensor([0.6, 0.0]), rtol=0, atol=1e-6)
    torch.testing.assert_close(model.p1.grad, torch.tensor([0.0, 0.8]), rtol=0, atol=1e-6)
    assert model.unused.grad is None


@pytest.mark.parametrize("max_norm", [10.0, 5.0, None])
def test_clip_gradients_leaves_what_is_below_the_limit(max_norm):
    model = with_gradients([3.0, 4.0])
    assert clip_gradients(model, max_norm, "step 1") == 5.0
    assert model.p0.grad.tolist() == [3.0, 4.0]


def test_total_norm_of_many_numbers_is_exact():
    # 4 million times 0.1 in float32, c = 0.100000001490116, and 3: sqrt(4e6 c^2 + 9) = 200.0225
    many = torch.full((4_000_000,), 0.1)
    exact = math.sqrt(4e6 * 0.100000001490116**2 + 9)
    got = float(total_norm([many.view(2000, 2000), torch.tensor([3.0])]))
    assert got == pytest.approx(exact, rel=3e-5)  # summed at once it is off by more than 1e-3
    assert float(total_norm([])) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_clip_gradients_refuses_what_is_not_finite(bad):
    model = with_gradients([1.0, bad], [2.0])
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(UserError, match=r"^step 7: grad_norm: is (nan|inf): nothing") as error:
        clip_gradients(model, 1.0, "step 7")
    assert error.value.code == NON_FINITE == 3
    assert all(map(torch.equal, before, model.parameters()))
    assert model.p1.grad.tolist() == [2.0]


def test_check_finite_names_the_first_metric_that_is_not():
    check_finite("step 1", {"loss": 1.0, "margin": -2.0})
    with pytest.raises(UserError, match=r"^step 1: margin: is inf") as error:
        check_finite("step 1", {"loss": 1.0, "margin": math.inf, "kl": math.nan})
    assert error.value.code == 3


# ---- after the step ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "gradient", "named"),
    [
        # 1 - 1e39 x 1: the rate alone has no float32
        ({"learning_rate": 1e39}, 1.0, "weights is -inf"),
        # (1 - 0.999) x (1e25)^2 = 1e47, and the weight is never updated again: m / inf is 0
        ({"learning_rate": 0.1}, 1e25, "squared gradients is inf"),
        # 0 / (sqrt 0 + 0): an epsilon of 1e-46 is 0 in float32
        ({"learning_rate": 0.1, "eps": 1e-46}, 0.0, "weights is nan"),
    ],
)
def test_a_step_that_leaves_what_is_not_finite_stops_the_run(settings, gradient, named):
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    optimizer = make_optimizer(model, **settings)
    check_weights(optimizer, "step 1")  # before any
    model.weight.grad = torch.full((1, 1), gradient)
    assert clip_gradients(model, None, "step 1") == pytest.approx(gradient)
    optimizer.step()
    with pytest.raises(UserError, match=f"step 1: the sum of all {named} after") as error:
        check_weights(optimizer, "step 1")
    assert error.value.code == NON_FINITE
    assert type(error.value) is UserError  # a NonFinite would be skipped, with the weights spoiled


def test_a_step_with_finite_weights_goes_on():
    model = torch.nn.Linear(2, 1)
    optimizer = make_optimizer(model, 0.1)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    check_weights(optimizer, "step 1")
