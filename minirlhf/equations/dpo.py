"""The DPO family: losses by which a policy learns preferences itself, without a reward model.

Log-probs of whole responses come in, unreduced losses go out, computed in float32 at least; no
argument is changed. Each loss has its implicit reward, what a reward model would say if the policy
were already the best one for it; it is told beside the loss, without gradient.

Shapes: N pairs, or N single responses for KTO.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from minirlhf.equations.masking import check_mask, check_same_shape, check_vector, upcast
from minirlhf.equations.preference import check_smoothing


class DPOLoss(NamedTuple):
    loss: Tensor  # (N,)
    chosen_rewards: Tensor  # (N,), without gradient
    rejected_rewards: Tensor  # (N,), without gradient


class KTOLoss(NamedTuple):
    loss: Tensor  # (N,)
    rewards: Tensor  # (N,), without gradient
    kl: Tensor  # (), nats, what the rewards were compared with; without gradient


# ------------------------------------------------------------------------ pairs, and a reference


def dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float, label_smoothing: float = 0.0,
) -> DPOLoss:
    """Direct preference optimisation per pair. Rafailov et al. 2023 (arXiv:2305.18290), eq. 7;
    label smoothing: Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".

        reward = beta · (log policy(y) - log ref(y)),   margin = reward(chosen) - reward(rejected)
        loss = -(1 - label_smoothing) log sigmoid(margin) - label_smoothing log sigmoid(-margin)

    Args:
        policy_chosen, policy_rejected: (N,) nats, log-prob of the response, summed over its tokens,
            under the policy being trained; carry the gradient.
        ref_chosen, ref_rejected: (N,) nats, the same under the reference, treated as constants.
        beta: > 0; a larger one holds the policy nearer to the reference.
        label_smoothing: probability that a label is wrong, in [0, 0.5).
    Returns:
        DPOLoss(loss, chosen_rewards, rejected_rewards), each (N,); the rewards have no gradient.
    Raises:
        ValueError: shapes differ or are not (N,), or beta or label_smoothing is out of its range.

    >>> from torch import tensor
    >>> dpo_loss(tensor([-8.0]), tensor([-9.0]), tensor([-10.0]), tensor([-9.0]), beta=0.5)
    DPOLoss(loss=tensor([0.3133]), chosen_rewards=tensor([1.]), rejected_rewards=tensor([0.]))
    """
    check_smoothing(label_smoothing)
    chosen, rejected = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return DPOLoss(loss, chosen.detach(), rejected.detach())


def robust_dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float, label_smoothing: float,
) -> DPOLoss:
    """DPO whose mean over labels that are flipped with a known probability e is the loss of the
    true labels. Chowdhury et al. 2024 (arXiv:2403.00409), sec. 3.

        loss = (-(1 - e) log sigmoid(margin) + e log sigmoid(-margin)) / (1 - 2 e)

    Rewards, arguments, returns and errors as in `dpo_loss`; e is label_smoothing. The loss of a
    single pair may be below 0, without bound.

    >>> from torch import tensor
    >>> zero = tensor([0.0])
    >>> robust_dpo_loss(tensor([2.0]), zero, zero, zero, beta=0.5, label_smoothing=0.25).loss
    tensor([-0.1867])
    """
    check_smoothing(label_smoothing)
    chosen, rejected = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    margin = chosen - rejected
    loss = -(1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return DPOLoss(loss / (1 - 2 * label_smoothing), chosen.detach(), rejected.detach())


def ipo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float,
) -> DPOLoss:
    """Identity preference optimisation per pair: the margin is drawn to a finite value, so that
    labels without noise do not pull the policy away from the reference for ever. Azar et al. 2023
    (arXiv:2310.12036), eq. 17, whose tau is beta.

        h = (log policy - log ref)(chosen) - (log policy - log ref)(rejected)
        loss = (h - 1 / (2 beta))^2

    Arguments, returns and errors as in `dpo_loss`, but log-probs are means over a response's
    tokens, as the authors have it: with sums 1 / (2 beta) would mean less the longer the responses
    are. Rewards are beta · (log policy - log ref) of these means; at the minimum they differ by
    1/2.

    >>> from torch import tensor
    >>> zero = tensor([0.0])
    >>> ipo_loss(tensor([2.0]), zero, zero, zero, beta=0.5).loss  # (2 - 1)^2
    tensor([1.])
    """
    chosen, rejected = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    loss = ((chosen - rejected) / beta - 1 / (2 * beta)).square()
    return DPOLoss(loss, chosen.detach(), rejected.detach())


def hinge_dpo_loss(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float,
) -> DPOLoss:
    """DPO with a hinge: a pair whose margin has reached 1 is left alone. Zhao et al. 2023, SLiC-HF
    (arXiv:2305.10425), with rewards relative to a reference: Liu et al. 2023, RSO
    (arXiv:2309.06657), hinge-norm.

        loss = max(0, 1 - margin)

    Rewards, margin, arguments, returns and errors as in `dpo_loss`.

    >>> from torch import tensor
    >>> zero = torch.zeros(2)
    >>> hinge_dpo_loss(tensor([1.0, 4.0]), zero, zero, zero, beta=0.5).loss
    tensor([0.5000, 0.0000])
    """
    chosen, rejected = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    loss = torch.relu(1 - (chosen - rejected))
    return DPOLoss(loss, chosen.detach(), rejected.detach())


# ------------------------------------------------------------------------------- no reference


def simpo_loss(
    chosen_mean: Tensor, rejected_mean: Tensor, beta: float, gamma: float
) -> DPOLoss:
    """Simple preference optimisation per pair. Meng et al. 2024 (arXiv:2405.14734), eq. 6.

        reward = beta · mean log policy(y),   loss = -log sigmoid(margin - gamma)

    Args:
        chosen_mean, rejected_mean: (N,) nats a token, mean log-prob of a response's tokens under
            the policy being trained; carry the gradient.
        beta: > 0.
        gamma: reward units, >= 0: by how much the chosen response should win.
    Returns:
        DPOLoss(loss, chosen_rewards, rejected_rewards), each (N,); the rewards have no gradient.
    Raises:
        ValueError: shapes differ or are not (N,), or beta or gamma is out of its range.

    >>> from torch import tensor
    >>> simpo_loss(tensor([-1.0]), tensor([-1.5]), beta=2.0, gamma=1.0).loss  # log 2
    tensor([0.6931])
    """
    check_same_shape(chosen_mean=chosen_mean, rejected_mean=rejected_mean)
    check_vector(chosen_mean=chosen_mean)
    _check_beta(beta)
    if not (math.isfinite(gamma) and gamma >= 0):
        raise ValueError(f"gamma is {gamma}: a finite number of at least 0 is needed")
    chosen, rejected = beta * upcast(chosen_mean), beta * upcast(rejected_mean)
    loss = -logsigmoid(chosen - rejected - gamma)
    return DPOLoss(loss, chosen.detach(), rejected.detach())


def orpo_loss(chosen_mean: Tensor, rejected_mean: Tensor) -> DPOLoss:
    """Odds-ratio preference loss per pair, which goes with the SFT loss of the chosen response.
    Hong et al. 2024 (arXiv:2403.07691), eq. 7.

        log odds(y) = l - log(1 - exp l),   l = mean log policy(y)
        loss = -log sigmoid(log odds(chosen) - log odds(rejected))

    A response that is certain, l = 0, would have infinite odds: it counts as the least uncertain
    number below 0 that its dtype holds, without gradient.

    Args:
        chosen_mean, rejected_mean: (N,) nats a token, at most 0: mean log-prob of a response's
            tokens under the policy being trained; carry the gradient.
    Returns:
        DPOLoss(loss, chosen_rewards, rejected_rewards), each (N,); the rewards are the log odds,
        without gradient.
    Raises:
        ValueError: shapes differ or are not (N,), or a log-prob is above 0.

    >>> from torch import tensor
    >>> orpo_loss(tensor([0.75]).log(), tensor([0.5]).log()).loss  # odds 3 and 1: -log 3/4
    tensor([0.2877])
    """
    check_same_shape(chosen_mean=chosen_mean, rejected_mean=rejected_mean)
    check_vector(chosen_mean=chosen_mean)
    chosen = _log_odds(chosen_mean, "chosen_mean")
    rejected = _log_odds(rejected_mean, "rejected_mean")
    return DPOLoss(-logsigmoid(chosen - rejected), chosen.detach(), rejected.detach())


# ------------------------------------------------------------------------------ single responses


def kto_loss(
    policy: Tensor, ref: Tensor, desirable: Tensor, kl: float | Tensor, beta: float,
    desirable_weight: float = 1.0, undesirable_weight: float = 1.0,
) -> KTOLoss:
    """Kahneman-Tversky optimisation per response, each liked or not by itself. Ethayarajh et al.
    2024 (arXiv:2402.01306), eq. 8.

        reward = beta · (log policy(y) - log ref(y)),   z = beta · max(0, mean of kl)
        loss = desirable_weight (1 - sigmoid(reward - z))      of a desirable response,
               undesirable_weight (1 - sigmoid(z - reward))    of one that is not

    Args:
        policy: (N,) nats, log-prob of the response, summed over its tokens, under the policy being
            trained; carries the gradient.
        ref: (N,) nats, the same under the reference, treated as a constant.
        desirable: (N,) bool, True = liked.
        kl: nats, log policy(y') - log ref(y') of responses y' to prompts that they do not belong
            to, (M,) of the whole optimizer step, or their mean. Treated as a constant.
        beta: > 0; a larger one holds the policy nearer to the reference.
        desirable_weight, undesirable_weight: >= 0.
    Returns:
        KTOLoss(loss, rewards, kl): (N,), (N,) without gradient, and () max(0, mean of kl).
    Raises:
        ValueError: shapes that do not fit, desirable is not bool, or a number is out of its range.

    >>> from torch import tensor
    >>> liked = tensor([True, False])
    >>> kto_loss(tensor([-1.0, -2.0]), tensor([-2.0, -2.0]), liked, 1.0, beta=0.5).loss
    tensor([0.5000, 0.3775])
    """
    check_same_shape(policy=policy, ref=ref, desirable=desirable)
    check_vector(policy=policy)
    check_mask(desirable=desirable)
    _check_beta(beta)
    for name, weight in (("desirable_weight", desirable_weight),
                         ("undesirable_weight", undesirable_weight)):
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{name} is {weight}: a finite number of at least 0 is needed")
    rewards = beta * (upcast(policy) - upcast(ref).detach())
    kl = torch.as_tensor(kl).detach().to(rewards)
    if kl.dim() > 1 or not kl.numel():
        raise ValueError(f"kl is {tuple(kl.shape)}: one number, or (M,) of at least one is needed")
    kl = kl.mean().clamp(min=0)
    z = beta * kl
    liked = desirable_weight * torch.sigmoid(z - rewards)  # 1 - sigmoid(x) = sigmoid(-x)
    loss = torch.where(desirable, liked, undesirable_weight * torch.sigmoid(rewards - z))
    return KTOLoss(loss, rewards.detach(), kl)


# ---------------------------------------------------------------------------------------- parts


def _rewards(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """beta · (log policy - log ref) of both responses, (N,) each, once they are checked."""
    check_same_shape(
        policy_chosen=policy_chosen, policy_rejected=policy_rejected,
        ref_chosen=ref_chosen, ref_rejected=ref_rejected,
    )
    check_vector(policy_chosen=policy_chosen)
    _check_beta(beta)
    chosen = beta * (upcast(policy_chosen) - upcast(ref_chosen).detach())
    return chosen, beta * (upcast(policy_rejected) - upcast(ref_rejected).detach())


def _log_odds(mean: Tensor, name: str) -> Tensor:
    mean = upcast(mean)
    if bool((mean > 0).any()):
        raise ValueError(f"{name} is up to {float(mean.max())}: log-probs are at most 0")
    mean = mean.clamp(max=-torch.finfo(mean.dtype).tiny)
    return mean - torch.log(-torch.expm1(mean))


def _check_beta(beta: float) -> None:
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta is {beta}: a finite number above 0 is needed")
