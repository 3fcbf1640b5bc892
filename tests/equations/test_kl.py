import math
from functools import partial

import pytest
import torch

from minirlhf.equations.kl import AdaptiveKL, kl_k1, kl_k2, kl_k3
from minirlhf.equations.masking import masked_sum

nan, inf = torch.nan, torch.inf
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)
ESTIMATORS = [kl_k1, kl_k2, kl_k3]


def test_estimators_by_hand():
    # d = logprobs - ref_logprobs = log 2, -log 2, 0; exp(-d) = 1/2, 2, 1
    log2 = math.log(2)
    logprobs, ref_logprobs = f64([[-1, -1 - log2, -3]]), f64([[-1 - log2, -1, -3]])
    assert_close(kl_k1(logprobs, ref_logprobs), f64([[log2, -log2, 0]]))
    assert_close(kl_k2(logprobs, ref_logprobs), f64([[log2**2 / 2, log2**2 / 2, 0]]))
    assert_close(kl_k3(logprobs, ref_logprobs), f64([[log2 - 0.5, 1 - log2, 0]]))


@pytest.mark.parametrize(
    ("estimator", "gradient"),
    [
        (kl_k1, [1, 1]),  # d' = 1
        (kl_k2, [math.log(2), -math.log(2)]),  # d
        (kl_k3, [0.5, -1]),  # 1 - exp(-d), with exp(-d) = 1/2 and 2
    ],
)
def test_estimators_gradient_by_hand(estimator, gradient):
    logprobs = f64([-1, -1 - math.log(2)]).requires_grad_()
    estimator(logprobs, f64([-1 - math.log(2), -1])).sum().backward()
    assert_close(logprobs.grad, f64(gradient))


def test_estimators_expectation_over_two_tokens():
    # policy (3/4, 1/4), ref (1/2, 1/2), d = log 3/2 and -log 2.
    # KL = 3/4 log 3/2 + 1/4 log 1/2 = 3/4 log 3 - log 2. That of k3 adds E[ref / policy] - 1 = 0.
    policy, ref = f64([0.75, 0.25]), f64([0.5, 0.5])
    true_kl = f64(0.75 * math.log(3) - math.log(2))
    assert_close((policy * kl_k1(policy.log(), ref.log())).sum(), true_kl)
    assert_close((policy * kl_k3(policy.log(), ref.log())).sum(), true_kl)
    # k2 is biased: 3/8 log² 3/2 + 1/8 log² 2
    biased = 0.375 * math.log(1.5) ** 2 + 0.125 * math.log(2) ** 2
    assert_close((policy * kl_k2(policy.log(), ref.log())).sum(), f64(biased))


def test_kl_k2_as_a_loss_has_the_gradient_of_the_kl():
    # Logits (z, 0), policy p = sigmoid(z) = 3/4, ref 1/2. dKL/dz = p (1 - p) log(p / (1 - p)),
    # = 3/16 log 3, since the ref's logits are equal.
    z = f64(math.log(3)).requires_grad_()
    logprobs = torch.stack([z, z * 0]).log_softmax(0)
    ref_logprobs = f64([0.5, 0.5]).log()
    (logprobs.detach().exp() * kl_k2(logprobs, ref_logprobs)).sum().backward()
    assert_close(z.grad, f64(3 / 16 * math.log(3)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_vanish_where_policy_is_the_reference(estimator):
    logprobs = f64([[-0.1, -30.0, 0.0]])
    assert estimator(logprobs, logprobs.clone()).tolist() == [[0, 0, 0]]


def test_kl_k3_keeps_a_small_difference_in_float32():
    # d = 2^-12: d²/2 = 2^-25 up to d³/6. Written as exp(-d) - 1 + d, float32 gives 0 here.
    d = torch.tensor([2.0**-12])
    assert_close(kl_k3(d, torch.zeros(1)) / 2**-25, torch.ones(1), atol=1e-3)


def test_kl_k3_is_never_negative_and_is_k2_to_second_order():
    d = f64([-3, -1, -1e-3, 1e-3, 1, 3])
    k3 = kl_k3(d, torch.zeros_like(d))
    assert (k3 > 0).all()
    assert_close(k3[2:4], kl_k2(d, torch.zeros_like(d))[2:4], atol=1e-9)


@pytest.mark.parametrize("garbage", [nan, inf, -inf, 200.0, -200.0])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_garbage_under_a_mask_changes_nothing(estimator, garbage):
    # -200 in float32 overflows exp(-d)
    mask = torch.tensor([[True, False]])
    gradients = []
    for padding in (0.0, garbage):
        logprobs = torch.tensor([[-1.0, padding]], requires_grad=True)
        total = masked_sum(estimator(logprobs, torch.tensor([[-2.0, 0.0]])), mask)
        total.backward()
        gradients.append((total.item(), *logprobs.grad.flatten().tolist()))
    assert gradients[0] == gradients[1] and gradients[0][2] == 0


def test_kl_k3_shows_an_overflow():
    assert kl_k3(torch.tensor([-200.0]), torch.zeros(1)).item() == inf


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_estimators_upcast_refuse_other_shapes_and_change_no_argument(estimator):
    logprobs, ref_logprobs = torch.tensor([[-1, -2], [-3, -1]], dtype=torch.bfloat16)
    assert estimator(logprobs, ref_logprobs).dtype == torch.float32
    assert logprobs.tolist() == [-1, -2] and ref_logprobs.tolist() == [-3, -1]
    with pytest.raises(ValueError, match=r"ref_logprobs is \(4,\), logprobs is \(4, 7\): expand"):
        estimator(torch.zeros(4, 7), torch.zeros(4))


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (6.0, 0.5),  # on target: unchanged
        (6.6, 0.5 * 1.01),  # 10% above: 1 + 0.1 · 10 / 100
        (5.4, 0.5 * 0.99),
        (60.0, 0.5 * 1.02),  # far above: the error is clipped at 0.2
        (0.0, 0.5 * 0.98),
        (-3.0, 0.5 * 0.98),
    ],
)
def test_adaptive_kl_by_hand(measured, expected):
    controller = AdaptiveKL(coef=0.5, target=6.0, horizon=100)
    controller.update(kl=measured, n=10)
    assert controller.coef == pytest.approx(expected, abs=1e-12)
    controller.update(kl=measured, n=10)  # updates compound
    assert controller.coef == pytest.approx(expected**2 / 0.5, abs=1e-12)
    assert isinstance(controller.coef, float)


def test_adaptive_kl_is_monotone_and_bounded():
    coefs = []
    for tenth in range(-50, 200):
        controller = AdaptiveKL(coef=1.0, target=6.0, horizon=1000)
        controller.update(kl=tenth / 10, n=64)
        coefs.append(controller.coef)
    assert coefs == sorted(coefs)
    assert min(coefs) == 1 - 0.2 * 64 / 1000 and max(coefs) == 1 + 0.2 * 64 / 1000


@pytest.mark.parametrize("name", ["coef", "target", "horizon"])
@pytest.mark.parametrize("value", [0, -1.0, nan, inf])
def test_adaptive_kl_refuses_its_arguments(name, value):
    arguments = {"coef": 0.1, "target": 6.0, "horizon": 100} | {name: value}
    with pytest.raises(ValueError, match=rf"{name} is {value}: a finite number above 0 is needed"):
        AdaptiveKL(**arguments)


@pytest.mark.parametrize(
    ("kl", "n", "message"),
    [
        *[(kl, 8, f"kl is {kl}: a finite number is needed") for kl in (nan, inf, -inf)],
        *[(0.0, n, f"n is {n}, horizon is 100: n must be at least 1 and") for n in (0, -8, 500)],
    ],
)
def test_adaptive_kl_refuses_what_could_end_at_zero_or_not_finite(kl, n, message):
    controller = AdaptiveKL(coef=0.1, target=6.0, horizon=100)
    with pytest.raises(ValueError, match=message):
        controller.update(kl, n)
    assert controller.coef == 0.1
    controller.update(kl=0.0, n=499)
    assert controller.coef > 0
