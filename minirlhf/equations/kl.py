"""Estimators of KL(policy || ref) from the policy's own samples, and the adaptive coefficient.

All take log-probs of the sampled tokens, d = logprobs - ref_logprobs, in nats, one number per
token. Schulman 2020, "Approximating KL Divergence" (joschu.net/blog/kl-approx.html), whose ratio r
is ref / policy, so that his log r is -d.

In the reward take kl_k1: the policy gradient of the return is then that of -KL(policy || ref),
since the gradient of kl_k1 itself has expectation 0. As a loss take kl_k2: its gradient is that of
the KL in expectation, while kl_k1's is 0 and kl_k3's is that of KL(ref || policy). No clamp
anywhere: an overflow shows as infinity. `divergence.token_kl` is no estimate but the sum over the
vocabulary.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minirlhf.equations.masking import check_same_shape, grad_where_finite, upcast


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d: unbiased, signed, of high variance.

    Args:
        logprobs: (B, R) nats, log-prob of each sampled token under the policy that sampled it.
        ref_logprobs: (B, R) nats, the same tokens under the reference.
    Returns:
        (B, R) nats. Masked positions are not treated: reduce with `masked_mean`.
    Raises:
        ValueError: shapes differ.

    >>> from torch import tensor
    >>> kl_k1(tensor([[-1.0, -2.0]]), tensor([[-1.5, -1.0]]))
    tensor([[ 0.5000, -1.0000]])
    """
    check_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return upcast(logprobs) - upcast(ref_logprobs)


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d² / 2: never negative, biased, small variance. Arguments as in `kl_k1`.

    >>> from torch import tensor
    >>> kl_k2(tensor([[-1.0, -2.0]]), tensor([[-1.5, -1.0]]))
    tensor([[0.1250, 0.5000]])
    """
    d = kl_k1(logprobs, ref_logprobs)
    return grad_where_finite(d, d).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(-d) - 1 + d: never negative, unbiased, small variance. Arguments as in `kl_k1`.

    >>> from torch import tensor
    >>> kl_k3(tensor([[-1.0, -2.0]]), tensor([[-1.5, -1.0]]))  # e^-0.5 - 0.5 and e - 2
    tensor([[0.1065, 0.7183]])
    """
    d = kl_k1(logprobs, ref_logprobs)
    d = grad_where_finite(d, torch.expm1(-d))
    return torch.expm1(-d) + d  # exp(-d) - 1 would lose a small d to rounding


def kl_abs(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """|d|: never negative, biased: a penalty on leaving the reference in either direction, not an
    estimate of the KL (TRL 0.9's `abs`). Arguments as in `kl_k1`.

    >>> from torch import tensor
    >>> kl_abs(tensor([[-1.0, -2.0]]), tensor([[-1.5, -1.0]]))
    tensor([[0.5000, 1.0000]])
    """
    return kl_k1(logprobs, ref_logprobs).abs()


@dataclass
class AdaptiveKL:
    """KL coefficient that steers the measured KL to a target. Ziegler et al. 2019
    (arXiv:1909.08593), section 2.2, where n / horizon is the constant K_beta.

        coef <- coef · (1 + clip(kl / target - 1, -0.2, 0.2) · n / horizon)

    Args:
        coef: the coefficient, > 0 (a 0 could never move); changed by `update`.
        target: nats a sequence, > 0: KL summed over tokens, then averaged over sequences.
        horizon: responses, > 0: the coefficient moves by at most a fifth of n / horizon an update.
    Raises:
        ValueError: an argument is out of its range.

    >>> controller = AdaptiveKL(coef=0.5, target=6.0, horizon=100)
    >>> controller.update(kl=12.0, n=50)
    >>> controller.coef  # 0.5 · (1 + 0.2 · 50 / 100)
    0.55
    """

    coef: float
    target: float
    horizon: float

    _MAX_ERROR = 0.2

    def __post_init__(self):
        for name in ("coef", "target", "horizon"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise ValueError(f"{name} is {value}: a finite number above 0 is needed")

    def update(self, kl: float, n: int) -> None:
        """Moves `coef` after a rollout, whose rewards used the old one.

        Args:
            kl: nats a sequence, measured on the rollout; a mean of kl_k1 may be below 0.
            n: responses in the rollout.
        Raises:
            ValueError: kl is not finite, or n is not between 1 and 5 · horizon, where the
                coefficient could reach 0.
        """
        if not math.isfinite(kl):
            raise ValueError(f"kl is {kl}: a finite number is needed; check the log-probs")
        if not 1 <= n < self.horizon / self._MAX_ERROR:
            legal = "n must be at least 1 and below 5 · horizon"
            do = "a horizon well above n moves the coefficient slowly"
            raise ValueError(f"n is {n}, horizon is {self.horizon}: {legal}; {do}")
        error = min(max(kl / self.target - 1, -self._MAX_ERROR), self._MAX_ERROR)
        self.coef *= 1 + error * n / self.horizon


# The settings' names for what is computed from the sampled tokens alone; "full" needs the models.
ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3, "abs": kl_abs}
