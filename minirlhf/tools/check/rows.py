"""The rows of a data file as `minirlhf check` sees them: who reads them, and their parts."""

import json
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from minirlhf.batches.preferences import ordered
from minirlhf.data.examples import (
    Pair,
    Prompt,
    Text,
    first_row,
    load_prompts,
    load_texts,
    pair_labels,
    split_rows,
)
from minirlhf.data.formats import Part, pair_format, prompt_format, text_format
from minirlhf.data.rankings import (
    Ranking,
    best_first,
    holds_rankings,
    load_preferences,
    preference_format,
    ranking_format,
)
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind
from minirlhf.files.rows import Row
from minirlhf.files.sieve import STRICT, LeftOut, RowPolicy, Sieve
from minirlhf.models.config import ModelConfig
from minirlhf.setup.ppo_settings import PPOConfig
from minirlhf.setup.reward_settings import RewardConfig
from minirlhf.setup.sft_settings import SFTConfig

Example = Pair | Ranking | Prompt | Text


class Recipe(NamedTuple):
    """What a recipe reads, and by which settings."""

    config: type
    form: Callable  # of a file's first row
    load: Callable
    sides: tuple[str, ...]  # names of a row's parts


PAIR_SIDES, LIST_SIDES = ("prompt", "chosen", "rejected"), ("prompt", "best", "others")
RECIPES = {
    "reward": Recipe(RewardConfig, preference_format, load_preferences, PAIR_SIDES),
    "sft": Recipe(SFTConfig, text_format, load_texts, ("prompt", "response")),
    "ppo": Recipe(PPOConfig, prompt_format, load_prompts, ("prompt",)),
}


class Model(NamedTuple):
    """What can be known of a folder without its weights."""

    config: ModelConfig
    tokenizer: Tokenizer
    is_reward: bool
    parameters: int
    before_eos: bool  # a reward would be read before eos, so pairs lose theirs


class Raw(NamedTuple):
    """A file as it stands."""

    path: str
    recipe: str
    detected: str
    where: list[str]
    parts: list[tuple[Part | None, ...]]  # (prompt or None, response, ...), best first
    ranks: list[list[int]]  # of the responses
    keys: list[tuple]  # equal where parts are, and fit for a set
    labels: list[tuple[float | None, float | None]]  # PAIR_LABELS; empty unless they are pairs
    notes: list[str]  # what was mended
    rejected: list[LeftOut]  # rows that could not be taken apart
    lists: bool  # ranked ones

    @property
    def margins(self) -> list[float | None]:
        return [margin for margin, _ in self.labels]

    @property
    def sides(self) -> tuple[str, ...]:
        """Names of the prompt, of responses of rank 1, and of the others."""
        return LIST_SIDES if self.lists else RECIPES[self.recipe].sides

    @property
    def is_ids(self) -> bool:
        sample = self.parts[0][-1]
        return isinstance(sample, list) and isinstance(sample[0], int)

    @property
    def total(self) -> int:
        return len(self.parts) + len(self.rejected)


class Sizes(NamedTuple):
    """How long the parts of a row are, in tokens or characters."""

    prompt: int
    responses: list[int]
    ranks: list[int]

    @property
    def whole(self) -> int:
        """Of the prompt with its longest response."""
        return self.prompt + max(self.responses, default=0)

    @property
    def longer_by(self) -> np.ndarray:
        """(P,) by how much the better one of each pair of responses is longer."""
        pairs = ordered(self.ranks)
        return np.array([self.responses[i] - self.responses[j] for i, j in pairs], dtype=np.int64)


def recipe_of(path: str, policy: RowPolicy = STRICT) -> str:
    """The recipe that reads rows like the first well-formed one of a file."""
    return first_row(path, recipe_of_row, policy)


def recipe_of_row(row: Row) -> str:
    """The recipe that reads such rows."""
    columns = row.columns
    if {"chosen", "rejected"} & columns.keys():
        return "reward"
    for name, recipe in RECIPES.items():
        try:
            used = recipe.form(row).used
        except UserError:
            continue
        turns = columns["messages"] if used == ("messages",) else None
        if name == "sft" and turns and (len(turns) < 2 or turns[-1].get("role") != "assistant"):
            continue  # nobody has answered: a prompt
        return name
    keys = ", ".join(f"{printable(k, 40)} ({json_kind(v)})" for k, v in columns.items())
    legal = "legal: chosen with rejected | prompt with responses, best first | prompt with "
    legal += "completion or response | prompt | messages | text | ids"
    do = f"{legal}; other names: --columns prompt=question"
    raise UserError(row.where, f"columns of no known format: {keys}", do)


def _key(part: Part | None) -> object:
    if isinstance(part, list):
        is_ids = not part or isinstance(part[0], int)
        return tuple(part) if is_ids else json.dumps(part, sort_keys=True)
    return part


def read_raw(path: str, recipe: str, policy: RowPolicy = STRICT) -> Raw:
    """All rows of a file, each of the kind that the first one is."""
    lists = recipe == "reward" and holds_rankings(path, policy)
    pairs = recipe == "reward" and not lists
    form = ranking_format if lists else pair_format if pairs else RECIPES[recipe].form
    sieve = Sieve(policy)
    split = split_rows(path, form, sieve, also=pair_labels if pairs else None)
    parts, ranks = [], []
    for row, (prompt, *responses) in split.rows:
        order = list(range(1, len(responses) + 1))
        responses, order = best_first(row, responses) if lists else (responses, order)
        parts.append((prompt, *responses))
        ranks.append(order)
    keys = [tuple(map(_key, part)) for part in parts]
    labels = [pair_labels(row) for row, _ in split.rows] if pairs else []
    where = [row.where for row, _ in split.rows]
    detected, rejected = split.form.detected, sieve.in_order()
    return Raw(
        path, recipe, detected, where, parts, ranks, keys, labels, sieve.notes, rejected, lists
    )


def strings_of(part: Part | None) -> list[str]:
    if isinstance(part, str):
        return [part]
    return [turn["content"] for turn in part or () if isinstance(turn, dict)]


def ids_of(example: Example) -> tuple[list[int], ...]:
    """(prompt ids, response ids, ...)."""
    match example:
        case Pair() | Ranking():
            return example.prompt_ids, *example.responses
        case Text(ids=ids, prompt_length=length):
            return ids[:length], ids[length:]
    return (example.ids,)


def sizes_of(example: Example) -> Sizes:
    """How many tokens they are."""
    prompt, *responses = map(len, ids_of(example))
    ranks = example.ranks if isinstance(example, Pair | Ranking) else [1] * len(responses)
    return Sizes(prompt, responses, ranks)
