"""Credit: from the scores of responses to an advantage and a return for each of their tokens.

    rewards     -kl_coef KL(policy || reference) a token, + the score at the last token
    advantages  GAE over the rewards and the critic's values (arXiv:1506.02438), or without a critic
                from the scores of a prompt's responses
"""

from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from minirlhf.batches.rollouts import Rollout, RolloutBuffer, penalised_kl
from minirlhf.equations.advantages import gae, token_rewards
from minirlhf.equations.critic_free import (
    batch_scaled_advantages,
    group_advantages,
    leave_one_out_advantages,
    rewards_to_go,
)
from minirlhf.equations.masking import masked_rescale, masked_standardize, masked_sum
from minirlhf.equations.policy import truncated_weights


class CreditSettings(Protocol):
    """The settings that `assign_credit` reads."""

    kl_estimator: str
    kl_in: str
    gamma: float
    lam: float
    whiten_rewards: bool
    whiten_advantages: bool
    bootstrap_truncated: bool
    rollout_bits: int
    rollout_weight_cap: float


class KLInReward(Protocol):
    """Where the KL penalty is."""

    kl_estimator: str
    kl_in: str


def reward_kl(config: KLInReward) -> str | None:
    """Estimator of the KL penalty in the rewards; None where the penalty is a loss."""
    return config.kl_estimator if config.kl_in == "reward" else None


def assign_credit(buffer: RolloutBuffer, config: CreditSettings, kl_coef: float) -> None:
    """Fills rewards (KL penalty and score), advantages and returns (GAE); and weights, which the
    advantages are then multiplied by, where the policy that sampled is a rounded copy."""
    bootstraps = config.bootstrap_truncated

    def reward_tokens(micro: Rollout) -> Rollout:
        kl, scores = penalised_kl(micro, reward_kl(config)), micro.scores
        if bootstraps:
            scores = torch.where(micro.truncated, 0, scores)
        rewards = token_rewards(scores, kl, micro.response_mask, kl_coef)
        given = micro.given_rewards
        return micro._replace(rewards=rewards if given is None else rewards + given)

    def credit(micro: Rollout) -> Rollout:
        end = torch.where(micro.truncated, micro.last_values, 0) if bootstraps else None
        mask = micro.response_mask
        out = gae(micro.rewards, micro.old_values, mask, config.gamma, config.lam, end)
        return micro._replace(advantages=out.advantages, returns=out.returns)

    buffer.map(reward_tokens)
    if config.whiten_rewards:
        buffer.over_all("rewards", masked_rescale)
    buffer.map(credit)
    if config.whiten_advantages:
        buffer.over_all("advantages", masked_standardize)
    if config.rollout_bits:
        buffer.map(partial(weigh, config.rollout_weight_cap))


def weigh(cap: float, micro: Rollout) -> Rollout:
    """Weighs the advantages of what another policy sampled: every policy loss is proportional to
    them, so this is to weigh its loss."""
    weights = truncated_weights(micro.old_logprobs, micro.sampled_logprobs, cap)
    weights = torch.where(micro.response_mask, weights, 0)
    return micro._replace(weights=weights, advantages=weights * micro.advantages)


# ------------------------------------------------------------------------------- without a critic

OF_GROUPS = {  # (B,) scores and the size of a group -> (B,) advantages
    "grpo": group_advantages,
    "dr_grpo": partial(group_advantages, divide_by_std=False),
    "lite_ppo": batch_scaled_advantages,
    "rloo": leave_one_out_advantages,
}


class GroupCreditSettings(KLInReward, Protocol):
    """The settings that `assign_group_credit` reads."""

    advantage: str
    samples_per_prompt: int
    kl_coef: float
    rollout_bits: int
    rollout_weight_cap: float


def assign_group_credit(
    buffer: RolloutBuffer, scores: Tensor, config: GroupCreditSettings
) -> None:
    """Fills advantages, without a critic, and weights as `assign_credit`.

    Args:
        buffer: measured, its rows with their scores.
        scores: (B,) all reward of each response, in the order of the batch, groups adjacent.
    """
    fill_group_advantages(buffer, scores, config)
    if config.rollout_bits:
        buffer.map(partial(weigh, config.rollout_weight_cap))


def fill_group_advantages(
    buffer: RolloutBuffer, scores: Tensor, config: GroupCreditSettings
) -> None:
    estimator = reward_kl(config) if config.kl_coef else None
    if config.advantage == "reinforce++":
        def to_go(micro: Rollout) -> Rollout:
            kl, mask = penalised_kl(micro, estimator), micro.response_mask
            rewards = token_rewards(micro.scores, kl, mask, config.kl_coef)
            if micro.given_rewards is not None:
                rewards = rewards + micro.given_rewards
            return micro._replace(rewards=rewards, advantages=rewards_to_go(rewards, mask))

        buffer.map(to_go)
        buffer.over_all("advantages", masked_standardize)
        return
    if estimator is not None:
        kl = torch.zeros_like(scores)
        for micro in buffer.micro_batches:
            of_rows = masked_sum(penalised_kl(micro, estimator), micro.response_mask, dim=1)
            kl[micro.rows.cpu()] = of_rows.cpu()
        scores = scores - config.kl_coef * kl
    advantages = OF_GROUPS[config.advantage](scores, config.samples_per_prompt)  # (B,)
    buffer.map(partial(spread, advantages))


def spread(advantages: Tensor, micro: Rollout) -> Rollout:
    """Gives each token the advantage of its response; advantages: (B,) of the whole batch."""
    of_rows = advantages.to(micro.rows.device)[micro.rows]  # (b,)
    return micro._replace(advantages=torch.where(micro.response_mask, of_rows[:, None], 0))
