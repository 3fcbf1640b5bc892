"""The settings of GRPO and its relatives, and what they refuse together."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minirlhf.run.settings import override, setting
from minirlhf.setup.groups import KLSettings
from minirlhf.setup.policy_settings import (
    PolicyInputSettings,
    PolicyTrainingSettings,
    UpdateSettings,
    fitting_batches,
    update_problems,
)


@dataclass(frozen=True)
class GroupSettings:
    """Steps and batches: several responses to a prompt."""

    samples_per_prompt: int = setting(
        8, "responses to each prompt: a group, whose scores are compared", at_least=1
    )
    resample: int = setting(
        0, "most times in an iteration that groups whose scores all agree give way to those of the "
        "next prompts (DAPO, arXiv:2503.14476); what agrees after the last is kept, and counted",
        at_least=0,
    )


@dataclass(frozen=True)
class GroupAdvantageSettings:
    """Advantages: from the scores of a group."""

    advantage: str = setting(
        "grpo", "the score minus the group's mean, divided by the std of the group (grpo), of all "
        "scores (lite_ppo) or by nothing (dr_grpo); minus the mean of the others (rloo); or, of "
        "each token, its reward and those after it, standardized over the rollout (reinforce++)",
        choices=("grpo", "dr_grpo", "lite_ppo", "rloo", "reinforce++"),
    )


@dataclass(frozen=True)
class GroupLossSettings:
    """Updates: which loss, and what it is a mean over."""

    policy_loss: str = setting(
        "clip", "clip: a ratio a token, clipped as in PPO; gspo: one a response, where clips are "
        "as small as 3e-4; cispo: log-probs weighed by clipped ratios",
        choices=("clip", "gspo", "cispo"),
    )
    loss_mean: str = setting(
        "token", "what weighs the same in an optimizer step: each token (token, as DAPO has it), "
        "each response (sequence, as GRPO), or each token at 1 / max_new_tokens of a response, "
        "whatever its length (fixed, as Dr. GRPO)", choices=("token", "sequence", "fixed"),
    )
    mask_truncated: bool = setting(
        False, "responses that the length limit cut take no part in the loss, only in what their "
        "group is compared with (overlong filtering, DAPO, arXiv:2503.14476, sec. 3.4)",
    )


@dataclass(frozen=True)
class GRPOConfig(
    PolicyInputSettings, GroupSettings, KLSettings, GroupAdvantageSettings, UpdateSettings,
    GroupLossSettings, PolicyTrainingSettings,
):
    """Align a language model with GRPO or its relatives against a reward, without a critic."""

    PRESETS: ClassVar = Path(__file__).parent / "presets/grpo"
    SHOWN_FIRST: ClassVar = (
        "model", "data", "reward", "eval_data", "eval_every", "steps", "batch_size",
        "samples_per_prompt", "max_new_tokens", "kl_coef", "learning_rate", "lora_rank", "seed",
        "out", "resume",
    )

    batch_size: int = override(
        8, "prompts in an iteration; its rollout has batch_size · samples_per_prompt responses"
    )
    epochs: int = override(1)
    mini_batches: int = override(4)
    kl_coef: float = override(
        0.04, "weight of the KL penalty, per nat; 0: none, and no reference unless --ref names one"
    )
    kl_estimator: str = override(
        "k2", "estimator of the KL from the sampled tokens: k2 has the KL's gradient in the loss, "
        "k1 in the reward; k3 in the loss is what the GRPO paper has", choices=("k1", "k2", "k3"),
    )
    kl_in: str = override("loss")
    learning_rate: float = override(1e-6)

    @property
    def rollout_rows(self) -> int:
        return self.batch_size * self.samples_per_prompt

    @classmethod
    def defaults_beside(cls, given: dict) -> dict:
        """The rate of adapters, and batches that fit a small rollout."""
        return super().defaults_beside(given) | fitting_batches(cls, given)

    def remembers(self, name: str) -> bool:
        """Whether a run's state holds what came of a setting at the start: scores that evaluations
        compare with."""
        return bool(self.eval_data) and name != "kl_coef"

    @property
    def refers(self) -> bool:
        """Whether there is a reference."""
        return self.kl_coef > 0 or self.ref is not None

    def check(self) -> list[str]:
        return [*update_problems(self), *self._group_problems()]

    def _group_problems(self) -> Iterator[str]:
        tokens = self.advantage == "reinforce++"
        if self.samples_per_prompt == 1 and not tokens:
            yield (
                f"samples_per_prompt 1 with advantage {self.advantage}: nothing to compare a "
                "response with; use 2 or more, or --advantage reinforce++"
            )
        if self.samples_per_prompt == 1 and self.resample:
            yield "resample: the one score of a group always agrees; raise samples_per_prompt"
        if self.policy_loss == "gspo" and tokens:
            yield (
                "policy_loss gspo with advantage reinforce++: one ratio a response needs one "
                "advantage a response; use another of the two"
            )
        if self.policy_loss == "cispo" and self.dual_clip is not None:
            yield "dual_clip: policy_loss cispo bounds every weight by clip_high; leave it out"
        if self.kl_in == "reward" and self.kl_estimator != "k1" and self.kl_coef:
            yield (
                f"kl_in reward with kl_estimator {self.kl_estimator}: only k1 is there the KL "
                "whose gradient is right; give --kl-estimator k1"
            )
