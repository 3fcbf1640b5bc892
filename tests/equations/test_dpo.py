"""The DPO family by hand, with its gradients, its estimands and what it refuses."""

import math
from functools import partial

import pytest
import torch
from torch import ones, zeros

from minirlhf.equations.dpo import (
    dpo_loss,
    hinge_dpo_loss,
    ipo_loss,
    kto_loss,
    orpo_loss,
    robust_dpo_loss,
    simpo_loss,
)
from minirlhf.equations.preference import bradley_terry_loss

nan, inf, log2, log3 = torch.nan, torch.inf, math.log(2), math.log(3)
f64 = partial(torch.tensor, dtype=torch.float64)
assert_close = partial(torch.testing.assert_close, rtol=0, atol=1e-6)

RIGHT, WRONG = math.log(4 / 3), math.log(4)  # at margin log 3, sigmoid 3/4: -log 3/4, -log 1/4
ZERO = f64([0])


# ---- DPO -----------------------------------------------------------------------------------------


def test_dpo_loss_by_hand():
    # log-ratios: chosen -8 + 10 = 2, rejected -9 + 12 = 3; rewards at beta 1/2: 1, 1.5
    # margin -1/2, loss log(1 + e^(1/2)) = 0.974077; the second pair: -1/2 + 1/2 = 0, log 2
    out = dpo_loss(f64([-8, -4]), f64([-9, -4]), f64([-10, -3]), f64([-12, -3]), beta=0.5)
    assert_close(out.chosen_rewards, f64([1, -0.5]))
    assert_close(out.rejected_rewards, f64([1.5, -0.5]))
    assert_close(out.loss, f64([math.log(1 + math.exp(0.5)), log2]))
    # margin log 3, smoothed by 1/4
    smoothed = dpo_loss(f64([log3]), f64([0]), f64([0]), f64([0]), 1.0, label_smoothing=0.25)
    assert_close(smoothed.loss, f64([0.75 * RIGHT + 0.25 * WRONG]))


@pytest.mark.parametrize(
    ("log_ratio", "beta", "smoothing", "expected"),
    [
        (2 * log3, 0.5, 0.0, -0.125),  # -beta σ(-margin) at margin log 3
        (log3, 1.0, 0.25, 0.0),  # -(1 - s) σ(-m) + s σ(m) = 0 where σ(m) = 1 - s
    ],
)
def test_dpo_loss_gradient_by_hand(log_ratio, beta, smoothing, expected):
    chosen, rejected = f64([log_ratio]).requires_grad_(), f64([0]).requires_grad_()
    ref = [f64([0]).requires_grad_() for _ in range(2)]
    out = dpo_loss(chosen, rejected, *ref, beta, smoothing)
    out.loss.sum().backward()
    assert_close(chosen.grad, f64([expected]))
    assert_close(rejected.grad, f64([-expected]))
    assert [x.grad for x in ref] == [None, None]
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad


def test_dpo_loss_reduces_to_bradley_terry_on_its_rewards():
    out = dpo_loss(f64([-1, -2]), f64([-3, -1]), f64([-2, -2]), f64([-1, -5]), beta=0.3)
    assert_close(out.loss, bradley_terry_loss(out.chosen_rewards, out.rejected_rewards))


def test_dpo_loss_is_smallest_where_policy_is_ref_times_exp_reward():
    # Two responses, ref (1/2, 1/2), first preferred with probability 3/4, so reward difference
    # log 3. With beta 1 the optimum is policy ∝ ref · e^reward = (3/4, 1/4): no gradient there.
    logits = f64([log3, 0]).requires_grad_()
    policy, ref = logits.log_softmax(0), f64([0.5, 0.5]).log()
    first, second = policy[:1], policy[1:]
    wins = dpo_loss(first, second, ref[:1], ref[1:], beta=1.0).loss
    upsets = dpo_loss(second, first, ref[1:], ref[:1], beta=1.0).loss
    (0.75 * wins + 0.25 * upsets).sum().backward()
    assert_close(logits.grad, f64([0, 0]))


def test_dpo_loss_of_huge_margins_is_finite():
    chosen = torch.tensor([-6e4, 0.0], dtype=torch.float16, requires_grad=True)
    zero, rejected = zeros(2).half(), torch.tensor([0.0, -6e4], dtype=torch.float16)
    out = dpo_loss(chosen, rejected, zero, zero, beta=2.0)
    out.loss.sum().backward()
    assert out.loss.dtype == torch.float32 and out.loss[1] == 0
    assert_close(out.loss[0], torch.tensor(-2.0 * float(chosen.detach()[0])))
    assert chosen.grad.tolist() == [-2, 0]


@pytest.mark.parametrize(
    ("shapes", "beta", "smoothing", "message"),
    [
        ([4, 4, 4, (4, 1)], 0.1, 0.0, r"ref_rejected is \(4, 1\), policy_chosen is \(4,\)"),
        ([(4, 7)] * 4, 0.1, 0.0, r"policy_chosen is \(4, 7\): one number a row is needed"),
        *[([1] * 4, beta, 0.0, f"beta is {beta}: a finite number above 0 is needed")
          for beta in (0, -0.1, nan, inf)],
        *[([1] * 4, 0.1, s, f"label_smoothing is {s}: at least 0 and below 0")
          for s in (-0.01, 0.5, nan)],
    ],
)
def test_dpo_loss_refuses(shapes, beta, smoothing, message):
    with pytest.raises(ValueError, match=message):
        dpo_loss(*map(zeros, shapes), beta, smoothing)


# ---- robust --------------------------------------------------------------------------------------


def test_robust_dpo_loss_by_hand():
    # log-ratios 2 and 3 at beta 1/2: rewards 1 and 1.5; without noise it is DPO's loss
    sides = f64([-8]), f64([-9]), f64([-10]), f64([-12])
    out = robust_dpo_loss(*sides, beta=0.5, label_smoothing=0.0)
    assert_close(out.loss, f64([math.log(1 + math.exp(0.5))]))
    assert_close(torch.cat(out[1:]), f64([1, 1.5]))
    # margin log 3, e = 1/4: (3/4 log 4/3 - 1/4 log 4) / (1/2)
    out = robust_dpo_loss(f64([log3]), ZERO, ZERO, ZERO, 1.0, 0.25)
    assert_close(out.loss, f64([1.5 * RIGHT - 0.5 * WRONG]))


def test_robust_dpo_loss_gradient_by_hand():
    # d loss / d m = (-(1 - e) σ(-m) - e σ(m)) / (1 - 2 e) = (-3/16 - 3/16) / (1/2) at m = log 3
    chosen, rejected = f64([2 * log3]).requires_grad_(), f64([0]).requires_grad_()
    robust_dpo_loss(chosen, rejected, ZERO, ZERO, 0.5, 0.25).loss.sum().backward()
    assert_close(chosen.grad, f64([-0.75 * 0.5]))
    assert_close(rejected.grad, f64([0.75 * 0.5]))


def test_robust_dpo_loss_of_flipped_labels_is_on_average_that_of_the_true_ones():
    sides = f64([-1]), f64([-3]), f64([-2]), f64([-2.5])
    swapped = sides[1], sides[0], sides[3], sides[2]
    kept, flipped = (robust_dpo_loss(*s, 0.7, 0.2).loss for s in (sides, swapped))
    assert_close(0.8 * kept + 0.2 * flipped, dpo_loss(*sides, 0.7).loss)


# ---- IPO -----------------------------------------------------------------------------------------


def test_ipo_loss_by_hand():
    # log-ratios -0.5 + 1 = 0.5 and -2 + 1.5 = -0.5: h = 1; 1 / (2 beta) = 5, 1, 1/2
    sides = f64([-0.5]), f64([-2]), f64([-1]), f64([-1.5])
    for beta, loss in ((0.1, 16.0), (0.5, 0.0), (1.0, 0.25)):
        assert_close(ipo_loss(*sides, beta).loss, f64([loss]))
    out = ipo_loss(*sides, 0.1)
    assert_close(torch.cat(out[1:]), f64([0.05, -0.05]))


@pytest.mark.parametrize(("h", "gradient"), [(0, -4.0), (2, 0.0), (3, 2.0)])
def test_ipo_loss_gradient_is_zero_where_the_margin_is_reached(h, gradient):
    chosen, rejected = f64([h]).requires_grad_(), f64([0]).requires_grad_()
    ipo_loss(chosen, rejected, ZERO, ZERO, beta=0.25).loss.sum().backward()
    assert_close(chosen.grad, f64([gradient]))  # 2 (h - 2)
    assert_close(rejected.grad, f64([-gradient]))


# ---- hinge ---------------------------------------------------------------------------------------


def test_hinge_dpo_loss_by_hand_on_both_sides_of_the_hinge():
    # margins 1/2 · (1, 3, -2) = 1/2, 3/2, -1
    chosen, rejected = f64([1, 3, -2]).requires_grad_(), zeros(3, dtype=torch.float64)
    out = hinge_dpo_loss(chosen, rejected, zeros(3), zeros(3), beta=0.5)
    assert_close(out.loss, f64([0.5, 0.0, 2.0]))
    out.loss.sum().backward()
    assert_close(chosen.grad, f64([-0.5, 0.0, -0.5]))
    assert_close(out.chosen_rewards, f64([0.5, 1.5, -1]))
    # against a reference that says the same nothing is won: 1
    assert_close(hinge_dpo_loss(f64([2]), f64([1]), f64([2]), f64([1]), 0.5).loss, f64([1]))


# ---- SimPO ---------------------------------------------------------------------------------------


def test_simpo_loss_by_hand():
    # 2 (-1 + 1.5) = 1: log 2 at gamma 1; at gamma 1 - log 3 sigmoid is 3/4
    chosen, rejected = f64([-1]), f64([-1.5])
    assert_close(simpo_loss(chosen, rejected, 2.0, 1.0).loss, f64([log2]))
    assert_close(simpo_loss(chosen + log3 / 2, rejected, 2.0, 1.0).loss, f64([RIGHT]))
    out = simpo_loss(chosen, rejected, 2.0, 1.0)
    assert_close(torch.cat(out[1:]), f64([-2, -3]))
    plain = simpo_loss(chosen, rejected, 2.0, 0.0).loss
    assert_close(plain, bradley_terry_loss(f64([-2]), f64([-3])))


def test_simpo_loss_gradient_by_hand():
    chosen, rejected = f64([-1]).requires_grad_(), f64([-1.5]).requires_grad_()
    simpo_loss(chosen, rejected, 2.0, 1.0).loss.sum().backward()
    assert_close(chosen.grad, f64([-1]))  # -beta σ(0)
    assert_close(rejected.grad, f64([1]))


# ---- ORPO ----------------------------------------------------------------------------------------


def test_orpo_loss_by_hand():
    # probabilities 3/4 and 1/2: odds 3 and 1, their ratio's sigmoid 3/4; then 1/2 and 3/4
    p = f64([0.75, 0.5]).log(), f64([0.5, 0.75]).log()
    out = orpo_loss(*p)
    assert_close(out.loss, f64([RIGHT, WRONG]))
    assert_close(out.chosen_rewards, f64([log3, 0]))
    assert_close(out.rejected_rewards, f64([0, log3]))
    assert_close(orpo_loss(p[0], p[0]).loss, f64([log2, log2]))


def test_orpo_loss_gradient_by_hand():
    # -σ(-z) / (1 - p): -1/4 / (1/4) for chosen, +1/4 / (1/2) for rejected
    chosen, rejected = f64([0.75]).log().requires_grad_(), f64([0.5]).log().requires_grad_()
    orpo_loss(chosen, rejected).loss.sum().backward()
    assert_close(chosen.grad, f64([-1]))
    assert_close(rejected.grad, f64([0.5]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_orpo_loss_near_certainty_and_at_it_is_finite(dtype):
    # at -1e-7 the odds are 1e7: log 1 / (1 - e^-1e-7) = 16.118; 1 - e^l would round to 0 or 2^-23
    near = torch.tensor([-1e-7], dtype=dtype)
    odds = orpo_loss(near, near).chosen_rewards
    assert_close(odds, -math.log(-float(near)) * torch.ones_like(odds), atol=1e-4)
    chosen = torch.tensor([0.0, -1.0, 0.0, -1e-30, -1e4], dtype=dtype).requires_grad_()
    rejected = torch.tensor([-1.0, 0.0, 0.0, -1.0, -1e-4], dtype=dtype).requires_grad_()
    out = orpo_loss(chosen, rejected)
    out.loss.sum().backward()
    for x in (*out, chosen.grad, rejected.grad):
        assert torch.isfinite(x).all()


# ---- KTO -----------------------------------------------------------------------------------------


YES_NO = torch.tensor([True, False])


def test_kto_loss_by_hand():
    # rewards 1/2 · (2 log 3, 2 log 3) = log 3; z = 0: 1 - σ(log 3) = 1/4, 1 - σ(-log 3) = 3/4
    policy, ref = f64([2 * log3 - 5] * 2), f64([-5, -5])
    out = kto_loss(policy, ref, YES_NO, 0.0, beta=0.5)
    assert_close(out.loss, f64([0.25, 0.75]))
    assert_close(out.rewards, f64([log3, log3]))
    # z = 1/2 · 2 log 3: the rewards are what any answer has gained
    assert_close(kto_loss(policy, ref, YES_NO, 2 * log3, 0.5).loss, f64([0.5, 0.5]))
    weighted = kto_loss(policy, ref, YES_NO, 0.0, 0.5, desirable_weight=4.0, undesirable_weight=2.0)
    assert_close(weighted.loss, f64([1.0, 1.5]))


@pytest.mark.parametrize(
    ("kl", "counts"),
    [
        (-3.0, 0.0),  # below 0 it is noise
        (f64(1.5), 1.5),
        (f64([1, 4, -2]), 1.0),  # the mean of the step's mismatched pairs
        (f64([1, -4]), 0.0),  # the mean is clamped, not each
        (torch.tensor([2, 1]), 1.5),
    ],
)
def test_kto_loss_takes_the_mean_kl_and_none_below_zero(kl, counts):
    out = kto_loss(f64([0.5]), f64([0]), ones(1).bool(), kl, beta=1.0)
    assert_close(out.kl, f64(counts))
    assert_close(out.loss, f64([1 - 1 / (1 + math.exp(counts - 0.5))]))


def test_kto_loss_gradient_by_hand_and_none_of_the_kl_or_the_reference():
    # at z = 0 and rewards log 3: -beta σ(r) σ(-r) = -1/2 · 3/16 for a liked one, + for the other
    policy, ref = f64([2 * log3] * 2).requires_grad_(), f64([0, 0]).requires_grad_()
    kl = f64([-1, 1]).requires_grad_()
    out = kto_loss(policy, ref, YES_NO, kl, 0.5)
    out.loss.sum().backward()
    assert_close(policy.grad, f64([-3 / 32, 3 / 32]))
    assert ref.grad is None and kl.grad is None
    assert not out.rewards.requires_grad and not out.kl.requires_grad


def test_kto_loss_of_a_liked_and_a_disliked_answer_mirror_each_other():
    # 1 - σ(r - z) of one is σ(r - z) of the other
    policy, ref = f64([1.0, 1.0]), f64([0.3, 0.3])
    assert_close(kto_loss(policy, ref, YES_NO, 0.4, 0.7).loss.sum(), f64(1))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ref": zeros(3)}, r"ref is \(3,\), policy is \(2,\)"),
        ({"desirable": ones(2)}, "desirable is torch.float32: bool is needed"),
        ({"desirable": ones(2, 1).bool()}, r"desirable is \(2, 1\), policy is \(2,\)"),
        ({"kl": zeros(2, 1)}, r"kl is \(2, 1\): one number, or \(M,\) of at least one"),
        ({"kl": zeros(0)}, r"kl is \(0,\): one number"),
        ({"beta": 0}, "beta is 0: a finite number above 0"),
        ({"desirable_weight": -1}, "desirable_weight is -1: a finite number of at least 0"),
        ({"undesirable_weight": nan}, "undesirable_weight is nan: a finite number of at least 0"),
    ],
)
def test_kto_loss_refuses(changes, message):
    given = {"policy": zeros(2), "ref": zeros(2), "desirable": YES_NO, "kl": 0.0, "beta": 0.1}
    with pytest.raises(ValueError, match=message):
        kto_loss(**given | changes)


# ---- all of them ---------------------------------------------------------------------------------

WITH_REF = [
    (dpo_loss, (0.1, 0.2)), (robust_dpo_loss, (0.1, 0.2)), (ipo_loss, (0.1,)),
    (hinge_dpo_loss, (0.1,)),
]
WITHOUT = [(simpo_loss, (2.0, 0.5)), (orpo_loss, ())]


@pytest.mark.parametrize(("function", "numbers"), WITH_REF)
def test_a_loss_knows_only_differences_to_its_reference_and_treats_that_as_constant(
    function, numbers
):
    policy = [f64([-1, -2]), f64([-3, -1])]
    ref = [f64([-2, -2]).requires_grad_(), f64([-1, -5]).requires_grad_()]
    chosen = policy[0].clone().requires_grad_()
    out = function(chosen, policy[1], *ref, *numbers)
    out.loss.sum().backward()
    assert [x.grad for x in ref] == [None, None] and chosen.grad is not None
    assert not out.chosen_rewards.requires_grad and not out.rejected_rewards.requires_grad
    moved = function(policy[0] + 7, policy[1] + 2, ref[0] + 7, ref[1] + 2, *numbers)
    assert_close(moved.loss, out.loss.detach())


@pytest.mark.parametrize(("function", "numbers"), [*WITH_REF, *WITHOUT])
def test_losses_leave_their_inputs_unchanged_and_widen_half_precision(function, numbers):
    count = 4 if (function, numbers) in WITH_REF else 2
    inputs = [torch.tensor([-1.0, -2.0, -0.5]).half() * (i + 1) for i in range(count)]
    before = [x.clone() for x in inputs]
    out = function(*inputs, *numbers)
    assert all(torch.equal(x, y) for x, y in zip(inputs, before, strict=True))
    assert all(x.shape == (3,) and x.dtype == torch.float32 for x in out)


@pytest.mark.parametrize(("function", "numbers"), WITH_REF)
def test_losses_with_a_reference_refuse_shapes_and_beta(function, numbers):
    with pytest.raises(ValueError, match=r"ref_rejected is \(4, 1\), policy_chosen is \(4,\)"):
        function(*map(zeros, [4, 4, 4, (4, 1)]), *numbers)
    with pytest.raises(ValueError, match=r"policy_chosen is \(4, 7\): one number a row"):
        function(*[zeros(4, 7)] * 4, *numbers)
    for beta in (0, -0.1, nan, inf):
        with pytest.raises(ValueError, match=f"beta is {beta}: a finite number above 0"):
            function(*[zeros(1)] * 4, beta, *numbers[1:])
    for smoothing in (-0.01, 0.5, nan) if len(numbers) > 1 else ():
        with pytest.raises(ValueError, match=f"label_smoothing is {smoothing}: at least 0 and"):
            function(*[zeros(1)] * 4, 0.1, smoothing)


@pytest.mark.parametrize(("function", "numbers"), WITHOUT)
def test_losses_without_a_reference_refuse_shapes(function, numbers):
    with pytest.raises(ValueError, match=r"rejected_mean is \(4, 1\), chosen_mean is \(4,\)"):
        function(zeros(4), zeros(4, 1), *numbers)
    with pytest.raises(ValueError, match=r"chosen_mean is \(4, 7\): one number a row"):
        function(zeros(4, 7), zeros(4, 7), *numbers)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: simpo_loss(zeros(1), zeros(1), 0.0, 0.5), "beta is 0.0: a finite number above 0"),
        (lambda: simpo_loss(zeros(1), zeros(1), 2.0, -0.5), "gamma is -0.5: a finite number of at"),
        (lambda: simpo_loss(zeros(1), zeros(1), 2.0, inf), "gamma is inf: a finite number of at"),
        (lambda: orpo_loss(ones(1), zeros(1)), "chosen_mean is up to 1.0: log-probs are at most 0"),
        (lambda: orpo_loss(zeros(1), ones(1)), "rejected_mean is up to 1.0: log-probs are at most"),
    ],
)
def test_losses_without_a_reference_refuse_numbers_out_of_range(call, message):
    with pytest.raises(ValueError, match=message):
        call()
