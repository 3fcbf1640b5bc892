"""Problems with exact answers, for rewards that can be verified: `minirlhf tasks arithmetic`.

A row is {"prompt": [one turn of the user], "answer": text, "task": name}. `--reward math` scores
arithmetic, `--reward exact` words and format; math reads the numbers of format too.

Each problem is a function of its number below the count of all distinct ones, and each number is
drawn once. So no problem of train.jsonl is in eval.jsonl, nor is a sum whose two numbers have
changed places. The files are the same on every machine; with another --n, eval.jsonl is the same,
and the shorter train.jsonl is the beginning of the longer one.
"""

import itertools
import json
import sys
from collections.abc import Callable, Iterator
from math import ceil, isqrt, perm
from pathlib import Path
from typing import NamedTuple

import torch

from minirlhf import streams
from minirlhf.errors import OK, UserError, run
from minirlhf.files import atomic
from minirlhf.run import flags
from minirlhf.tools.settings import TASKS, TasksConfig

WORDS = (
    "anchor apple basket bottle branch bridge butter candle carpet castle cherry circle cloud "
    "coffee copper corner cotton desert doctor dragon eagle engine feather finger flower forest "
    "garden ginger guitar hammer harbor honey hotel insect iron island jacket jungle kettle kitten "
    "ladder lemon letter market mirror monkey mouse needle ocean onion orange paper pencil pepper "
    "pillow planet pocket potato queen rabbit river road saddle salmon school shadow silver soap "
    "spider spring stone sugar summer table temple thunder ticket tiger tunnel turtle umbrella "
    "valley velvet village violin water whale window winter wolf yard yellow zebra"
).split()
VOWELS = "aeiou"

Problem = tuple[str, str]  # the question, its answer


class Task(NamedTuple):
    """One sort of problem.

    Args:
        count: distinct problems.
        make: a number below that -> the problem.
    """

    count: int
    make: Callable[[int], Problem]


# ------------------------------------------------------------------------------------- the problems


def pair(number: int) -> tuple[int, int]:
    """The number-th of (0, 0), (1, 0), (1, 1), (2, 0), ...: each two numbers once, larger first."""
    larger = (isqrt(8 * number + 1) - 1) // 2
    return larger, number - larger * (larger + 1) // 2


def arithmetic(name: str, digits: int) -> Task:
    """Sums, differences that are not negative, and products with a number of one digit."""
    most = 10**digits  # above each of the two numbers

    def make(number: int) -> Problem:
        a, b = divmod(number, 10) if name == "multiply" else pair(number)
        if name == "add" and number % 2:
            a, b = b, a
        sign, answer = {
            "add": ("+", a + b), "subtract": ("-", a - b), "multiply": ("*", a * b),
        }[name]
        return f"What is {a} {sign} {b}? Answer with the number alone.", str(answer)

    return Task(most * 10 if name == "multiply" else most * (most + 1) // 2, make)


def words(name: str, length: int) -> Task:
    """Lists of different words: to sort, to reverse, to join the last letters of, or to count a
    vowel in."""

    def make(number: int) -> Problem:
        number, vowel = divmod(number, len(VOWELS)) if name == "count" else (number, 0)
        left, some = list(WORDS), []
        for _ in range(length):
            number, at = divmod(number, len(left))
            some.append(left.pop(at))
        shown, letter = ", ".join(some), VOWELS[vowel]
        alone = "Answer with the words alone, separated by commas."
        question, answer = {
            "sort": (f"Put these words in alphabetical order: {shown}. {alone}",
                     ", ".join(sorted(some))),
            "reverse": (f"Write these words in reverse order: {shown}. {alone}",
                        ", ".join(reversed(some))),
            "last": (f"Join the last letters of these words: {shown}. Answer with the letters "
                     "alone.", "".join(word[-1] for word in some)),
            "count": (f'How many times does the letter "{letter}" appear in these words: {shown}? '
                      "Answer with the number alone.", str("".join(some).count(letter))),
        }[name]
        return question, answer

    distinct = perm(len(WORDS), length)
    return Task(distinct * len(VOWELS) if name == "count" else distinct, make)


FORMS = {  # what surrounds a number
    "tags": ("<answer>", "</answer>"), "boxed": (r"\boxed{", "}"), "json": ('{"answer": ', "}"),
    "sentence": ("The answer is ", "."),
}


def formatted(name: str, digits: int) -> Task:
    """Sums whose answer is to be given in a form, to the letter."""
    count, add = arithmetic("add", digits)
    before, after = FORMS[name]

    def make(number: int) -> Problem:
        question, answer = add(number)
        question = question.partition("?")[0]
        told = f"{question}? Answer in exactly this form: {before}NUMBER{after}"
        return told, f"{before}{answer}{after}"

    return Task(count, make)


# ------------------------------------------------------------------------------------ a set of them


def distinct_numbers(seed: int, name: str, count: int) -> Iterator[int]:
    """Each of 0, ..., count - 1 once, in an order that the seed and the name shuffle."""
    seen: set[int] = set()
    for block in itertools.count():
        draws = torch.arange(1024 * block, 1024 * (block + 1))
        for key in streams.key(seed, f"tasks {name}", draws).tolist():
            if len(seen) == count:
                return
            if (number := key % count) not in seen:
                seen.add(number)
                yield number


def rows(config: TasksConfig) -> Iterator[dict]:
    """The rows of both files, the held-out ones first; tasks take turns.

    Raises:
        UserError: a task has fewer distinct problems than its share.
    """
    names, total = config.only or TASKS[config.kind], config.held_out + config.n
    difficulty = (config.words or 3) if config.kind == "words" else (config.digits or 2)
    of = {"arithmetic": arithmetic, "words": words, "format": formatted}[config.kind]
    tasks = {name: of(name, difficulty) for name in names}
    share = ceil(total / len(names))
    for name, task in tasks.items():
        if share > task.count:
            what = f"{name} has {task.count:,} distinct problems, its share is {share:,}"
            do = f"lower them, or raise --{'words' if config.kind == 'words' else 'digits'}"
            raise UserError(f"--n {config.n} and --held-out {config.held_out}", what, do)
    numbers = {name: distinct_numbers(config.seed, name, task.count)
               for name, task in tasks.items()}
    for name in itertools.islice(itertools.cycle(names), total):
        question, answer = tasks[name].make(next(numbers[name]))
        yield {"prompt": [{"role": "user", "content": question}], "answer": answer, "task": name}


def main(argv: list[str] | None = None) -> int:
    config = flags.parse(TasksConfig, argv, "minirlhf tasks")
    made, out = list(rows(config)), Path(config.out)
    parts = {"train": made[config.held_out :], "eval": made[: config.held_out]}
    beside = out.with_name(atomic.TEMPORARY + out.name)
    atomic.discard(beside)  # of a process that was killed
    beside.mkdir()
    for name, some in parts.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in some)
        atomic.write_text(beside / f"{name}.jsonl", lines)
        print(f"{out / name}.jsonl: {len(some):,} problems, as {json.dumps(some[0])}")
    atomic.commit_folder(beside, out)
    return OK


if __name__ == "__main__":
    sys.exit(run(main))
