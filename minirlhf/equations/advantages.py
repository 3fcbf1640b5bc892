"""From scores to per-token rewards, advantages and value targets. All of it is without gradient:
inputs are detached. Computed in float32 at least.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.equations.masking import (
    check_mask,
    check_matrix,
    check_same_shape,
    upcast,
)


class Advantages(NamedTuple):
    advantages: Tensor  # (B, R)
    returns: Tensor  # (B, R), the value targets


def token_rewards(scores: Tensor, kl: Tensor, response_mask: Tensor, kl_coef: float) -> Tensor:
    """KL penalty on every token, and the score on the last one. Ziegler et al. 2019
    (arXiv:1909.08593), eq. 2, its log-ratio paid out token by token.

        reward_t = -kl_coef · kl_t,   + score where t is the row's last True token

    Args:
        scores: (B,) reward units, of the whole response.
        kl: (B, R) nats a token, `kl_k1` of the policy that sampled.
        response_mask: (B, R) bool, at least one True a row.
        kl_coef: reward units a nat.
    Returns:
        (B, R) without gradient; exact 0 outside the mask.
    Raises:
        ValueError: shapes differ, response_mask is not bool, or a row has no token.

    >>> from torch import tensor
    >>> mask = tensor([[True, True, False]])
    >>> token_rewards(tensor([5.0]), tensor([[1.0, 2.0, 9.0]]), mask, kl_coef=0.5)
    tensor([[-0.5000,  4.0000,  0.0000]])
    """
    check_same_shape(kl=kl, response_mask=response_mask)
    check_matrix(response_mask=response_mask)
    check_mask(response_mask=response_mask)
    _one_a_row("scores", scores, response_mask)
    empty = (~response_mask.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        got = f"row {empty[0]} of response_mask has no True token ({len(empty)} such rows)"
        do = "a score needs a token to land on; a response has at least its EOS"
        raise ValueError(f"{got}: {do}")
    columns = torch.arange(response_mask.shape[1], device=response_mask.device)
    last = torch.where(response_mask, columns, -1).amax(dim=1)  # (B,)
    penalty = torch.where(response_mask, -kl_coef * upcast(kl).detach(), 0)
    score = torch.where(columns == last[:, None], upcast(scores).detach()[:, None], 0)  # (B, R)
    return penalty + score


def gae(
    rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: float, lam: float,
    bootstrap: Tensor | None = None,
) -> Advantages:
    """Generalised advantage estimation. Schulman et al. 2016 (arXiv:1506.02438), eq. 16.

        delta_t = r_t + gamma V_{t+1} - V_t
        A_t = delta_t + gamma lam A_{t+1},   ret_t = A_t + V_t

    Here t + 1 is the row's next True token: False cells in between, such as a tool's output, are
    skipped as if the row had been written without them. Zeroing them instead would let the value
    fall to 0 and back, and credit the policy with it.

    Args:
        rewards: (B, R) reward units; what lies under a False mask is ignored.
        values: (B, R), V(s_t), the value before token t; likewise.
        response_mask: (B, R) bool, True = a token that the policy chose.
        gamma: discount a token, in [0, 1].
        lam: in [0, 1]; 0 = one-step TD error, 1 = discounted return minus value.
        bootstrap: (B,) value of the state after the row's last token, 0 where that is terminal;
            gamma is applied here. None: terminal everywhere.
    Returns:
        Advantages(advantages, returns), each (B, R) without gradient; exact 0 outside the mask.
    Raises:
        ValueError: shapes differ, response_mask is not bool, or gamma or lam is outside [0, 1].

    >>> from torch import tensor, zeros
    >>> mask = tensor([[True, True, True]])
    >>> gae(tensor([[1.0, 2.0, 3.0]]), zeros(1, 3), mask, gamma=0.1, lam=1.0).advantages
    tensor([[1.2300, 2.3000, 3.0000]])
    """
    check_same_shape(rewards=rewards, values=values, response_mask=response_mask)
    check_matrix(response_mask=response_mask)
    check_mask(response_mask=response_mask)
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}: at least 0 and at most 1 is legal")
    rewards, values = upcast(rewards).detach(), upcast(values).detach()
    if bootstrap is None:
        bootstrap = values.new_zeros(len(values))
    _one_a_row("bootstrap", bootstrap, response_mask)

    next_value = upcast(bootstrap).detach()  # (B,)
    next_advantage = torch.zeros_like(next_value)
    advantages = torch.zeros_like(values)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        chosen = response_mask[:, t]
        next_value = torch.where(chosen, values[:, t], next_value)
        next_advantage = torch.where(chosen, advantage, next_advantage)
        advantages[:, t] = torch.where(chosen, advantage, 0)
    return Advantages(advantages, torch.where(response_mask, advantages + values, 0))


def _one_a_row(name: str, x: Tensor, mask: Tensor) -> None:
    if x.shape != mask.shape[:1]:
        got = f"{name} is {tuple(x.shape)}, response_mask is {tuple(mask.shape)}"
        raise ValueError(f"{got}: one number a row is needed, ({len(mask)},)")
