"""The rows of a data file as `minirlhf check` sees them: who reads them, and their parts."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

from minirlhf.batches.preferences import ordered
from minirlhf.data import examples, rankings, unpaired
from minirlhf.data.arguments import template_arguments
from minirlhf.data.examples import PASSED
from minirlhf.data.formats import imitated_format, pair_format, pair_labels, prompt_format
from minirlhf.data.parts import Part, is_chat
from minirlhf.data.split import NOT_READ, first_row, split_rows
from minirlhf.data.turns import Gaps
from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind
from minirlhf.files.rows import Row
from minirlhf.files.sieve import STRICT, Report, RowPolicy, Sieve


class Kind(NamedTuple):
    """A kind of file."""

    recipes: tuple[str, ...]  # that read it; the first where none is named
    form: Callable  # the first row of a file -> its Format
    load: Callable  # a file -> (its examples, its Report)
    names: tuple[str, ...]  # of the prompt, of responses of rank 1, and of the others
    others: str = NOT_READ  # what becomes of the other columns


KINDS = {
    "pairs": Kind(
        ("reward", "dpo"), pair_format, examples.load_pairs, ("prompt", "chosen", "rejected")
    ),
    "lists": Kind(
        ("reward", "dpo"), rankings.ranking_format, rankings.load_rankings,
        ("prompt", "best", "others"),
    ),
    "texts": Kind(("sft",), imitated_format, examples.load_texts, ("prompt", "response")),
    "prompts": Kind(
        ("ppo", "grpo", "distill"), prompt_format, examples.load_prompts, ("prompt",), PASSED
    ),
    "unpaired": Kind(
        ("dpo",), unpaired.unpaired_format, unpaired.load_unpaired, ("prompt", "response")
    ),
}


@dataclass(frozen=True)
class SeenRow:
    """A row as it stands in the file, or as token ids."""

    where: str
    parts: list[Part | None]  # prompt or None, and responses, best first
    ranks: list[int]  # of the responses
    arguments: dict = field(default_factory=dict)  # what else the chat template sees
    gaps: Gaps = ()  # tokens of the one response that are not learned

    @cached_property
    def strings(self) -> list[str]:
        """All its texts; none where it is ids."""
        found = []
        for part in self.parts:
            turns = part if is_chat(part) else []
            found += [turn["content"] for turn in turns if not turn.get("tool_calls")]
            found += [part] if isinstance(part, str) else []
        return found

    @cached_property
    def key(self) -> tuple:
        """Hashable, and equal where the parts are, with what the chat template sees beside them."""
        return tuple(
            json.dumps([p, self.arguments], sort_keys=True) if is_chat(p)
            else tuple(p) if isinstance(p, list) else p
            for p in self.parts
        )

    @cached_property
    def sizes(self) -> list[int]:
        """Of each part, in tokens or characters."""
        return [
            sum(len(turn["content"]) for turn in p) if is_chat(p) else len(p or ())
            for p in self.parts
        ]

    @property
    def longest(self) -> int:
        """The prompt with its longest response."""
        return self.sizes[0] + max(self.sizes[1:], default=0)

    @property
    def longer_by(self) -> list[int]:
        """By how much the better one of each pair of responses of different rank is longer."""
        return [self.sizes[1 + i] - self.sizes[1 + j] for i, j in ordered(self.ranks)]


class SeenFile(NamedTuple):
    """A file as it stands."""

    kind: Kind
    recipe: str  # one of the kind's
    rows: list[SeenRow]
    report: Report  # of a file from which nothing is dropped yet
    labels: list[tuple[float | None, float | None]]  # PAIR_LABELS; empty unless they are pairs
    load: Callable  # the kind's, with what it is told beside the usual

    @property
    def is_chat(self) -> bool:
        return is_chat(self.rows[0].parts[-1])

    @property
    def is_ids(self) -> bool:
        return isinstance(self.rows[0].parts[-1], list) and not self.is_chat


def row_of(
    example: examples.Pair | rankings.Ranking | unpaired.Unpaired | examples.Prompt | examples.Text
) -> SeenRow:
    match example:
        case examples.Prompt():
            return SeenRow(example.where, [example.ids], [])
        case examples.Text(ids=ids, prompt_length=length, gaps=gaps):
            return SeenRow(example.where, [ids[:length], ids[length:]], [1], gaps=gaps)
    return SeenRow(example.where, [example.prompt_ids, *example.responses], example.ranks)


def recipe_of(path: str, policy: RowPolicy = STRICT) -> str:
    """The recipe that reads rows like the first well-formed one of a file."""
    return first_row(path, _recipe_of_row, policy)


def _recipe_of_row(row: Row) -> str:
    columns = row.columns
    if {"chosen", "rejected"} & columns.keys():
        return "reward"
    for kind in KINDS.values():
        try:
            used = kind.form(row).used
        except UserError:
            continue
        turns = columns["messages"] if used == ("messages",) else None
        answered = not turns or (len(turns) > 1 and turns[-1].get("role") == "assistant")
        if kind.recipes != ("sft",) or answered:
            return kind.recipes[0]
    keys = ", ".join(f"{printable(k, 40)} ({json_kind(v)})" for k, v in columns.items())
    do = "legal: chosen with rejected | prompt with responses, best first | prompt with completion "
    do += "or response | prompt | messages | text | ids; other names: --columns prompt=question"
    raise UserError(row.where, f"columns of no known format: {keys}", do)


def read_file(
    path: str, recipe: str, policy: RowPolicy = STRICT, train_on: str = "all"
) -> SeenFile:
    """All rows of a file, each of the kind that the first one is.

    Args:
        train_on: what of messages sft learns.
    """
    kind = next(kind for kind in KINDS.values() if recipe in kind.recipes)
    if recipe == "dpo" and unpaired.holds_unpaired(path, policy):
        kind = KINDS["unpaired"]
    elif kind == KINDS["pairs"] and rankings.holds_rankings(path, policy):
        kind = KINDS["lists"]
    pairs, sieve, rows = kind == KINDS["pairs"], Sieve(policy), []
    labels_of, others = (pair_labels if pairs else None), kind.others
    told = {"train_on": train_on} if kind == KINDS["texts"] else {}
    split = split_rows(path, partial(kind.form, **told), sieve, also=labels_of, others=others)
    for row, (prompt, *responses) in split.rows:
        ranks = list(range(1, len(responses) + 1))
        if kind == KINDS["lists"]:
            responses, ranks = rankings.best_first(row, responses)
        parts = [prompt, *responses]
        seen = template_arguments(row.columns, row.where) if is_chat(parts[-1]) else {}
        rows.append(SeenRow(row.where, parts, ranks, seen))
    split.report.rejected_rows = sieve.in_order()
    split.report.notes += sieve.notes
    labels = [labels_of(row) for row, _ in split.rows if pairs]
    load = partial(kind.load, **told)
    return SeenFile(kind, recipe, rows, split.report, labels, load)
