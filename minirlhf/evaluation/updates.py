"""Statistics of the updates on one rollout: sums over tokens while it is made, then means."""

from typing import NamedTuple

import torch
from torch import Tensor

from minirlhf.batches.rollouts import Rollout, RolloutBuffer, TokenPass, penalised_kl
from minirlhf.equations.kl import kl_k3
from minirlhf.equations.masking import masked_sum
from minirlhf.equations.policy import Surrogate, ValueLoss
from minirlhf.run.optim import check_finite


class PPOStats(NamedTuple):
    """Statistics of one `ppo_step`; means over the response tokens, those of all epochs alike."""

    policy_loss: float
    value_loss: float
    kl_loss: float  # kl_coef times the KL where it is a loss; else 0
    ptx_loss: float  # of the texts that are mixed in, before its weight; 0 without
    loss: float  # all of them with their weights
    approxkl: float  # mean of (new - old logprob)^2 / 2, nats
    policykl: float  # mean of old - new logprob, nats
    clipfrac: float  # share of tokens whose policy gradient was clipped
    value_clipfrac: float
    vpred: float  # value during the updates
    value_error: float  # mean of (value - return)^2
    entropy: float  # nats a token
    ratio: float
    ratio_var: float
    grad_norm: float  # mean over optimizer steps, before clipping
    critic_grad_norm: float  # of a critic with a trunk of its own; else 0: it is in grad_norm
    explained_variance: float  # 1 - var(returns - old values) / var(returns)
    non_score_reward: float  # mean over rows of the summed KL penalty, <= 0 on average
    first_ratio_gap: float  # largest |ratio - 1| before the first optimizer step; 0 if exact
    epochs: int  # passes made; fewer than asked for where the KL ended them


class TokenLosses(NamedTuple):
    """The losses of one micro-batch and what they were made of, (b, R) each."""

    total: Tensor  # what is minimised: all losses with their weights
    surrogate: Surrogate
    value: ValueLoss | None  # None where there is no critic
    kl: Tensor  # with its coefficient; zeros where the KL is a part of the rewards
    new: TokenPass  # of the policy that is being trained


class MiniBatchStats:
    """Sums over the response tokens of one mini-batch, on its way to an optimizer step.

    Args:
        masks: (b, R) bool of each micro-batch, the tokens that are learned from; None: all.
    """

    def __init__(self, mini_batch: list[Rollout], masks: list[Tensor] | None = None):
        self.mini_batch = mini_batch
        self.masks = [micro.response_mask for micro in mini_batch] if masks is None else masks
        self.rows = sum(int(mask.any(1).sum()) for mask in self.masks)
        self.tokens = sum(int(mask.sum()) for mask in self.masks)
        self.passed: list[Rollout] = []  # those that were added, with their old log-probs
        self.sums: dict[str, Tensor] = {}
        self.losses: list[Tensor] = []  # () of each micro-batch
        self.gaps: list[Tensor] = []  # () largest |ratio - 1| of each
        self.ptx_loss = self.grad_norm = self.critic_grad_norm = 0.0  # norms before clipping

    def add(self, micro: Rollout, token: TokenLosses, loss: Tensor) -> None:
        """Adds a micro-batch; loss: (), its share of the loss of the step."""
        mask, gap = self.masks[len(self.passed)], token.surrogate.ratio.detach() - 1
        log_ratio = token.new.logprobs.detach() - micro.old_logprobs
        parts = {
            "policy_loss": token.surrogate.loss, "kl_loss": token.kl, "loss": token.total,
            "approxkl": log_ratio.square() / 2, "policykl": -log_ratio,
            "clipfrac": token.surrogate.clipped, "entropy": token.new.entropy,
            "gap": gap, "gap_sq": gap.square(),
            "k3": kl_k3(micro.old_logprobs, token.new.logprobs),
        }
        if token.value is None:  # then both ends of the clip are told apart
            clipped = token.surrogate.clipped
            parts |= {"clip_low": clipped & (gap < 0), "clip_high": clipped & (gap > 0)}
        else:
            error = token.new.values - micro.returns
            parts |= {
                "value_loss": token.value.loss, "value_clipfrac": token.value.clipped,
                "vpred": token.new.values, "value_error": error.square(),
            }
        for name, x in parts.items():
            self.sums[name] = self.sums.get(name, 0) + masked_sum(x.detach(), mask)
        self.passed.append(micro)
        self.losses.append(loss.detach())
        self.gaps.append(torch.where(mask, gap, 0).abs().max())

    def check_finite(self, where: str) -> None:
        """Raises NonFinite where a micro-batch's loss is not finite, naming its rows."""
        for micro, loss in zip(self.mini_batch, torch.stack(self.losses).tolist(), strict=True):
            rows = ", ".join(map(str, micro.rows.tolist()[:8]))
            check_finite(f"{where} (rollout rows {rows})", {"loss": loss})

    @property
    def ratio(self) -> float:
        """Mean over the tokens."""
        return 1 + float(self.sums["gap"]) / self.tokens

    @property
    def largest_gap(self) -> float:
        """The largest |ratio - 1|."""
        return float(torch.stack(self.gaps).max())


def moved_too_far(updates: list[MiniBatchStats], limit: float | None) -> bool:
    """Whether the mean KL (k3, nats a token) from the policy that sampled to the one that is
    trained is above the limit, over the updates of an epoch."""
    if limit is None or not updates:
        return False
    k3 = float(sum(seen.sums["k3"] for seen in updates)) / sum(seen.tokens for seen in updates)
    return k3 > limit


def summarise_updates(
    updates: list[MiniBatchStats], rollout: RolloutBuffer, kl_estimator: str | None, kl_coef: float,
    epochs: int, ptx_coef: float,
) -> PPOStats:
    """Token means over all updates, and what the rollout itself says."""
    total = sum(seen.tokens for seen in updates)
    mean = {k: float(sum(seen.sums[k] for seen in updates)) / total for k in updates[0].sums}
    gap, gap_sq = mean.pop("gap"), mean.pop("gap_sq")  # squares around 1 keep small variances
    mean.pop("k3")
    ptx_loss = sum(seen.ptx_loss for seen in updates) / len(updates)
    mean["loss"] += ptx_coef * ptx_loss
    returns, old_values = rollout.flat("returns"), rollout.flat("old_values")
    spread = float(returns.var(correction=0))
    unexplained = float((returns - old_values).var(correction=0))
    kl = sum(
        float(masked_sum(penalised_kl(micro, kl_estimator), micro.response_mask))
        for micro in rollout.micro_batches
    )
    return PPOStats(
        **mean, ptx_loss=ptx_loss, ratio=1 + gap, ratio_var=max(gap_sq - gap**2, 0.0),
        grad_norm=sum(seen.grad_norm for seen in updates) / len(updates),
        critic_grad_norm=sum(seen.critic_grad_norm for seen in updates) / len(updates),
        explained_variance=1 - unexplained / spread if spread > 0 else 0.0,
        non_score_reward=-kl_coef * kl / len(rollout),
        first_ratio_gap=updates[0].largest_gap, epochs=epochs,
    )
