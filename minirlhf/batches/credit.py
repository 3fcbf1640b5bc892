"""Credit: from the scores of responses to an advantage and a return for each of their tokens.

    rewards     -kl_coef KL(policy || reference) a token, + the score at the last token
    advantages  GAE over the rewards and the critic's values (arXiv:1506.02438)
"""

from typing import Protocol

import torch

from minirlhf.batches.rollouts import Rollout, RolloutBuffer, penalised_kl
from minirlhf.equations.advantages import gae, token_rewards
from minirlhf.equations.masking import masked_rescale, masked_standardize


class CreditSettings(Protocol):
    """The settings that `assign_credit` reads."""

    kl_estimator: str
    kl_in: str
    gamma: float
    lam: float
    whiten_rewards: bool
    whiten_advantages: bool
    bootstrap_truncated: bool


def reward_kl(config: CreditSettings) -> str | None:
    """Estimator of the KL penalty in the rewards; None where the penalty is a loss."""
    return config.kl_estimator if config.kl_in == "reward" else None


def assign_credit(buffer: RolloutBuffer, config: CreditSettings, kl_coef: float) -> None:
    """Fills rewards (KL penalty and score), advantages and returns (GAE)."""
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
