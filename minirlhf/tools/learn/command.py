"""Exercises in reinforcement learning from human feedback: `minirlhf learn [N]`.

Without a number a list; with one the exercise: what to do, what to look at, what to expect, and
why. With --gradcheck every loss's gradient beside finite differences: it is here, and not a verb of
its own, because who changes a loss in an exercise wants it next.
"""

import sys
import textwrap
import tomllib
from functools import cache
from pathlib import Path

from minirlhf.errors import BUG, OK, run
from minirlhf.run import flags
from minirlhf.tools.learn import gradcheck
from minirlhf.tools.learn.settings import LearnConfig

ROOT = Path(__file__).parents[3]  # of a clone
WIDTH = 96
PROSE = {"do": "Do", "look": "Look at", "expect": "Expect", "why": "Why, once you have tried"}


@cache
def exercises() -> list[dict]:
    text = Path(__file__).with_name("exercises.toml").read_text("utf-8")
    return tomllib.loads(text)["exercise"]


def listing() -> str:
    lines = [f"{n:>3}  {each['title']}" for n, each in enumerate(exercises(), start=1)]
    return "\n".join([
        *lines, "", "minirlhf learn N shows one. The commands use what `minirlhf demo` leaves in "
        "minirlhf-demo;", "lines are changed in a clone of the repository, and `git checkout "
        "minirlhf` undoes them.",
        "After changing a loss: minirlhf learn --gradcheck",
    ])


def page(number: int) -> str:
    """An exercise, in full."""
    each = exercises()[number - 1]
    lines = [f"Exercise {number}: {each['title']}", ""]
    lines += [*prose("do", each), ""]
    if change := each.get("change"):
        lines += [f"  in {place(change)}", f"    - {change['line']}", f"    + {change['becomes']}"]
        lines += [f"  $ pytest '{each['test']}'", ""]
    for command in each.get("commands", ()):
        lines.append(f"  $ {command}")
    if code := each.get("code"):
        lines += ["  Python:", textwrap.indent(code.strip(), "    "), "  prints:",
                  textwrap.indent(each["prints"].strip(), "    ")]
    for part in ("look", "expect", "why"):
        lines += ["", *prose(part, each)]
    return "\n".join(lines)


def prose(part: str, each: dict) -> list[str]:
    return [PROSE[part] + ":", *textwrap.wrap(each[part], WIDTH, initial_indent="  ",
                                              subsequent_indent="  ", break_on_hyphens=False)]


def place(change: dict) -> str:
    """The file of a change, with the number of its line where that still stands there."""
    lines = (ROOT / change["file"]).read_text("utf-8").splitlines()
    found = [n for n, line in enumerate(lines, start=1) if line.strip() == change["line"]]
    if not found:
        return f"{change['file']} (the line is no longer there: changed already?)"
    return f"{change['file']}:{found[0]}"


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(LearnConfig, argv, "minirlhf learn")
    if config.gradcheck:
        results = [gradcheck.compare(loss) for loss in gradcheck.losses()]
        print(gradcheck.table(results))
        return OK if all(result.ok for result in results) else BUG
    print(listing() if config.exercise is None else page(config.exercise))
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
