"""The settings of PPO, and what they refuse together."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minirlhf.rewards.parse import parse_source
from minirlhf.run.settings import override, setting
from minirlhf.setup.groups import AdaptiveKLSettings, KLSettings
from minirlhf.setup.policy_settings import (
    EndSettings,
    PolicyInputSettings,
    PolicyTrainingSettings,
    UpdateSettings,
    fitting_batches,
    update_problems,
)


@dataclass(frozen=True)
class PPOModelSettings:
    """Model: the critic."""

    critic: str | None = setting(
        None, "reward model that a separate critic starts from; none: the critic is a value head "
        "on the policy's trunk", metavar="FOLDER", resume="fixed",
    )
    train_critic: bool = setting(True, "train a separate critic", resume="fixed")


@dataclass(frozen=True)
class ScoreSettings(EndSettings):
    """Scores: what becomes of a score before the policy learns from it."""

    score_scaling: str = setting(
        "none", "divide scores by their running std (scale), after subtracting their running mean "
        "(normalize)", choices=("none", "scale", "normalize"),
    )
    score_clip: float | None = setting(
        None, "clip scores, after scaling, to plus or minus this; none: no clipping", above=0
    )


@dataclass(frozen=True)
class AdvantageSettings:
    """Advantages: from rewards to what each token is worth (Schulman et al. 2016, GAE)."""

    gamma: float = setting(1.0, "discount factor, per token", above=0, at_most=1)
    lam: float = setting(0.95, "lambda of GAE", at_least=0, at_most=1)
    whiten_rewards: bool = setting(
        False, "scale the rewards of a rollout to std 1, keeping their mean"
    )
    whiten_advantages: bool = setting(
        True, "shift and scale the advantages of a rollout to mean 0 and std 1"
    )
    bootstrap_truncated: bool = setting(
        False, "give a truncated response the critic's value of its end in place of its score"
    )


@dataclass(frozen=True)
class ValueLossSettings:
    """Updates: the loss of the critic."""

    vf_coef: float = setting(0.1, "weight of the value loss", at_least=0)
    value_clip: float | None = setting(
        0.2, "values are clipped to within this of the values at sampling; none: no clipping",
        above=0,
    )


@dataclass(frozen=True)
class CriticSettings:
    """Optimizer: the critic."""

    critic_learning_rate: float | None = setting(
        None, "peak learning rate of the critic; none: learning_rate, and ten times it for a value "
        "head, which starts from zero, beside weights that are all trained", above=0,
    )
    critic_warmup_steps: int = setting(
        0, "first iterations in which the critic alone is trained", at_least=0
    )


@dataclass(frozen=True)
class MixSettings:
    """Mixed-in texts: a language-model loss beside PPO's (Ouyang et al. 2022, PPO-ptx)."""

    ptx_data: str | None = setting(
        None, "texts whose language-model loss is added to each update", metavar="FILE", data=True
    )
    ptx_coef: float = setting(0.0, "weight of the loss on the texts of ptx_data", at_least=0)
    ptx_batch_size: int = setting(16, "texts of ptx_data in an update", at_least=1)

    def check(self) -> list[str]:
        both = (self.ptx_data is None) == (self.ptx_coef == 0)
        return [] if both else ["ptx_data and ptx_coef go together: give both, or neither"]


@dataclass(frozen=True)
class PPOConfig(
    PolicyInputSettings, PPOModelSettings, KLSettings, AdaptiveKLSettings, ScoreSettings,
    AdvantageSettings, UpdateSettings, ValueLossSettings, CriticSettings, MixSettings,
    PolicyTrainingSettings,
):
    """Align a language model with PPO against a reward."""

    PRESETS: ClassVar = Path(__file__).parent / "presets/ppo"
    SHOWN_FIRST: ClassVar = (
        "model", "data", "reward", "eval_data", "eval_every", "steps", "batch_size",
        "max_new_tokens", "kl_coef", "learning_rate", "lora_rank", "seed", "out", "resume",
    )

    adam_epsilon: float = override(1e-5)

    @classmethod
    def defaults_beside(cls, given: dict) -> dict:
        """The rate of adapters, and batches that fit a small rollout."""
        return super().defaults_beside(given) | fitting_batches(cls, given)

    def remembers(self, name: str) -> bool:
        """Whether a run's state holds what came of a setting at the start: scores that evaluations
        compare with, a KL coefficient that a target has moved."""
        return self.kl_target is not None if name == "kl_coef" else bool(self.eval_data)

    def check(self) -> list[str]:
        return [*update_problems(self), *self._kl_problems(),
                *self._critic_problems()]

    def _kl_problems(self) -> Iterator[str]:
        own = self.lora_rank and self.ref is None  # the policy under its adapters is the reference
        if self.offload_frozen and self.kl_in == "loss" and self.kl_estimator == "full" and not own:
            yield "offload_frozen: a full KL in the loss reads the reference in each update"
        if self.kl_target is not None and self.batch_size >= 5 * self.kl_horizon:
            yield (
                f"kl_horizon {self.kl_horizon:g} is too short for batch_size {self.batch_size}: "
                f"kl_coef could fall to 0 in one step; use more than {self.batch_size / 5:g}"
            )

    def _critic_problems(self) -> Iterator[str]:
        if self.critic_warmup_steps >= self.steps:
            yield (
                f"critic_warmup_steps {self.critic_warmup_steps}: the policy would never learn, "
                f"there are {self.steps} steps"
            )
        if self.critic is None and not self.train_critic:
            yield "no-train-critic: goes with --critic, a value head has to learn"
        if not self.train_critic and (self.critic_learning_rate or self.critic_warmup_steps):
            yield (
                "no-train-critic: leave out critic_learning_rate and critic_warmup_steps (of a "
                "preset: give --critic-learning-rate none)"
            )
        rescaled = self.score_scaling != "none" or self.score_clip is not None
        if self.bootstrap_truncated and self.critic and (rescaled or self.whiten_rewards):
            yield (
                "bootstrap_truncated: a critic from a reward model values truncated responses in "
                "that model's scale; leave out score_scaling, score_clip and whiten_rewards"
            )
        weighed = len(self.reward) == 1 and parse_source(self.reward[0]).weight != 1
        if not self.train_critic and (rescaled or weighed or self.whiten_rewards):
            yield (
                "no-train-critic: its values stay in the reward model's scale; leave out "
                "score_scaling, score_clip, whiten_rewards and the reward's weight"
            )
        eos_rule = self.missing_eos_penalty > 0 or self.missing_eos != "subtract"
        if self.bootstrap_truncated and eos_rule:
            yield (
                "bootstrap_truncated: a truncated response then has no score that a missing_eos "
                "rule could change; leave out one of them"
            )
