"""Settings of the recipes that learn from what a policy writes: PPO, GRPO and distillation."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

from minirlhf.rewards.parse import RewardSourceSettings
from minirlhf.run.resume import RunSettings
from minirlhf.run.settings import override, setting
from minirlhf.setup.groups import (
    EvaluationSettings,
    InputSettings,
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
class HeldOutSettings(EvaluationSettings):
    """Evaluation: responses to held-out prompts."""

    eval_prompts: int | None = setting(
        None, "evaluate on the first prompts of each held-out file only, so many; none: on all",
        at_least=2, resume="fixed",
    )

    def check(self) -> list[str]:
        alone = self.eval_prompts and not self.eval_data
        return ["eval_prompts: goes with --eval-data"] if alone else []


@dataclass(frozen=True)
class BestSettings(HeldOutSettings):
    """Evaluation: the best policy of a run."""

    keep_best: bool = setting(
        False, "export the policy of the best evaluation so far to best/", resume="start"
    )

    def check(self) -> list[str]:
        if self.keep_best and not self.eval_data:
            return ["keep_best: goes with --eval-data"]
        if self.keep_best and not self.eval_every:
            return ["keep_best: goes with --eval-every, the policy at the end is in model/"]
        return []


@dataclass(frozen=True)
class RolloutSettings(SamplingSettings):
    """Sampling: how rollouts are made of it."""

    min_new_tokens: int = setting(
        0, "the eos token cannot be sampled before so many tokens", at_least=0, resume="start"
    )
    rollout_batch_size: int = setting(
        256, "most responses that are sampled in parallel", at_least=1
    )
    temperature: float = override(
        help="logits are divided by it before the softmax, in sampling and in every log-prob"
    )

    def check(self) -> list[str]:
        if self.min_new_tokens > self.max_new_tokens:
            return [f"min_new_tokens {self.min_new_tokens} is above max_new_tokens "
                    f"{self.max_new_tokens}: lower one or raise the other"]
        return []


@dataclass(frozen=True)
class SamplerSettings(RolloutSettings):
    """Sampling: by a rounded copy of the policy."""

    rollout_bits: int = setting(
        0, "8: sample from a copy of the policy in int8, on a CPU, and weigh the policy loss for "
        "its rounding (Yao et al. 2025); 0: sample from the policy", choices=(0, 8),
    )
    rollout_weight_cap: float = setting(
        2.0, "largest weight of a token's policy loss with rollout_bits", at_least=1
    )


@dataclass(frozen=True)
class EndSettings:
    """Scores: the rule for truncated responses."""

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

    def check(self) -> list[str]:
        if self.missing_eos == "ramp" and self.missing_eos_penalty == 0:
            return ["missing_eos ramp: missing_eos_penalty is 0, a ramp to nothing; use one above "
                    "0"]
        if self.missing_eos != "ramp" and self.missing_eos_buffer:
            return ["missing_eos_buffer goes with missing_eos ramp"]
        return []


@dataclass(frozen=True)
class UpdateSettings:
    """Updates: the loss of the policy, and how often a rollout is used."""

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

    def check(self) -> list[str]:
        if self.dual_clip is not None and self.dual_clip <= 1 + self.clip_high:
            return [f"dual_clip {self.dual_clip:g}: must be above 1 + clip_high {self.clip_high:g}"]
        return []


@dataclass(frozen=True)
class PassSettings(MemorySettings):
    """Memory and speed: rows side by side."""

    micro_batch_size: int = setting(8, "most rows in one forward pass", at_least=1)


@dataclass(frozen=True)
class PolicyMemorySettings(PassSettings):
    """Memory and speed: models that are not trained."""

    offload_frozen: bool = setting(
        False, "hold reference and reward models in memory only while they are used, and read them "
        "again each time", resume="free",
    )


@dataclass(frozen=True)
class SampleTableSettings(RunSettings):
    """Run: the table of sample responses."""

    sample_every: int = setting(
        10, "steps from one table of sample responses to the next; 0: none", at_least=0
    )
    sample_prompts: int = setting(4, "prompts in the table of samples, always the same", at_least=1)


@dataclass(frozen=True)
class PolicyRunSettings(SampleTableSettings):
    """Run: which rollouts are written."""

    save_rollouts: bool = setting(
        False, "write every rollout to samples.jsonl, with token ids, log-probs and rewards"
    )


@dataclass(frozen=True)
class PromptInputSettings(InputSettings, PromptSettings, HeldOutSettings):
    """What is read where the data are prompts; RolloutSettings go with them."""

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

    @property
    def rollout_rows(self) -> int:
        """Responses in an iteration's rollout."""
        return self.batch_size


@dataclass(frozen=True)
class PolicyInputSettings(
    PromptInputSettings, ReferenceSettings, RewardSourceSettings, BestSettings, SamplerSettings,
    EndSettings,
):
    """What is read and sampled; PolicyTrainingSettings go with them."""

    model: str = override(help="language model to align: a folder or a hub name")
    epochs: int = override(4, "passes over each rollout", at_least=1)
    steps: int = override(
        100, "iterations: each samples a rollout and learns from it", at_least=1
    )
    batch_size: int = override(64, "prompts sampled in an iteration", resume="ask")

    def check(self) -> list[str]:
        problems, buffer, most = [], self.missing_eos_buffer, self.max_new_tokens
        if self.missing_eos == "ramp" and not 1 <= buffer <= most:
            problems.append(f"missing_eos ramp: missing_eos_buffer is {buffer}, must be from 1 to "
                            f"max_new_tokens {most}")
        if self.top_k == 1 or self.min_p == 1:
            name, use = ("top_k", "0, or 2 or more") if self.top_k == 1 else ("min_p", "less")
            problems.append(f"{name} 1: one token is left to draw, whose log-prob is 0 whatever "
                            f"the policy; use {use}")
        return problems


@dataclass(frozen=True)
class PolicyTrainingSettings(PolicyMemorySettings, PolicyRunSettings, TrainingSettings):
    """How the policy learns from it and where the run writes; PolicyInputSettings go with them."""

    learning_rate: float = override(3e-6)
    warmup_steps: int = override(help="iterations over which the learning rate rises to its peak")
    log_every: int = override(1)
    save_every: int | None = override(20)

    def check(self) -> list[str]:
        if self.compile and self.dtype == "bfloat16":
            return ["compile with bfloat16: graphs with and without a gradient round apart, and "
                    "the first ratio is then not 1; leave out one of them"]
        return []


def fitting_batches(config_class: type, given: dict) -> dict[str, int]:
    """micro_batch_size and mini_batches as they fit a rollout that is smaller than their defaults,
    as far as they are not given; {} where all fits."""
    names = "batch_size", "samples_per_prompt", "micro_batch_size", "mini_batches"
    fields = config_class.__dataclass_fields__
    values = [given.get(name, fields[name].default if name in fields else 1) for name in names]
    if not all(type(value) is int and value > 0 for value in values):
        return {}  # refused elsewhere
    prompts, samples, micro, minis = values
    rows, found = prompts * samples, {}
    if micro * minis > rows and "micro_batch_size" not in given:
        found["micro_batch_size"] = micro = max(rows // minis, 1)
    if micro * minis > rows and "mini_batches" not in given and micro <= rows:
        found["mini_batches"] = rows // micro
    return found


def update_problems(config: UpdateSettings) -> Iterator[str]:
    """What is wrong with the number and size of a rollout's updates.

    Args:
        config: has PolicyInputSettings and PolicyTrainingSettings too.
    """
    rows, micro, minis = config.rollout_rows, config.micro_batch_size, config.mini_batches
    if micro * minis > rows:
        samples = rows // config.batch_size  # of each prompt
        legal = [f"batch_size {ceil(micro * minis / samples)}"]
        legal += [f"micro_batch_size {rows // minis}"] if minis <= rows else []
        legal += [f"mini_batches {rows // micro}"] if micro <= rows else []
        of = f" of {samples} responses each, {rows} rows," if samples > 1 else ""
        yield (
            f"batch_size {config.batch_size}{of} is less than {minis} mini_batches of "
            f"micro_batch_size {micro}: use {' or '.join(legal)}"
        )
    if config.epochs == minis == 1:
        acts = {"max_ratio": config.max_ratio, "dual_clip": config.dual_clip}
        for name in (name for name, value in acts.items() if value is not None):
            flag = f"--{name.replace('_', '-')}"
            yield (
                f"{name}: the ratio of the only update is 1; raise epochs or mini_batches (of "
                f"a preset: give {flag} none)"
            )
    if config.early_stop_kl is not None and config.epochs == 1:
        yield "early_stop_kl: there is one epoch, and none after it to leave out"
    elif config.early_stop_kl is not None and config.epochs == 2 and minis == 1:
        yield "early_stop_kl: one mini-batch moves nothing before the last of two epochs"
