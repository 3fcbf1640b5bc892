"""What a run tells people while it goes on: a few lines before the first step, a row a step.

`--verbose` tells all facts, `--quiet` only what is unusual, `--json` everything, as JSON lines for
programs. The run's files hold all of it whatever is told here.
"""

import json
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from minirlhf import console
from minirlhf.files.sieve import Report
from minirlhf.run import terminal
from minirlhf.run.settings import override, setting

HEADED = 20  # rows under one heading
LABELS = {  # what a person calls a number of metrics.jsonl, where its own last word is another
    "objective/scores": "reward", "objective/kl": "KL", "kl": "KL",
    "loss/policy_avg": "policy loss", "loss/value_avg": "value loss", "response_length": "tokens",
    "policy/clipfrac_avg": "clipped", "clip_ratio/region_mean": "clipped",
    "distinct_2": "distinct-2",
    "completions/mean_length": "tokens", "completions/clipped_ratio": "cut off",
    "mean_token_accuracy": "accuracy", "grad_norm": "grad norm", "rewards/margins": "margin",
    "rewards/accuracies": "accuracy", "calibration_error": "calibration error",
    "forward_kl": "forward KL",
}
BRIEF = {  # facts of the one line that every run tells, in its order
    "prompts": "{} prompts", "examples": "{} examples", "epochs": "{} epochs",
    "epochs over prompts": "{} epochs", "steps": "{} steps",
    "trainable parameters": "{} parameters trained", "learning rate": "learning rate {}",
    "kl_coef": "KL coefficient {}", "seed": "seed {}",
}
MACHINE = {"memory": "memory {}", "device": "{}", "dtype": "{}"}  # of the line below it
# and below it, where there are any
TOLD = ("loss", "advantage", "reward", "teacher", "one set of weights for", "adapters")


@dataclass(frozen=True)
class JsonSettings:
    """Output: as JSON."""

    json: bool = setting(False, "print JSON lines", resume="free")


@dataclass(frozen=True)
class ConsoleSettings(JsonSettings):
    """Output: how much is told, and in which form."""

    verbose: bool = setting(False, "tell all facts of the run before it begins", resume="free")
    quiet: bool = setting(
        False, "tell only what is unusual: warnings, alarms, and what went wrong", resume="free"
    )
    json: bool = override(
        help="tell everything as JSON lines, one object with its event each"
    )

    def check(self) -> list[str]:
        given = [f"--{name}" for name in ("verbose", "quiet", "json") if getattr(self, name)]
        return [f"{' and '.join(given)}: give one of them"] if len(given) > 1 else []


def label(name: str) -> str:
    """What a person calls a metric.

    >>> label("objective/scores"), label("reward_std")
    ('reward', 'reward std')
    """
    return LABELS.get(name) or name.rpartition("/")[2].replace("_", " ")


def number(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


class Display:
    """The console of one run.

    Args:
        settings: how much it tells.
        recipe: which it is of.
    """

    def __init__(self, settings: ConsoleSettings, recipe: str = ""):
        self.settings, self.recipe, self.rows = settings, recipe, 0
        self.told: set[str] = set()
        console.show_bars(not (settings.quiet or settings.json))

    def _event(self, event: str, **values: object) -> None:
        self._write(json.dumps({"event": event, **values}, ensure_ascii=False, default=str))

    def _write(self, text: str) -> None:
        tqdm.write(text, file=sys.stdout)  # above the progress bar
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """What is unusual."""
        if self.settings.json:
            self._event("note", text=text)
        else:
            self._write(terminal.yellow(text) if terminal.has_color() else text)

    def say(self, text: str) -> None:
        """What is as it should be."""
        if self.settings.json:
            self._event("said", text=text)
        elif not self.settings.quiet:
            self._write(text)

    def report(self, report: Report) -> None:
        """What a data file holds, and what of it is left out; what was said of one before it is
        not said again."""
        for at, line in enumerate(str(report).splitlines()):
            if line in self.told:
                continue
            self.told.add(line)
            if line.lstrip().startswith("warning:") or (at and not self.settings.quiet):
                self.note(line)
            else:
                self.say(line)

    def facts(self, facts: Mapping[str, object]) -> None:
        """What is about to happen: two lines and what is unusual, or all of it."""
        if self.settings.json:
            self._event("facts", recipe=self.recipe, **facts)
        elif self.settings.verbose:
            self.table(facts)
        else:
            first, machine = (
                " · ".join(told.format(number(facts[name]).partition(", ")[0])
                           for name, told in some.items() if name in facts)
                for some in (BRIEF, MACHINE)
            )
            for line in (f"{self.recipe}: {first}", machine):
                self.say(f"  {line}")
            for name, value in facts.items():
                if name in TOLD or name.startswith("reward "):  # one of several
                    self.say(f"  {name}: {value}")

    def table(self, facts: Mapping[str, object]) -> None:
        """All facts, one aligned line each."""
        width = max(map(len, facts))
        for name, value in facts.items():
            self.say(f"  {name:<{width}}  {number(value)}")

    def step(self, step: int, metrics: Mapping[str, float], names: Iterable[str]) -> None:
        """A row of the table of steps; metrics that are missing, or that the terminal has no room
        for, have no column."""
        if self.settings.json:
            self._event("step", **metrics)
            return
        told, room = [name for name in names if name in metrics], terminal.columns()
        widths = [max(len(label(name)), 9) + 2 for name in told]
        while room and 6 + sum(widths) > room:
            del told[-1], widths[-1]
        if not told:  # an evaluation has told its own
            return
        if self.rows % HEADED == 0:
            labels = (f"{label(n):>{w}}" for n, w in zip(told, widths, strict=True))
            heading = "  step" + "".join(labels)
            self.say(terminal.bold(heading) if terminal.has_color() else heading)
        self.rows += 1
        self.say(f"{step:>6}" + "".join(
            f"{metrics[name]:>{width}.4g}" for name, width in zip(told, widths, strict=True)))

    def evaluation(
        self, prefix: str, rows: str, metrics: Mapping[str, float], names: Iterable[str]
    ) -> None:
        """What a held-out set says.

        Args:
            prefix: of its metrics.
            rows: how many it has, in words.
        """
        name = prefix.rstrip("/_")
        if self.settings.json:
            self._event("evaluation", set=name, **metrics)
            return
        told = (f"{label(name)} {metrics[name]:.4g}" for name in names if name in metrics)
        self.say(f"  {name}, {rows}: {', '.join(told)}")

    def samples(self, step: int, lines: Iterable[str], rows: list[dict]) -> None:
        """Texts to look at: lines for people, or the rows that they were made of."""
        if self.settings.json:
            self._event("samples", step=step, rows=rows)
            return
        for line in lines:
            self.say(line)

    def done(self, what: str, folder: Path) -> None:
        """What the run has made, and where it is."""
        if self.settings.json:
            self._event("done", what=what, folder=folder)
        else:
            self.say(f"{what} in {folder}")

    def stopped(self, step: int) -> None:
        """After a signal: what is saved, and the command that goes on."""
        from minirlhf import ranks  # with torch, for which --help need not wait

        command = this_command()
        command += "" if "--resume" in sys.argv else " --resume"
        if ranks.count() > 1:
            command = f"torchrun … {command.removeprefix('python ')}"
        if self.settings.json:
            self._event("stopped", step=step, command=command)
        else:
            self._write(f"step {step} is saved; go on with\n  {command}")


def this_command() -> str:
    """The command line of this process, to be typed again."""
    program, *words = sys.argv
    name = Path(program).name
    if name == "__main__.py":
        return shlex.join(["python", "-m", "minirlhf", *words])
    return shlex.join([*(["python", program] if name.endswith(".py") else [name]), *words])
