"""`minirlhf VERB …`: one table of verbs; a verb's module is imported only when it is asked for."""

import importlib
import sys

from minirlhf import __version__
from minirlhf.errors import OK, UserError, run
from minirlhf.run.settings import nearest

VERBS = {  # verb: (module with a main(argv) -> exit code, what it does)
    "sft": ("minirlhf.recipes.sft", "fine-tune a language model on demonstrations"),
    "reward": ("minirlhf.recipes.reward", "train a reward model on pairs or ranked lists"),
    "ppo": ("minirlhf.recipes.ppo", "align a policy with a reward by PPO"),
    "check": ("minirlhf.tools.check.command", "look at data as a recipe reads it, before training"),
    "plan": ("minirlhf.tools.plan", "count the memory of a run, without running it"),
    "metrics": ("minirlhf.tools.metrics", "tell what each number in the log means"),
    "coming-from": ("minirlhf.tools.coming_from", "tell where another tool's parameters went"),
    "sample": ("minirlhf.tools.sample", "write continuations of prompts, as JSON lines"),
    "score": ("minirlhf.tools.score", "score texts or preferences with a reward model"),
    "serve": ("minirlhf.tools.serve", "answer requests for scores with a reward model, over HTTP"),
    "demo": ("minirlhf.tools.demo.command", "train, align and measure a tiny model from nothing"),
}

USAGE = "\n".join(
    [
        "usage: minirlhf VERB [settings]",
        "",
        "RLHF of language models from scratch in pure PyTorch.",
        "",
        *(f"  {verb:<13}{what}" for verb, (_, what) in VERBS.items()),
        "",
        "minirlhf VERB --help lists the settings of a verb; minirlhf --version tells the version.",
    ]
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    return run(lambda: _dispatch(sys.argv[1:] if argv is None else argv))


def _dispatch(argv: list[str]) -> int:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help"):
        print(USAGE)
    elif verb == "--version":
        print(f"minirlhf {__version__}")
    elif verb in VERBS:
        module, _ = VERBS[verb]
        return importlib.import_module(module).main(argv[1:])
    else:
        advice = nearest(verb, (*VERBS, "--help", "--version"))
        raise UserError(f"minirlhf {verb}", "no such verb", f"{advice}; verbs: {', '.join(VERBS)}")
    return OK
