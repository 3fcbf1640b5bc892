"""`minirlhf VERB …`: one table of verbs; a verb's module is imported once its flags are right."""

import importlib
import os
import shutil
import sys
import textwrap
from typing import NamedTuple

from minirlhf import __version__, console
from minirlhf.errors import OK, UserError, run
from minirlhf.run import flags
from minirlhf.run.settings import nearest


class Verb(NamedTuple):
    module: str  # has a main(argv) -> exit code; where it runs verbs, main(argv, VERBS)
    settings: str  # module:class of its config; "" where main reads its words itself
    what: str  # it does
    runs_verbs: bool = False  # or tells of them

    def config(self) -> type:
        """The class of its settings."""
        module, _, name = self.settings.partition(":")
        return getattr(importlib.import_module(module), name)

    def run(self, words: list[str]) -> int:
        """Does it; returns the exit code."""
        main = importlib.import_module(self.module).main
        return main(words, VERBS) if self.runs_verbs else main(words)


VERBS = {
    "sft": Verb("minirlhf.recipes.sft", "minirlhf.setup.sft_settings:SFTConfig",
                "fine-tune a language model on demonstrations"),
    "reward": Verb("minirlhf.recipes.reward", "minirlhf.setup.reward_settings:RewardConfig",
                   "train a reward model on pairs or ranked lists"),
    "ppo": Verb("minirlhf.recipes.ppo", "minirlhf.setup.ppo_settings:PPOConfig",
                "align a policy with a reward by PPO"),
    "grpo": Verb("minirlhf.recipes.grpo", "minirlhf.setup.grpo_settings:GRPOConfig",
                 "align a policy by comparing responses, without a critic"),
    "dpo": Verb("minirlhf.recipes.dpo", "minirlhf.setup.dpo_settings:DPOConfig",
                "align a policy with preferences directly: DPO and its family"),
    "distill": Verb("minirlhf.recipes.distill", "minirlhf.setup.distill_settings:DistillConfig",
                    "train a student by a teacher, on the student's own responses"),
    "check": Verb("minirlhf.tools.check.command", "minirlhf.tools.settings:CheckConfig",
                  "look at data as a recipe reads it, before training"),
    "report": Verb("minirlhf.tools.report.command", "minirlhf.tools.report.settings:ReportConfig",
                   "show runs on one page: curves, texts, tokens, alarms"),
    "explain": Verb("minirlhf.tools.explain.command",
                    "minirlhf.tools.explain.settings:ExplainConfig",
                    "show one sample of one step with all its numbers and equations"),
    "learn": Verb("minirlhf.tools.learn.command", "minirlhf.tools.learn.settings:LearnConfig",
                  "show twelve exercises, and what each teaches"),
    "selftest": Verb("minirlhf.tools.selftest.command",
                     "minirlhf.tools.selftest.settings:SelftestConfig",
                     "tell whether this device computes as a CPU does"),
    "metrics": Verb("minirlhf.tools.metrics", "minirlhf.tools.settings:MetricsConfig",
                    "tell what each number in the log means"),
    "coming-from": Verb("minirlhf.tools.coming_from", "",
                        "tell where another tool's parameters went"),
    "sample": Verb("minirlhf.tools.sample", "minirlhf.tools.sampling_settings:SampleConfig",
                   "write continuations of prompts, as JSON lines"),
    "chat": Verb("minirlhf.tools.chat.command", "minirlhf.tools.sampling_settings:ChatConfig",
                 "talk with a model in the terminal, or with two side by side"),
    "best-of": Verb("minirlhf.tools.best_of", "minirlhf.tools.sampling_settings:BestOfConfig",
                    "write the best of several responses, for sft, or pairs, for dpo"),
    "score": Verb("minirlhf.tools.score", "minirlhf.tools.settings:ScoreConfig",
                  "score texts or preferences with a reward model"),
    "serve": Verb("minirlhf.tools.serve", "minirlhf.tools.settings:ServeConfig",
                  "answer requests for scores with a reward model, over HTTP"),
    "tasks": Verb("minirlhf.tools.tasks", "minirlhf.tools.settings:TasksConfig",
                  "write problems with exact answers, for rewards by rule"),
    "export": Verb("minirlhf.tools.export", "minirlhf.tools.settings:ExportConfig",
                   "write a checkpoint of a run as a model or an adapter"),
    "rerun": Verb("minirlhf.tools.rerun", "minirlhf.tools.settings:RerunConfig",
                  "repeat a run, or vary it, in a new folder", True),
    "completion": Verb("minirlhf.tools.completion", "minirlhf.tools.settings:CompletionConfig",
                       "print what lets bash, zsh or fish complete its words", True),
    "demo": Verb("minirlhf.tools.demo.command", "minirlhf.tools.settings:DemoConfig",
                 "train, align and measure a tiny model from nothing"),
}

OF_RANKS = ("sft", "reward", "ppo", "grpo", "dpo", "distill")  # torchrun may start several of each
GROUPS = {  # heading -> verbs under it
    "train": (*OF_RANKS, "rerun"),
    "look": ("check", "metrics", "report", "explain", "score", "selftest"),
    "use": ("sample", "chat", "best-of", "serve", "export", "tasks"),
    "learn": ("demo", "learn", "coming-from", "completion"),
}


def usage() -> str:
    """The verbs under their headings, in as many columns as the terminal has, at most 80."""
    room = min(shutil.get_terminal_size().columns, 80)
    grouped = {name for names in GROUPS.values() for name in names}
    groups = GROUPS | {"more": tuple(name for name in VERBS if name not in grouped)}
    lines = ["usage: minirlhf VERB [settings]", "",
             "RLHF of language models from scratch in pure PyTorch."]
    for heading, names in groups.items():
        there = [f"  {name:<12} {VERBS[name].what}" for name in names if name in VERBS]
        lines += ["", f"{heading}:", *there] if there else []
    lines += ["", "minirlhf VERB --help lists the settings of a verb.",
              "minirlhf --version tells the version."]
    return "\n".join(textwrap.fill(line, room, subsequent_indent=" " * 15 * line.startswith(" "))
                     for line in lines)


def _start_one_of_many(name: str, words: list[str]) -> None:
    """Refuses a verb that is one process; of the others, rank 0 says what is wrong with words."""
    if os.environ.get("RANK", "0") != "0" and "--verbose" not in words:
        console.mute()
    if name not in OF_RANKS:
        what = f"starts several processes, and {name} is one"
        raise UserError("torchrun", what, f"start it as minirlhf {name}")


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: list[str]) -> int:
    name, *words = argv or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"minirlhf {__version__}")
    elif name in VERBS:
        verb = VERBS[name]
        if os.environ.get("WORLD_SIZE", "1") != "1":
            _start_one_of_many(name, words)
        if verb.settings:  # --help and bad flags need not wait until torch is imported
            flags.parse(verb.config(), words, f"minirlhf {name}", tell=lambda line: None)
        return verb.run(words)
    else:
        advice = nearest(name, (*VERBS, "--help", "--version"), "")
        do = f"{advice}; verbs: {', '.join(VERBS)}".removeprefix("; ")
        raise UserError(f"minirlhf {name}", "no such verb", do)
    return OK
