"""Losses of preferences, one number a pair or list, and how often a preference is met.

Rewards come in, unreduced losses go out, computed in float32 at least. No argument is changed.
Shapes: N pairs or lists, K responses of the longest list.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minirlhf.equations.masking import (
    check_mask,
    check_matrix,
    check_same_shape,
    check_vector,
    upcast,
)


class Accuracy(NamedTuple):
    strict: float  # fraction of pairs with chosen > rejected
    ties: float  # fraction with chosen == rejected
    half: float  # strict + ties / 2: what guessing on a tie would give


def bradley_terry_loss(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margin: float | Tensor = 0.0,
    chosen_probability: float | Tensor = 1.0, label_smoothing: float = 0.0,
) -> Tensor:
    """Reward-model loss per pair. Ouyang et al. 2022 (arXiv:2203.02155), eq. 1; margin: Touvron et
    al. 2023 (arXiv:2307.09288), eq. 2; label smoothing: Wang et al. 2024 (arXiv:2401.06080), of
    which a probability for each pair is the general form.

        d = chosen_rewards - rejected_rewards - margin
        loss = -q log sigmoid(d) - (1 - q) log sigmoid(-d)
        q = p (1 - e) + (1 - p) e,   p = chosen_probability, e = label_smoothing

    It is smallest where sigmoid(d) = q, so with an unsure or smoothed label the best d is finite.

    Args:
        chosen_rewards, rejected_rewards: (N,) reward units; carry the gradient.
        margin: reward units, one for all pairs or (N,): by how much chosen should win.
        chosen_probability: that chosen is the better one, in [0, 1]; one for all pairs or (N,).
        label_smoothing: probability that a label is wrong, in [0, 0.5).
    Returns:
        (N,) nats, finite for any finite difference; where the label is certain and d has its sign,
        also for an infinite one.
    Raises:
        ValueError: shapes differ or are not (N,), or a probability is out of its range.

    >>> from torch import tensor
    >>> bradley_terry_loss(tensor([2.0, 2.0]), tensor([2.0, 1.0]), tensor([0.0, 1.0]))  # log 2
    tensor([0.6931, 0.6931])
    """
    check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check_vector(chosen_rewards=chosen_rewards)
    if isinstance(margin, Tensor):
        check_same_shape(chosen_rewards=chosen_rewards, margin=margin)
        margin = upcast(margin)
    if isinstance(chosen_probability, Tensor):
        check_same_shape(chosen_rewards=chosen_rewards, chosen_probability=chosen_probability)
    check_smoothing(label_smoothing)
    difference = upcast(chosen_rewards) - upcast(rejected_rewards) - margin
    p = torch.as_tensor(chosen_probability).to(difference)
    if not bool(((p >= 0) & (p <= 1)).all()):  # NaN is refused too
        raise ValueError(f"chosen_probability is {p.tolist()}: 0 to 1 is legal")
    q = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    # A label that is certain leaves the other term out: 0 times infinity would be NaN.
    right = torch.where(q > 0, -q * logsigmoid(difference), 0)
    return right + torch.where(q < 1, -(1 - q) * logsigmoid(-difference), 0)


def plackett_luce_loss(scores: Tensor, ranks: Tensor, mask: Tensor) -> Tensor:
    """Loss of a ranked list. Plackett 1975, "The analysis of permutations"; Luce 1959,
    "Individual choice behavior": the list is made by choosing the best, again and again, of
    what is left.

        loss = sum_i (log sum_{j in S_i} exp(s_j) - s_i),   S_i = {i} and all that rank behind i

    Without ties this is minus the log-likelihood of the order; for two responses it is
    Bradley-Terry's loss. Responses that tie are never compared with each other. By Luce's axiom
    softmax over S_i is the probability that i is the best of S_i, whatever else there is: each term
    stays true, and their sum is a composite likelihood. A choice of the best of n, the others tied
    behind it, gives the cross-entropy of softmax over n.

    Args:
        scores: (N, K) reward units; carry the gradient.
        ranks: (N, K) integers, smaller is better; only their order counts.
        mask: (N, K) bool, True = a response; lists may be of different lengths.
    Returns:
        (N,) nats, a sum over a list's responses; 0 where nothing ranks behind anything.
    Raises:
        ValueError: shapes differ or are not (N, K), or mask is not bool.

    >>> from torch import ones, tensor
    >>> plackett_luce_loss(tensor([[2.0, 1.0]]), tensor([[1, 2]]), ones(1, 2).bool())
    tensor([0.3133])
    """
    check_same_shape(scores=scores, ranks=ranks, mask=mask)
    check_matrix(scores=scores)
    check_mask(mask=mask)
    scores = torch.where(mask, upcast(scores), 0)
    ahead = scores[:, None, :] - scores[:, :, None]  # (N, K, K): s_j - s_i
    behind = (ranks[:, None, :] > ranks[:, :, None]) & mask[:, None, :] & mask[:, :, None]
    among = behind | torch.eye(scores.shape[1], dtype=torch.bool, device=mask.device)
    return torch.where(among, ahead, -math.inf).logsumexp(2).sum(1)


def preference_accuracy(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Accuracy:
    """How often the chosen text is scored above the rejected one.

    Ties are counted apart: a model that scores everything alike is not right half the time.

    Args:
        chosen_rewards, rejected_rewards: (N,), N >= 1. A NaN makes its pair a wrong one.
    Returns:
        Accuracy(strict, ties, half), fractions of N.
    Raises:
        ValueError: shapes differ, are not (N,), or N is 0.

    >>> from torch import tensor
    >>> preference_accuracy(tensor([3.0, 1.0, 2.0, 5.0]), tensor([1.0, 1.0, 4.0, 0.0]))
    Accuracy(strict=0.5, ties=0.25, half=0.625)
    """
    check_same_shape(chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards)
    check_vector(chosen_rewards=chosen_rewards)
    pairs = len(chosen_rewards)
    if pairs == 0:
        raise ValueError("chosen_rewards is (0,): at least one pair is needed")
    strict = int((chosen_rewards > rejected_rewards).sum()) / pairs
    ties = int((chosen_rewards == rejected_rewards).sum()) / pairs
    return Accuracy(strict, ties, strict + ties / 2)


def check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}: at least 0 and below 0.5 is legal")
