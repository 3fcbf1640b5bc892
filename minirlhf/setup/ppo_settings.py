"""The settings of PPO, and what they refuse together."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minirlhf.rewards.parse import RewardSourceSettings, parse_source
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import override, setting
from minirlhf.setup.groups import (
    EvaluationSettings,
    InputSettings,
    KLSettings,
    MemorySettings,
    ReferenceSettings,
    SamplingSettings,
    TrainingSettings,
)


@dataclass(frozen=True)
class PromptSettings:
    """Data: the prompts."""

    max_prompt_length: int | None = setting(
        None, "most tokens in a prompt; none: what the context leaves beside the response",
        at_least=1, resume="start",
    )


@dataclass(frozen=True)
class PolicyEvaluationSettings(EvaluationSettings):
    """Evaluation: the policy's responses to held-out prompts."""

    eval_prompts: int | None = setting(
        None, "evaluate on the first prompts of each held-out file only, so many; none: on all",
        at_least=2, resume="fixed",
    )
    keep_best: bool = setting(
        False, "export the policy of the best evaluation so far to best/", resume="start"
    )

    def check(self) -> list[str]:
        if self.eval_data:
            late = "keep_best: goes with --eval-every, the policy at the end is in model/"
            return [late] if self.keep_best and not self.eval_every else []
        given = {"eval_prompts": self.eval_prompts, "keep_best": self.keep_best}
        return [f"{name}: goes with --eval-data" for name, value in given.items() if value]


@dataclass(frozen=True)
class PPOModelSettings(ReferenceSettings):
    """Model: the critic."""

    critic: str | None = setting(
        None, "reward model that a separate critic starts from; none: the critic is a value head "
        "on the policy's trunk", metavar="FOLDER", resume="fixed",
    )
    train_critic: bool = setting(True, "train a separate critic", resume="fixed")


@dataclass(frozen=True)
class RolloutSettings(SamplingSettings):
    """Sampling: how rollouts are made of it."""

    min_new_tokens: int = setting(
        0, "the eos token cannot be sampled before so many tokens", at_least=0, resume="start"
    )
    rollout_batch_size: int = setting(
        256, "most responses that are sampled in parallel", at_least=1
    )

    def check(self) -> list[str]:
        problems = []
        if self.top_k == 1 or self.min_p == 1:
            name, use = ("top_k", "0, or 2 or more") if self.top_k == 1 else ("min_p", "less")
            problems.append(f"{name} 1: one token is left to draw, whose log-prob is 0 whatever "
                            f"the policy; use {use}")
        if self.min_new_tokens > self.max_new_tokens:
            problems.append(f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                            f"{self.max_new_tokens}: lower one or raise the other")
        return problems


@dataclass(frozen=True)
class ScoreSettings:
    """Scores: what becomes of a score before the policy learns from it."""

    missing_eos: str = setting(
        "subtract", "rule for a response that the length limit truncated: subtract "
        "missing_eos_penalty from its score, replace the score by minus the penalty, or let the "
        "penalty ramp up over the last tokens before the limit, whether or not it is reached",
        choices=("subtract", "replace", "ramp"),
    )
    missing_eos_penalty: float = setting(
        0.0, "penalty of the missing_eos rule, in units of the score", at_least=0
    )
    missing_eos_buffer: int = setting(
        0, "tokens before the limit over which missing_eos ramp grows", at_least=0
    )
    score_scaling: str = setting(
        "none", "divide scores by their running std (scale), after subtracting their running mean "
        "(normalize)", choices=("none", "scale", "normalize"),
    )
    score_clip: float | None = setting(
        None, "clip scores, after scaling, to plus or minus this; none: no clipping", above=0
    )

    def check(self) -> list[str]:
        if self.missing_eos == "ramp" and self.missing_eos_penalty == 0:
            return ["missing_eos ramp: missing_eos_penalty is 0, a ramp to nothing; use one above "
                    "0"]
        if self.missing_eos != "ramp" and self.missing_eos_buffer:
            return ["missing_eos_buffer goes with missing_eos ramp"]
        return []


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
class UpdateSettings:
    """PPO: the loss and how often a rollout is used (Schulman et al. 2017, arXiv:1707.06347)."""

    mini_batches: int = setting(
        1, "mini-batches that a rollout is split into, one optimizer step each", at_least=1
    )
    clip_low: float = setting(
        0.2, "the policy ratio is clipped below at 1 minus this", at_least=0, at_most=1
    )
    clip_high: float = setting(0.2, "the policy ratio is clipped above at 1 plus this", at_least=0)
    dual_clip: float | None = setting(
        None, "bound on the policy ratio where the advantage is negative; none: no bound", above=1
    )
    max_ratio: float | None = setting(
        None, "skip and count an update whose mean policy ratio is above this; none: no limit",
        above=1,
    )
    early_stop_kl: float | None = setting(
        None, "skip the remaining epochs of a rollout after one whose mean KL (k3) from the policy "
        "that sampled is above this, in nats per token; none: no limit", above=0,
    )
    entropy_coef: float = setting(0.0, "weight of the entropy bonus, per nat", at_least=0)
    vf_coef: float = setting(0.1, "weight of the value loss", at_least=0)
    value_clip: float | None = setting(
        0.2, "values are clipped to within this of the values at sampling; none: no clipping",
        above=0,
    )

    def check(self) -> list[str]:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            return [f"dual_clip {self.dual_clip:g}: must be above 1 + clip_high {self.clip_high:g}"]
        return []


@dataclass(frozen=True)
class CriticSettings:
    """Optimizer: the critic."""

    critic_learning_rate: float | None = setting(
        None, "peak learning rate of the critic; none: learning_rate, and ten times it for a value "
        "head, which starts from zero", above=0,
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
class PPOMemorySettings(MemorySettings):
    """Memory and speed: what PPO adds."""

    micro_batch_size: int = setting(8, "most rows in one forward pass", at_least=1)
    offload_frozen: bool = setting(
        False, "hold reference and reward models in memory only while they are used, and read them "
        "again each time", resume="free",
    )


@dataclass(frozen=True)
class PPORunSettings(RunSettings):
    """Run: what PPO writes besides."""

    sample_every: int = setting(
        10, "steps from one table of sample responses to the next; 0: none", at_least=0
    )
    sample_prompts: int = setting(4, "prompts in the table of samples, always the same", at_least=1)
    save_rollouts: bool = setting(
        False, "write every rollout to samples.jsonl, with token ids, log-probs and rewards"
    )


@dataclass(frozen=True)
class PPOConfig(
    InputSettings, PPOModelSettings, PromptSettings, RewardSourceSettings, PolicyEvaluationSettings,
    RolloutSettings, KLSettings, ScoreSettings, AdvantageSettings, UpdateSettings, CriticSettings,
    MixSettings, PPOMemorySettings, PPORunSettings, TrainingSettings,
):
    """Align a language model with PPO against a reward."""

    PRESETS: ClassVar = Path(__file__).parent / "presets"
    SHOWN_FIRST: ClassVar = (
        "model", "data", "reward", "eval_data", "eval_every", "steps", "batch_size",
        "max_new_tokens", "kl_coef", "learning_rate", "lora_rank", "seed", "out", "resume",
    )

    model: str = override(help="language model to align: a folder or a hub name")
    data: str = override(help="prompts: JSON lines, JSON, CSV, TSV or .txt, also .gz; or Parquet")
    overlong: str = override(
        "error", "what happens to prompts that are longer than max_prompt_length",
        choices=("error", "drop", "truncate_prompt_left"),
    )
    eval_data: tuple[str, ...] = override(
        help="files of held-out prompts; of several, name each: NAME=FILE", resume="fixed"
    )
    eval_every: int = override(
        help="steps from one evaluation to the next; 0: evaluate at the start and the end only"
    )
    epochs: int = override(4, "passes over each rollout", at_least=1)
    steps: int = override(
        100, "iterations: each samples a rollout and learns from it", at_least=1
    )
    batch_size: int = override(64, "prompts sampled in an iteration", resume="ask")
    temperature: float = override(
        help="logits are divided by it before the softmax, in sampling and in every log-prob"
    )
    learning_rate: float = override(3e-6)
    warmup_steps: int = override(help="iterations over which the learning rate rises to its peak")
    adam_epsilon: float = override(1e-5)
    log_every: int = override(1)
    save_every: int = override(20)

    def remembers(self, name: str) -> bool:
        """Whether a run's state holds what came of a setting at the start: scores that evaluations
        compare with, a KL coefficient that a target has moved."""
        return self.kl_target is not None if name == "kl_coef" else bool(self.eval_data)

    def check(self) -> list[str]:
        return [*self._size_problems(), *self._kl_problems(), *self._critic_problems(),
                *self._score_problems()]

    def _size_problems(self) -> Iterator[str]:
        rows, micro, minis = self.batch_size, self.micro_batch_size, self.mini_batches
        if micro * minis > rows:
            legal = [f"batch_size {micro * minis}"]
            legal += [f"micro_batch_size {rows // minis}"] if minis <= rows else []
            legal += [f"mini_batches {rows // micro}"] if micro <= rows else []
            yield (
                f"batch_size {rows} is less than {minis} mini_batches of micro_batch_size {micro}: "
                f"use {' or '.join(legal)}"
            )
        if self.epochs == self.mini_batches == 1:
            acts = {"max_ratio": self.max_ratio, "dual_clip": self.dual_clip}
            for name in (name for name, value in acts.items() if value is not None):
                flag = f"--{name.replace('_', '-')}"
                yield (
                    f"{name}: the ratio of the only update is 1; raise epochs or mini_batches (of "
                    f"a preset: give {flag} none)"
                )
        if self.early_stop_kl is not None and self.epochs == 1:
            yield "early_stop_kl: there is one epoch, and none after it to leave out"
        elif self.early_stop_kl is not None and self.epochs == 2 and self.mini_batches == 1:
            yield "early_stop_kl: one mini-batch moves nothing before the last of two epochs"
        if self.critic_warmup_steps >= self.steps:
            yield (
                f"critic_warmup_steps {self.critic_warmup_steps}: the policy would never learn, "
                f"there are {self.steps} steps"
            )
        if self.compile and self.dtype == "bfloat16":
            yield (
                "compile with bfloat16: graphs with and without a gradient round apart, and the "
                "first ratio is then not 1; leave out one of them"
            )

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

    def _score_problems(self) -> Iterator[str]:
        if self.missing_eos == "ramp" and not 1 <= self.missing_eos_buffer <= self.max_new_tokens:
            yield (
                f"missing_eos ramp: missing_eos_buffer is {self.missing_eos_buffer}, must be from "
                f"1 to max_new_tokens {self.max_new_tokens}"
            )
        eos_rule = self.missing_eos_penalty > 0 or self.missing_eos != "subtract"
        if self.bootstrap_truncated and eos_rule:
            yield (
                "bootstrap_truncated: a truncated response then has no score that a missing_eos "
                "rule could change; leave out one of them"
            )
