"""What every number of metrics.jsonl means: one definition a name, as `minirlhf metrics` prints it.

The table is glossary.tsv, a row a number. PPO's names are those of TRL 1.x, so that plots made for
them work here. A mean over tokens counts each response token once, and neither prompts nor padding.
A line that covers several steps (`log_every`) holds their mean; counts and what follows the run
(`lr`, `episode` …) are those of the last step. Numbers of held-out data carry the name of their
set, where it has one: eval_loss, eval_short_loss.
"""

import re
from pathlib import Path
from typing import NamedTuple

from minirlhf.run.language import tell


class Metric(NamedTuple):
    """One number of metrics.jsonl. A word in capitals in the name stands for any word."""

    name: str
    unit: str
    over: str  # what the reduction runs over
    reduction: str
    meaning: str
    when: str | None  # the condition under which a run writes it; None: always
    clock: bool  # whether it depends on the machine and stands under the key `clock`


def _read() -> dict[str, tuple[Metric, ...]]:
    found: dict[str, list[Metric]] = {}
    _, *lines = Path(__file__).with_suffix(".tsv").read_text("utf-8").splitlines()
    for recipes, *cells, when, clock in (line.split("\t") for line in lines):
        for recipe in recipes.split():
            found.setdefault(recipe, []).append(Metric(*cells, when or None, bool(clock)))
    return {recipe: tuple(metrics) for recipe, metrics in found.items()}


METRICS = _read()  # recipe -> its numbers, in the order in which they are printed


def definition(recipe: str, name: str) -> Metric | None:
    """The definition of a number in a recipe's metrics.jsonl, or None.

    >>> definition("reward", "eval_short_accuracy").meaning
    'chosen scores above rejected; a tie is wrong'
    """
    exact = {m.name: m for m in METRICS[recipe]}
    if name in exact:
        return exact[name]
    matching = [m for m in METRICS[recipe] if _pattern(m.name).fullmatch(name)]
    return max(matching, key=lambda m: len(m.name), default=None)


def translated(metric: Metric, language: str) -> Metric:
    """The same definition in another language; its name stays.

    >>> translated(METRICS["ppo"][0], "zh").unit
    '步'
    """
    told = {
        name: tell(text, language) for name in ("unit", "over", "reduction", "meaning", "when")
        if (text := getattr(metric, name))
    }
    return metric._replace(**told)


def _pattern(name: str) -> re.Pattern[str]:
    words = re.sub(r"\b[A-Z]+\b", ".+", re.escape(name))
    words = re.sub("^eval/", "eval/(.+/)?", words)
    return re.compile(re.sub("^eval_", "eval_(.+_)?", words))
