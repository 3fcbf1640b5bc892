"""The settings of the tools, apart from them, so that --help need not wait for torch."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from minirlhf.errors import printable
from minirlhf.run.display import JsonSettings
from minirlhf.run.glossary import METRICS
from minirlhf.run.language import LANGUAGES
from minirlhf.run.resume import OutSettings
from minirlhf.run.settings import override, setting
from minirlhf.setup.groups import (
    COLDEST,
    BaseSettings,
    DataSettings,
    DeviceSettings,
    LengthSettings,
    MergeSettings,
    MicroBatchSettings,
    ModelSettings,
    ResponseSettings,
    SeedSettings,
    TurnSettings,
)


def check_new(out: str | None, flag: str = "--out") -> list[str]:
    """What is wrong with the path of a new file, before any work is done for it."""
    if out and Path(out).exists():
        return [f"{flag}: {out} is there already: give another"]
    if out and not Path(out).parent.is_dir():
        return [f"{flag}: {Path(out).parent} is no folder"]
    return []


def temperature_problems(temperature: float | None, samples: int = 1) -> list[str]:
    """What is wrong with a temperature that may be 0, for so many responses to a prompt."""
    if temperature and temperature < COLDEST:
        return [f"--temperature {temperature:g}: 0, or at least {COLDEST:g}"]
    if samples > 1 and temperature == 0:
        return [f"--samples {samples} with temperature 0: they would all be one"]
    return []


@dataclass(frozen=True)
class RecipeSettings:
    """Recipe: which one is asked about."""

    recipe: str = setting("ppo", "recipe that is asked about", choices=tuple(METRICS))


@dataclass(frozen=True)
class LanguageSettings:
    """Output: its language."""

    lang: str = setting("en", "language of what is told: English or Chinese", choices=LANGUAGES)


@dataclass(frozen=True)
class LinesSettings(OutSettings):
    """Output: JSON lines."""

    out: str | None = override(
        None, "new file for the JSON lines; none: standard output", metavar="FILE", required=False
    )

    def check(self) -> list[str]:
        return check_new(self.out)


@dataclass(frozen=True)
class CheckConfig(
    ModelSettings, DataSettings, TurnSettings, LengthSettings, ResponseSettings, RecipeSettings,
    JsonSettings,
):
    """Look at data as a recipe will read it."""

    FIRST_WORDS: ClassVar = "data"

    model: str | None = override(
        None, "model or reward model; none: only what needs no tokenizer", required=False
    )
    json: str | None = override(None, "new file for the same facts as JSON", metavar="FILE")
    data: tuple[str, ...] = override(
        (), "files to look at, the later ones also for what they share with the first; the files "
        "may come first, without this flag"
    )
    bad_rows: str = override(
        help="what happens to malformed rows: error refuses the file, skip shows them and goes on"
    )
    max_length: int | None = override(None, "most tokens in a row; none: the recipe's default")
    overlong: str | None = override(
        None, "what happens to longer rows; none: the recipe's default"
    )
    max_new_tokens: int = override(help="room for the response that ppo needs behind a prompt")
    recipe: str = override(
        "auto", "recipe that will read the files; auto: as their columns say",
        choices=("auto", "reward", "dpo", "sft", "ppo", "grpo", "distill"),
    )

    def check(self) -> list[str]:
        problems = [] if self.data else ["--data: give at least one file"]
        return problems + check_new(self.json, "--json")


TASKS = {  # kind of problems -> its tasks, which take turns
    "arithmetic": ("add", "subtract", "multiply"),
    "words": ("sort", "reverse", "last", "count"),
    "format": ("tags", "boxed", "json", "sentence"),
}


@dataclass(frozen=True)
class TasksConfig(SeedSettings, OutSettings):
    """Write problems with exact answers, for training and held out."""

    FIRST_WORDS: ClassVar = "kind"

    kind: str = setting(
        "", "kind of problems; it may come first, without this flag", choices=tuple(TASKS),
        required=True,
    )
    n: int = setting(2000, "problems in train.jsonl", at_least=1, at_most=10**6)
    held_out: int = setting(
        200, "problems in eval.jsonl, none of which is in train.jsonl", at_least=1, at_most=10**6
    )
    only: tuple[str, ...] = setting(
        (), "tasks of the kind: " + "; ".join(f"{kind}: {', '.join(names)}"
                                             for kind, names in TASKS.items()) + "; none: all",
        metavar="TASK",
    )
    digits: int | None = setting(
        None, "most digits of each number of arithmetic and format; a factor has one; none: 2",
        at_least=1, at_most=8,
    )
    words: int | None = setting(
        None, "words in each list of words; none: 3", at_least=2, at_most=8
    )
    out: str = override("", "new folder, gets train.jsonl and eval.jsonl", metavar="DIR")
    seed: int = override(help="seed of which problems are drawn")

    def check(self) -> list[str]:
        problems = check_new(self.out)
        unknown = [name for name in self.only if name not in TASKS.get(self.kind, ())]
        if unknown and self.kind in TASKS:
            legal = ", ".join(TASKS[self.kind])
            problems.append(f"only: {self.kind} has no {printable(unknown[0], 40)}; it has {legal}")
        if len(set(self.only)) < len(self.only):
            problems.append("only: a task stands twice")
        if self.digits is not None and self.kind == "words":
            problems.append("digits: is for arithmetic and format")
        if self.words is not None and self.kind != "words":
            problems.append("words: is for words")
        return problems


@dataclass(frozen=True)
class ScoreConfig(
    ModelSettings, DataSettings, LengthSettings, MicroBatchSettings, DeviceSettings, LinesSettings
):
    """Score texts or preferences with a reward model."""

    model: str = override(help="reward model: a folder or a hub name")
    data: str = override(
        help="pairs, ranked lists, texts, or prompts with answers, also .gz; the output of "
        "minirlhf sample is such a file"
    )
    bad_rows: str = override(
        help="what happens to malformed rows: error refuses the file, skip leaves them out and "
        "tells how many"
    )
    max_length: int | None = override(
        None, "most tokens in a row; none: the model's context"
    )
    overlong: str = override("error", "what happens to longer rows")


@dataclass(frozen=True)
class ServeConfig(ModelSettings, MicroBatchSettings, DeviceSettings):
    """Answer requests for scores with a reward model."""

    model: str = override(help="reward model: a folder or a hub name")
    host: str = setting("127.0.0.1", "address to listen at")
    port: int = setting(8000, "port to listen at; 0: any free one", at_least=0, at_most=65535)
    token_file: str | None = setting(
        None, "file that holds the bearer token of every legal request; none: all are answered",
        metavar="FILE",
    )


@dataclass(frozen=True)
class StepSettings:
    """Step: which one of a run."""

    step: int | None = setting(None, "of the checkpoint; none: the newest", at_least=0)


@dataclass(frozen=True)
class GivenRunSettings:
    """Run: the one that is asked for."""

    run: str = setting(
        "", "folder of the run; it may come first, without this flag", metavar="FOLDER",
        required=True,
    )


@dataclass(frozen=True)
class ExportConfig(GivenRunSettings, StepSettings, BaseSettings, MergeSettings, OutSettings):
    """Write a checkpoint of a run as a folder that others read."""

    FIRST_WORDS: ClassVar = "run"

    run: str = override(help="folder of the run, or of an adapter to merge")
    merge: bool = override(False, "write the model, adapters merged into its weights")
    adapter: bool = setting(False, "write the adapters alone, as peft reads them")
    best_policy: bool = setting(
        False, "write the policy of the best evaluation, which --keep-best kept"
    )
    base: str | None = override(
        help="folder or hub name of what the adapters were trained on; none: what they name"
    )
    out: str | None = override(
        None, "new folder; none: in the run's, named after the checkpoint", metavar="FOLDER",
        required=False,
    )

    def check(self) -> list[str]:
        both = self.best_policy and self.step is not None
        return [*([] if self.merge != self.adapter else ["give one of --merge and --adapter"]),
                *(["give one of --best-policy and --step"] if both else [])]


@dataclass(frozen=True)
class RerunConfig(GivenRunSettings, OutSettings):
    """Repeat a run with its own settings, or some of them changed, in a new folder."""

    FIRST_WORDS: ClassVar = "run"

    set: tuple[str, ...] = setting(
        (), "settings that are changed, as in learning_rate=1e-5 steps=20", metavar="KEY=VALUE"
    )
    out: str | None = override(
        None, "new folder; none: beside the run, RUN-2, RUN-3, …", metavar="DIR", required=False
    )

    def check(self) -> list[str]:
        there = self.out is not None and Path(self.out).exists()
        return [f"--out: {self.out} is there already: give another"] * there + [
            f"set: got {printable(word, 40)!r}, must be KEY=VALUE" for word in self.set
            if not word.partition("=")[0].strip("-") or "=" not in word
        ]


SHELLS = ("bash", "zsh", "fish")


@dataclass(frozen=True)
class CompletionConfig:
    """Print a script that lets a shell complete verbs, flags, choices and files."""

    FIRST_WORDS: ClassVar = "shell"

    shell: str = setting(
        "", "shell that it is for; it may come first, without this flag", choices=SHELLS,
        required=True,
    )


@dataclass(frozen=True)
class DemoConfig(SeedSettings, OutSettings):
    """RLHF end to end in two minutes, offline."""

    out: str = override("minirlhf-demo", "new folder for data, runs and models", required=False)
    algorithm: str = setting(
        "ppo", "how the model is aligned: dpo needs no reward model, grpo no critic",
        choices=("ppo", "dpo", "grpo"),
    )
    scale: float = setting(1.0, "share of the training steps that is run", above=0, at_most=1)
    seed: int = override(help="seed of the world and of every run")

    @property
    def folder(self) -> Path:
        return Path(self.out)

    @property
    def data(self) -> Path:
        return self.folder / "data"

    def scaled(self, full: int) -> int:
        return max(round(full * self.scale), 2)


@dataclass(frozen=True)
class MetricsConfig(RecipeSettings, LanguageSettings, JsonSettings):
    """Print what each number in metrics.jsonl means."""

    recipe: str = override(help="recipe whose metrics.jsonl is explained")
    json: bool = override(False, "print one JSON object for each metric, instead of a table")
