"""The settings of the tools that answer prompts: sample, best-of, chat."""

from dataclasses import dataclass
from typing import ClassVar

from minirlhf.rewards.parse import RewardSourceSettings
from minirlhf.run.resume import OutSettings
from minirlhf.run.settings import override, setting
from minirlhf.setup.groups import (
    BatchSettings,
    DataSettings,
    DeviceSettings,
    LengthSettings,
    MicroBatchSettings,
    ModelSettings,
    ReferenceSettings,
    SamplingSettings,
    SeedSettings,
    TemplateSettings,
)
from minirlhf.setup.policy_settings import PromptSettings
from minirlhf.tools.settings import LinesSettings, check_new, temperature_problems


@dataclass(frozen=True)
class AnswerSettings:
    """Sampling: of how many prompts, and how often of each."""

    limit: int | None = setting(
        None, "answer the first prompts of the file only, so many; none: all", at_least=1
    )
    samples: int = setting(1, "responses to each prompt, one after another", at_least=1)


@dataclass(frozen=True)
class OwnSamplingSettings(SamplingSettings):
    """Sampling: as the model's folder wants it, where nothing else is said."""

    temperature: float | None = override(
        None, "logits are divided by it before the softmax; 0: always the most probable token; "
        "none: in a chat what the folder's generation_config.json says, else 0.7; 1 for texts",
        at_least=0,
    )
    top_k: int | None = override(
        None, "sample from the k most probable tokens; 0: from all; none: in a chat what "
        "generation_config.json says, else from all",
    )
    top_p: float | None = override(
        None, "sample from the fewest tokens whose probabilities reach this sum; none: in a chat "
        "what generation_config.json says, else 1",
    )
    repetition_penalty: float = setting(
        1.0, "logits of tokens that are already there are reduced by this factor; 1: off", above=0
    )

    def check(self) -> list[str]:
        return temperature_problems(self.temperature)


@dataclass(frozen=True)
class RawSettings(TemplateSettings):
    """Data: texts that no template touches."""

    raw: bool = setting(
        False, "give the model what is typed as it stands, although it has a chat template"
    )

    def check(self) -> list[str]:
        return ["raw and chat: give one of them"] if self.raw and self.chat else []


@dataclass(frozen=True)
class SampleConfig(
    ModelSettings, DataSettings, RawSettings, LengthSettings, OwnSamplingSettings, AnswerSettings,
    BatchSettings, DeviceSettings, SeedSettings, LinesSettings,
):
    """Write continuations of prompts, as JSON lines."""

    SHOWN_FIRST: ClassVar = (
        "model", "data", "prompt", "raw", "limit", "samples", "max_new_tokens", "temperature",
        "top_k", "top_p", "stop", "batch_size", "seed", "out",
    )

    model: str = override(help="language model: a folder or a hub name")
    data: str | None = override(
        None, "prompts: JSON lines, JSON, CSV, TSV or .txt, also .gz; or Parquet", required=False
    )
    prompt: str | None = setting(
        None, "one prompt, instead of --data: the user's turn, where the model has a chat template",
        verbatim=True,
    )
    raw: bool = override(help="give the model --prompt as it stands, whatever its chat template")
    bad_rows: str = override(
        help="what happens to malformed rows: error refuses the file, skip leaves them out and "
        "tells how many"
    )
    max_length: int | None = override(
        None, "most tokens in a prompt; none: what the context leaves beside the response",
        at_least=1,
    )
    overlong: str = override(
        "error", "what happens to longer prompts",
        choices=("drop", "truncate_prompt_left", "error"),
    )
    stop: tuple[str, ...] = override(
        help="strings that end a response, which is truncated before them"
    )
    batch_size: int = override(help="continuations sampled in parallel")

    def check(self) -> list[str]:
        problems = []
        if (self.data is None) == (self.prompt is None):
            problems.append("give exactly one of --data and --prompt")
        if self.raw and self.data is not None:
            problems.append("raw: is for --prompt; strings in a file stay as they are")
        if self.samples > 1 and self.temperature == 0:
            problems += temperature_problems(0, self.samples)
        return problems


@dataclass(frozen=True)
class BestOfConfig(
    ModelSettings, DataSettings, PromptSettings, RewardSourceSettings, SamplingSettings,
    AnswerSettings, BatchSettings, MicroBatchSettings, DeviceSettings, SeedSettings, OutSettings,
):
    """Write the best of several responses to each prompt, for SFT, or the best and the worst."""

    SHOWN_FIRST: ClassVar = (
        "model", "data", "reward", "samples", "pairs", "threshold", "best", "limit",
        "max_new_tokens", "temperature", "stop", "batch_size", "seed", "out",
    )

    model: str = override(help="language model: a folder or a hub name")
    data: str = override(help="prompts: JSON lines, JSON, CSV, TSV or .txt, also .gz; or Parquet")
    samples: int = override(8)
    pairs: bool = setting(False, "write the best response as chosen, the worst as rejected")
    threshold: float | None = setting(
        None, "write only responses of at least this score; of pairs, the rejected one is below it"
    )
    best: int = setting(
        1, "most responses to one prompt that are written, the best first; needs --threshold",
        at_least=1,
    )
    bad_rows: str = override(
        help="what happens to malformed rows: error refuses the file, skip leaves them out and "
        "tells how many"
    )
    overlong: str = override(
        "error", "what happens to longer prompts", choices=("drop", "error"),
    )
    temperature: float = override(
        help="logits are divided by it before the softmax; 0: always the most probable token",
        at_least=0,
    )
    batch_size: int = override(help="responses sampled in parallel")
    out: str = override("", "new file for the JSON lines", metavar="FILE")

    def check(self) -> list[str]:
        problems = check_new(self.out) + temperature_problems(self.temperature, self.samples)
        if self.samples == 1 and (self.pairs or self.threshold is None):
            problems.append("samples 1: nothing to compare; give --threshold, and no --pairs")
        if self.best > 1 and self.threshold is None:
            problems.append("best: goes with --threshold")
        if self.best > 1 and self.pairs:
            problems.append("best: a prompt gives one pair")
        return problems


HEATS = ("reward", "value", "kl", "advantage", "logprob")


@dataclass(frozen=True)
class ChatConfig(
    ModelSettings, ReferenceSettings, RewardSourceSettings, RawSettings, OwnSamplingSettings,
    MicroBatchSettings, DeviceSettings, SeedSettings,
):
    """Talk with a model in the terminal, or with two side by side."""

    FIRST_WORDS: ClassVar = "model"
    SHOWN_FIRST: ClassVar = (
        "model", "reward", "heat", "ref", "system", "raw", "max_new_tokens", "temperature",
        "top_k", "top_p", "stop", "seed",
    )

    model: tuple[str, ...] = override(
        (), "one or two: a folder, a hub name or the folder of a run; they may come first, without "
        "this flag", required=True,
    )
    ref: str | None = override(
        help="reference of --heat kl and advantage; none: that of the run, or its start model"
    )
    reward: tuple[str, ...] = override(
        help="scores each answer: reward-model folder, file.py:function, http://host:port/path or "
        "a rule; none: no score, and for --heat the reward models of the run", required=False,
    )
    raw: bool = override(help="complete what is typed as it stands, whatever the chat template")
    max_new_tokens: int = override(256, "most tokens in an answer")
    heat: str | None = setting(
        None, "colour each token by its reward (the score of the text up to it, minus that up to "
        "the one before), value (of the critic, before the token), kl (log pi - log pi_ref), "
        "advantage (GAE of this answer, not whitened) or logprob; without colours the numbers are "
        "listed", choices=HEATS,
    )
    system: str | None = setting(None, "what the model is told before all turns", metavar="TEXT")

    def check(self) -> list[str]:
        problems = [] if len(self.model) in (1, 2) else ["model: give one or two"]
        if self.template_kwargs and self.raw:
            problems.append("template_kwargs and raw: no template is asked; give one of them")
        return problems
