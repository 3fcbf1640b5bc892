"""Losses of PPO, one function per equation, unreduced.

The caller reduces, in a line of its own. Computed in float32 at least; no argument is changed.
"""

import inspect
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.equations.masking import check_same_shape, grad_where_finite, upcast


class Surrogate(NamedTuple):
    """What a policy loss returns; the loss alone is minimised, the rest is measured."""

    loss: Tensor  # (B, R), unreduced
    ratio: Tensor  # (B, R) pi / pi_old, without gradient: val/ratio, max_ratio, the first one is 1
    clipped: Tensor  # (B, R) bool, where the loss has no gradient: policy/clipfrac


# Of log-probs, old ones and advantages; of a parameter response_mask too, where it has one.
PolicyLoss = Callable[..., Surrogate]


class ValueLoss(NamedTuple):
    loss: Tensor  # (B, R)
    clipped: Tensor  # (B, R) bool


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float,
    dual_clip: float | None = None,
) -> Surrogate:
    """Clipped policy loss per token, unreduced. Schulman et al. 2017 (arXiv:1707.06347), eq. 7;
    asymmetric clip: DAPO (arXiv:2503.14476), sec. 3.1; dual clip: Ye et al. 2020
    (arXiv:1912.09729), eq. 5.

        loss_t = -min(ratio_t A_t, clip(ratio_t, 1 - clip_low, 1 + clip_high) A_t)
        ratio_t = exp(logprobs_t - old_logprobs_t)
        with a dual clip, where A_t < 0:   loss_t = min(loss_t, -dual_clip A_t)

    Args:
        logprobs: (B, R) nats, log-prob of each response token under the policy being trained;
            carries the gradient.
        old_logprobs: (B, R) nats, the same under the weights that sampled; constants.
        advantages: (B, R), treated as constants.
        clip_low, clip_high: ratio units, >= 0; a clip_low of 1 or more never clips.
        dual_clip: ratio units, above 1 + clip_high; bounds the loss of a bad token that became much
            more probable. None: no bound, as in the first paper.
    Returns:
        Surrogate(loss, ratio, clipped), each (B, R); `ratio` has no gradient; `clipped` is bool,
        True where clipping makes the gradient zero: ratio > 1 + clip_high with A > 0, or
        ratio < 1 - clip_low or ratio > dual_clip with A < 0. Masked positions are not treated:
        reduce with `masked_mean`.
        There is no clamp but the clip. With a finite clip_high, a ratio that overflows gives the
        clipped loss if A > 0, 0 if A = 0, and without a dual clip an infinite loss, which is the
        truth, if A < 0. A loss that is not finite has gradient zero, so that a mask can drop it.
    Raises:
        ValueError: shapes differ, a clip is negative, or dual_clip is not above 1 + clip_high.

    >>> from torch import log, ones, tensor, zeros
    >>> out = clipped_surrogate(log(tensor([[1.5, 0.5]])), zeros(1, 2), ones(1, 2), 0.2, 0.2)
    >>> out.loss                         # min(1.5, 1.2) and min(0.5, 0.8), negated
    tensor([[-1.2000, -0.5000]])
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_not_negative(clip_low=clip_low, clip_high=clip_high)
    if dual_clip is not None and not dual_clip > 1 + clip_high:
        legal = f"above 1 + clip_high, {1 + clip_high}, is legal"
        raise ValueError(f"dual_clip is {dual_clip}: {legal}")
    log_ratio = upcast(logprobs) - upcast(old_logprobs).detach()
    ratio, advantages = log_ratio.detach().exp(), upcast(advantages).detach()

    # Clipping the log-ratio is clipping the ratio, without the inf · 0 of an overflow.
    low = math.log(1 - clip_low) if clip_low < 1 else -math.inf
    high = math.log1p(clip_high)
    highest = math.inf if dual_clip is None else math.log(dual_clip)  # where A < 0
    good, bad = advantages > 0, advantages < 0
    clipped = (good & (log_ratio > high)) | (bad & ((log_ratio < low) | (log_ratio > highest)))
    # The minimum is the clipped term where `clipped`, a constant there, and else the ratio's term.
    # Where A is 0 the clipped one is taken, which is finite: 0 · inf is NaN.
    bounded = log_ratio.detach().clamp(low, high)
    bounded = torch.where(bad & (log_ratio > highest), highest, bounded)
    log_ratio = grad_where_finite(log_ratio, advantages * ratio)
    effective = torch.where(clipped | (advantages == 0), bounded, log_ratio)
    return Surrogate(-advantages * effective.exp(), ratio, clipped)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> ValueLoss:
    """Value loss per token, unreduced, that does not reward leaving the old value by more than
    clip. Huang et al. 2022, "The 37 Implementation Details of PPO", detail 9 (not in the paper).

        loss_t = 1/2 max((V_t - ret_t)², (clip(V_t, V_old_t - clip, V_old_t + clip) - ret_t)²)

    Args:
        values: (B, R) reward units, V(s_t) now; carries the gradient.
        old_values: (B, R), the same under the weights that sampled; constants.
        returns: (B, R), the targets, treated as constants.
        clip: reward units, >= 0, so it means little unless rewards are scaled; None: no clip, the
            plain 1/2 (V_t - ret_t)².
    Returns:
        ValueLoss(loss, clipped), each (B, R); `clipped` is bool, True where the gradient is zero.
        Masked positions are not treated: reduce with `masked_mean`. A loss that is not finite has
        gradient zero, so that a mask can drop it.
    Raises:
        ValueError: shapes differ, or clip is negative.

    >>> from torch import tensor
    >>> out = clipped_value_loss(tensor([[2.0]]), tensor([[0.0]]), tensor([[3.0]]), clip=0.5)
    >>> out.loss, out.clipped                    # the larger of (2 - 3)² and (0.5 - 3)², halved
    (tensor([[3.1250]]), tensor([[True]]))
    """
    check_same_shape(values=values, old_values=old_values, returns=returns)
    values, old_values, returns = upcast(values), upcast(old_values), upcast(returns).detach()
    if clip is None:
        bounded = values.detach()
    else:
        check_not_negative(clip=clip)
        bounded = values.detach().clamp(old_values.detach() - clip, old_values.detach() + clip)
    error, bounded_error = values - returns, bounded - returns
    clipped = ~(bounded_error.abs() <= error.abs())  # not >: a NaN in old_values has to show
    error = grad_where_finite(error, error + bounded_error)
    largest = torch.where(clipped, bounded_error, error)
    return ValueLoss(largest.square() / 2, clipped)


def truncated_weights(old_logprobs: Tensor, sampled_logprobs: Tensor, cap: float) -> Tensor:
    """Weight of each token's policy loss where another policy drew it than the one that learns.
    Espeholt et al. 2018 (IMPALA, arXiv:1802.01561), sec. 4.1; for samplers of other rounding Yao et
    al. 2025 ("Your Efficient RL Framework Secretly Brings You Off-Policy RL Training").

        weight_t = min(pi_old(a_t) / pi_sampled(a_t), cap)

    Without a cap its mean over what was sampled is exact: E_sampled[weight f] = E_old[f]. The cap
    bounds the variance, and what is estimated then is sum_a min(pi_old(a), cap pi_sampled(a)) f(a).

    Args:
        old_logprobs: (B, R) nats, by the pass that trains.
        sampled_logprobs: (B, R) nats, of the law that was drawn from.
        cap: ratio units, >= 1.
    Returns:
        (B, R), without gradient.
    Raises:
        ValueError: shapes differ, or cap is below 1.

    >>> from torch import log, tensor
    >>> truncated_weights(log(tensor([[0.6, 0.9]])), log(tensor([[0.5, 0.1]])), cap=2.0)
    tensor([[1.2000, 2.0000]])
    """
    check_same_shape(old_logprobs=old_logprobs, sampled_logprobs=sampled_logprobs)
    if not cap >= 1:
        raise ValueError(f"cap is {cap}: 1 or more is legal")
    return (upcast(old_logprobs) - upcast(sampled_logprobs)).detach().exp().clamp(max=cap)


def with_mask(policy_loss: PolicyLoss) -> Callable[[Tensor, Tensor, Tensor, Tensor], Surrogate]:
    """The loss as a function of (logprobs, old_logprobs, advantages, response_mask): a loss of
    single tokens needs no mask, one of whole responses names it as a parameter."""
    if "response_mask" in inspect.signature(policy_loss).parameters:
        return lambda new, old, credit, mask: policy_loss(new, old, credit, response_mask=mask)
    return lambda new, old, credit, mask: policy_loss(new, old, credit)


def check_not_negative(**numbers: float) -> None:
    for name, value in numbers.items():
        if not value >= 0:  # NaN is refused too
            raise ValueError(f"{name} is {value}: 0 or more is legal")
