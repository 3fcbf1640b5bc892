"""Policy gradients without a critic: advantages from several responses to a prompt, or from the
rewards alone, and the losses that weigh whole responses or every token.

Advantages are without gradient: inputs are detached. Losses are unreduced. Computed in float32 at
least. Shapes: B responses, the G to a prompt adjacent; R tokens of the longest.
"""

import math

import torch
from torch import Tensor

from minirlhf.equations.masking import (
    check_mask,
    check_matrix,
    check_same_shape,
    check_vector,
    grad_where_finite,
    masked_mean,
    upcast,
)
from minirlhf.equations.policy import Surrogate, check_not_negative, clipped_surrogate

_STD_EPS = 1e-4


# -------------------------------------------------------------------------------------- advantages


def group_advantages(scores: Tensor, group_size: int, divide_by_std: bool = True) -> Tensor:
    """Each score against the mean of its prompt's. Shao et al. 2024, GRPO (arXiv:2402.03300), sec.
    4.1.2; without the division: Liu et al. 2025, Dr. GRPO (arXiv:2503.20783).

        A_i = (S_i - mean(group)) / (std(group) + 1e-4),   std the sample's (Bessel's correction)

    Args:
        scores: (B,); the group_size responses to a prompt lie next to each other.
        group_size: responses a prompt, >= 2; divides B.
        divide_by_std: False leaves out the division, which favours prompts that are nearly solved
            or nearly hopeless.
    Returns:
        (B,) without gradient; exact 0 where a group's scores agree.
    Raises:
        ValueError: scores is not (B,), or group_size is below 2 or does not divide B.

    >>> from torch import tensor
    >>> group_advantages(tensor([1.0, 3.0, 7.0, 7.0]), group_size=2, divide_by_std=False)
    tensor([-1.,  1.,  0.,  0.])
    """
    shifted = _grouped(scores, group_size)
    advantages = shifted - shifted.mean(dim=1, keepdim=True)
    if divide_by_std:
        advantages = advantages / (shifted.std(dim=1, keepdim=True) + _STD_EPS)
    return advantages.flatten()


def batch_scaled_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Each score against the mean of its prompt's, over the spread of all scores. Liu et al. 2025,
    Lite PPO (arXiv:2508.08221), sec. 4.1: a group that nearly agrees has a tiny std, which blows up
    differences that mean little; that of the batch does not.

        A_i = (S_i - mean(group)) / (std(batch) + 1e-4),   std the sample's (Bessel's correction)

    Arguments, errors and zeros as in `group_advantages`.

    >>> from torch import tensor
    >>> batch_scaled_advantages(tensor([1.0, 3.0, 7.0, 7.0]), group_size=2)  # ∓1 / 3, the std
    tensor([-0.3333,  0.3333,  0.0000,  0.0000])
    """
    shifted = _grouped(scores, group_size)
    advantages = shifted - shifted.mean(dim=1, keepdim=True)
    return advantages.flatten() / (upcast(scores).detach().std() + _STD_EPS)


def leave_one_out_advantages(scores: Tensor, group_size: int) -> Tensor:
    """Each score against the mean of the others of its prompt, a baseline that the response has no
    part in, so that the gradient is unbiased. Ahmadian et al. 2024, RLOO (arXiv:2402.14740).

        A_i = S_i - sum_{j != i} S_j / (G - 1) = (S_i - mean(group)) G / (G - 1)

    Arguments, errors and zeros as in `group_advantages`.

    >>> from torch import tensor
    >>> leave_one_out_advantages(tensor([0.0, 3.0, 6.0]), group_size=3)  # 0 - 4.5, 3 - 3, 6 - 1.5
    tensor([-4.5000,  0.0000,  4.5000])
    """
    shifted = _grouped(scores, group_size)
    others = (shifted.sum(dim=1, keepdim=True) - shifted) / (group_size - 1)
    return (shifted - others).flatten()


def without_spread(scores: Tensor, group_size: int) -> Tensor:
    """(B / G,) bool: the groups whose scores all agree; nothing is learned from them.

    >>> from torch import tensor
    >>> without_spread(tensor([1.0, 3.0, 7.0, 7.0]), group_size=2)
    tensor([False,  True])
    """
    return (_grouped(scores, group_size) == 0).all(dim=1)


def _grouped(scores: Tensor, group_size: int) -> Tensor:
    """(B / G, G) scores, minus the first of each group: so equal ones are exact zeros."""
    check_vector(scores=scores)
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}: use 2 or more, to compare responses")
    rows, rest = len(scores), len(scores) % group_size
    if rest:
        legal = [n for n in (rows - rest, rows - rest + group_size) if n > 0]
        got = f"scores has {rows} rows, not a multiple of group_size {group_size}"
        raise ValueError(f"{got}: use {' or '.join(map(str, legal))}")
    grouped = upcast(scores).detach().view(-1, group_size)
    return grouped - grouped[:, :1]


def rewards_to_go(rewards: Tensor, response_mask: Tensor) -> Tensor:
    """What each token and those after it are rewarded with. Hu et al. 2025, REINFORCE++
    (arXiv:2501.03262), whose advantage this is, once it is standardized over the whole batch.

        A_t = sum_{l >= t} r_l,   r as `advantages.token_rewards` gives it: the score, minus the KL

    It is `advantages.gae` with lam and gamma 1 and a critic that says 0.

    Args:
        rewards: (B, R) reward units a token.
        response_mask: (B, R) bool.
    Returns:
        (B, R) without gradient; exact 0 outside the mask, whose cells have no part in a sum.
    Raises:
        ValueError: shapes differ, or response_mask is not bool.

    >>> from torch import tensor
    >>> rewards_to_go(tensor([[-1.0, 2.0, 9.0]]), tensor([[True, True, False]]))
    tensor([[1., 2., 0.]])
    """
    check_same_shape(rewards=rewards, response_mask=response_mask)
    check_matrix(response_mask=response_mask)
    check_mask(response_mask=response_mask)
    kept = torch.where(response_mask, upcast(rewards).detach(), 0)
    return torch.where(response_mask, kept.flip(1).cumsum(1).flip(1), 0)


# ------------------------------------------------------------------------------------------ losses


def sequence_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor,
    clip_low: float, clip_high: float, dual_clip: float | None = None,
) -> Surrogate:
    """The clipped loss with one ratio for a whole response. Zheng et al. 2025, GSPO
    (arXiv:2507.18071), eq. 5 and 7.

        loss_i = -min(s_i A_i, clip(s_i, 1 - clip_low, 1 + clip_high) A_i)
        s_i = (pi(y_i) / pi_old(y_i))^(1 / |y_i|) = exp(mean_t(logprobs_t - old_logprobs_t))

    Each token's cell holds its response's loss, so the paper's objective is the mean over responses
    of the means over their tokens. The mean makes ratios small: clips of 3e-4 and 4e-4 there.

    Args:
        advantages: (B, R), each response's own number in all its cells.
        response_mask: (B, R) bool; False cells have no part in the ratio.
    Other arguments, result and errors as in `policy.clipped_surrogate`.

    >>> from torch import log, ones, tensor, zeros
    >>> mask = tensor([[True, True, False]])
    >>> new = log(tensor([[4.0, 1.0, 9.0]]))  # sqrt(4 · 1) is 2, clipped to 1.2
    >>> sequence_surrogate(new, zeros(1, 3), ones(1, 3), mask, 0.2, 0.2).loss
    tensor([[-1.2000, -1.2000, -1.2000]])
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, response_mask=response_mask)
    check_matrix(response_mask=response_mask)
    check_mask(response_mask=response_mask)
    log_ratio = upcast(logprobs) - upcast(old_logprobs).detach()
    mean = masked_mean(log_ratio, response_mask, dim=1)[:, None].expand_as(log_ratio)  # (B, R)
    zeros = torch.zeros_like(mean)
    return clipped_surrogate(mean, zeros, advantages, clip_low, clip_high, dual_clip)


def cispo_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Surrogate:
    """REINFORCE with clipped weights: no token loses its gradient. MiniMax 2025, CISPO
    (arXiv:2506.13585), eq. 4 and 5.

        loss_t = -w_t A_t logprobs_t,   w_t = clip(ratio_t, 1 - clip_low, 1 + clip_high), a constant

    Arguments and errors as in `policy.clipped_surrogate`; a clip_low of 1 or more never clips,
    which the paper uses.
    Returns:
        Surrogate(loss, ratio, clipped); `clipped` is True where the weight is not the ratio, and
        the gradient is -w_t A_t everywhere.

    >>> from torch import log, ones, tensor, zeros
    >>> out = cispo_loss(log(tensor([[1.5, 0.5]])), zeros(1, 2), ones(1, 2), 0.2, 0.2)
    >>> out.loss                         # -1.2 log 1.5 and -0.8 log 0.5
    tensor([[-0.4866,  0.5545]])
    """
    check_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    check_not_negative(clip_low=clip_low, clip_high=clip_high)
    logprobs, advantages = upcast(logprobs), upcast(advantages).detach()
    log_ratio = logprobs.detach() - upcast(old_logprobs).detach()
    low = math.log(1 - clip_low) if clip_low < 1 else -math.inf
    high = math.log1p(clip_high)
    weights = log_ratio.clamp(low, high).exp()
    clipped = (log_ratio < low) | (log_ratio > high)
    logprobs = grad_where_finite(logprobs, weights * advantages * logprobs.detach())
    return Surrogate(-weights * advantages * logprobs, log_ratio.exp(), clipped)
