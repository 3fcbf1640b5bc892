"""Ranked lists: several answers to one prompt in their order of preference, and their loader.

Kinds of rows, of which the first one decides for the file:

    prompt, responses                       best first
    prompt, responses, ranks                1 is the best; equal ranks tie
    prompt, responses, scores               higher is better; equal scores tie
    prompt, responses, best (or choice)     the index of the best, from 0; the others tie
    prompt, completions                     a list of {response, score}
    query, sample0, sample1, ..., best      token ids (lm-human-preferences)
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from minirlhf.data.examples import (
    Encoded,
    Pair,
    load_examples,
    load_pairs,
)
from minirlhf.data.formats import PAIR_LABELS, Format, pair_format, unknown_columns
from minirlhf.data.parts import (
    LARGEST,
    Part,
    ids_part,
    messages_part,
    part_kind,
    string_part,
    turns_part,
    wrong_column,
    wrong_value,
)
from minirlhf.data.split import first_row, split_rows
from minirlhf.data.tokenizer import Tokenizer
from minirlhf.errors import UserError
from minirlhf.files.reading import json_kind
from minirlhf.files.rows import Row
from minirlhf.files.sieve import STRICT, Report, RowPolicy, Sieve

LABELS = ("ranks", "scores", "best", "choice")  # columns, at most one of them
LEGAL = (
    "prompt (a string or messages) with responses, best first or beside one of ranks, scores, "
    "best, choice | prompt with completions of {response, score} | query, sample0, sample1, best"
)


@dataclass(frozen=True)
class Ranking:
    """Answers to one prompt, best first.

    Args:
        prompt_ids: the shared start.
        responses: ids of each answer, two or more.
        ranks: of each answer, ascending from 1 without gaps; equal ranks tie.
        where: "file:line".
        columns: the row's other columns.
        scores: of each answer, as the file has them; None where it has none.
    """

    prompt_ids: list[int]
    responses: list[list[int]]
    ranks: list[int]
    where: str
    columns: dict
    scores: list[float] | None = None


E = TypeVar("E", Pair, Ranking)
R = TypeVar("R")


def is_ranking(row: Row) -> bool:
    """Whether a row holds a list rather than a pair."""
    columns = row.columns
    if "chosen" in columns or "rejected" in columns:
        return False
    listed = isinstance(columns.get("completions"), list)
    return listed or "responses" in columns or "sample0" in columns


def ranking_format(row: Row, empty_prompt: bool = False) -> Format:
    """The kind of file that starts with this row; parts (prompt, response, response, ...).

    Args:
        empty_prompt: a prompt may be empty.
    """
    columns, label = row.columns, _label(row)
    shown = f", {label}" if label else ", best first"
    prompt = part_kind(columns.get("prompt"))
    read = string_part if prompt == "text" else messages_part
    if "query" in columns and "sample0" in columns:
        count = next(i for i in range(len(columns) + 1) if f"sample{i}" not in columns)
        keys = ("query", *(f"sample{i}" for i in range(count)))
        detected = f"tokenised ranked lists (query, sample0 to sample{count - 1}{shown})"
        used, read = (*keys, *LABELS), ids_part
    elif prompt in ("text", "messages") and "responses" in columns:
        keys, used = ("prompt", "responses"), ("prompt", "responses", *LABELS)
        detected = f"ranked lists (prompt, responses{shown})"
    elif prompt in ("text", "messages") and "completions" in columns:
        if label:
            raise UserError(row.where, f"has completions and {label}", "keep the one that counts")
        keys = used = ("prompt", "completions")
        detected = "ranked lists (prompt, completions of response and score)"
    else:
        raise unknown_columns(row, LEGAL)
    if {prompt, part_kind(_first_answer(columns.get(keys[1])))} == {"text", "messages"}:
        read = turns_part
    read_prompt = partial(read, may_be_empty=empty_prompt)

    def parts(row: Row) -> tuple[Part, ...]:
        if _label(row) != label:
            got = _label(row) or "none of " + ", ".join(LABELS)
            raise UserError(row.where, f"has {got}, unlike the first row")
        for name in PAIR_LABELS:
            if name in row.columns:
                raise UserError(row.where, f"has a column {name}, which only pairs have")
        if keys[-1] == "completions" and "responses" in row.columns:
            raise UserError(row.where, "has responses, unlike the first row")
        if keys[0] == "query" and (more := f"sample{len(keys) - 1}") in row.columns:
            raise UserError(row.where, f"has {more}, unlike the first row")
        listed = _listed(row, keys)
        if len(listed.columns) < 2:
            raise UserError(row.where, f"{len(listed.columns)} responses", "needs two or more")
        responses = tuple(read(listed, key) for key in listed.columns)
        ranks_of(row, len(responses))  # refuses a wrong label before anything is encoded
        return (read_prompt(row, keys[0]), *responses)

    return Format(detected, used, parts)


def _label(row: Row) -> str | None:
    found = [name for name in LABELS if name in row.columns]
    if len(found) > 1:
        raise UserError(row.where, f"has {' and '.join(found)}", "keep the one that counts")
    return found[0] if found else None


def _first_answer(listed: object) -> object:
    """The first of responses or completions; None where it is none."""
    first = listed[0] if isinstance(listed, list) and listed else None
    return first["response"] if isinstance(first, dict) and "response" in first else first


def _listed(row: Row, keys: tuple[str, ...]) -> Row:
    """The row's responses as columns of their own, so that an error names the one it means."""
    if keys[0] == "query":
        return Row(row.where, {key: row.columns.get(key) for key in keys[1:]})
    key = keys[1]
    values = row.columns.get(key)
    if not isinstance(values, list):
        raise wrong_column(row, key, "needs a list")
    if key == "completions":
        values = [_completion(row, at, value)["response"] for at, value in enumerate(values)]
    return Row(row.where, {f"{key}[{at}]": value for at, value in enumerate(values)})


def _completion(row: Row, at: int, value: object) -> dict:
    if not isinstance(value, dict) or not {"response", "score"} <= value.keys():
        got = ", ".join(value) if isinstance(value, dict) else json_kind(value)
        raise UserError(row.where, f"completions[{at}] is {got}", "needs {response: …, score: …}")
    return value


def ranks_of(row: Row, count: int) -> list[int]:
    """Rank of each of a row's `count` responses, from 1 without gaps.

    Raises:
        UserError: not one number each, a rank that is no integer from 1, a score that is not
            finite, or an index that is none of the responses'.
    """
    scores, label, columns = scores_of(row, count), _label(row), row.columns
    if scores is not None:
        return _dense([-score for score in scores])
    if label is None:
        return list(range(1, count + 1))
    value = columns[label]
    if label in ("best", "choice"):
        if type(value) is not int or not 0 <= value < count:
            legal = f"needs an integer from 0 to {count - 1}: the index of the best response"
            raise wrong_value(row, label, value, legal)
        return [1 if at == value else 2 for at in range(count)]
    if not isinstance(value, list):
        raise wrong_column(row, label, "needs a list of numbers")
    numbers = _numbers(row, label, value, count)
    for at, number in enumerate(numbers):
        if type(number) is not int or number < 1:
            raise wrong_value(row, f"ranks[{at}]", number, "needs an integer from 1, best")
    return _dense(numbers)


def scores_of(row: Row, count: int) -> list[float] | None:
    """Score of each of a row's `count` responses, or None where the row has none.

    Raises:
        UserError: not one number each, or one whose difference to another could be infinite.
    """
    columns, key = row.columns, "scores"
    listed = "responses" in columns or "sample0" in columns
    if isinstance(columns.get("completions"), list) and not listed:
        key, values = "completions", [value["score"] for value in columns["completions"]]
    elif _label(row) == "scores":
        values = columns["scores"]
        if not isinstance(values, list):
            raise wrong_column(row, key, "needs a list of numbers")
    else:
        return None
    return _numbers(row, key, values, count, LARGEST / 2)


def _numbers(row: Row, key: str, values: list, count: int, largest: float = LARGEST) -> list[float]:
    if len(values) != count:
        raise UserError(row.where, f"{len(values)} {key}, {count} responses", "needs as many")
    for at, value in enumerate(values):
        if type(value) not in (int, float) or not abs(value) <= largest:
            legal = f"needs a finite number of at most {largest:.3g}"
            raise wrong_value(row, f"{key}[{at}]", value, legal)
    return values


def _dense(values: list[float]) -> list[int]:
    order = {value: rank for rank, value in enumerate(sorted(set(values)), 1)}
    return [order[value] for value in values]


def best_first(row: Row, responses: Sequence[R]) -> tuple[list[R], list[int]]:
    """(a row's responses, their ranks) in the order of the ranks; ties as in the file."""
    ranks = ranks_of(row, len(responses))
    order = sorted(range(len(ranks)), key=ranks.__getitem__)  # stable
    return [responses[i] for i in order], [ranks[i] for i in order]


def load_rankings(
    path: str | Path, tokenizer: Tokenizer | None, max_length: int | None, overlong: str,
    policy: RowPolicy = STRICT, finish: Callable[[Ranking], Ranking] | None = None,
    whole: bool = False,
) -> tuple[list[Ranking], Report]:
    """Ranked lists of a file, arguments and errors as in `load_pairs`.

    Lists that say nothing are dropped and counted: all responses tie, or two that are equal have
    different ranks.
    """
    split = split_rows(path, ranking_format, Sieve(policy))

    def make(e: Encoded) -> Ranking:
        responses, ranks = best_first(e.row, e.responses)
        scores = scores_of(e.row, len(responses))
        scores = scores and sorted(map(float, scores), reverse=True)
        return Ranking(e.prompt_ids, responses, ranks, e.row.where, e.columns, scores)

    def drop(row: Row, responses: list[list[int]]) -> str | None:
        return says_nothing(list(map(tuple, responses)), ranks_of(row, len(responses)))

    return load_examples(split, make, finish, tokenizer, max_length, overlong, drop, whole)


def says_nothing(responses: Sequence[Hashable], ranks: list[int]) -> str | None:
    """Why a list tells no response from another, or None."""
    if len(set(ranks)) == 1:
        return "all responses tie"
    rank: dict[Hashable, int] = {}
    for response, here in zip(responses, ranks, strict=True):
        if rank.setdefault(response, here) != here:
            return "equal responses with different ranks"
    return None


def holds_rankings(path: str | Path, policy: RowPolicy = STRICT) -> bool:
    """Whether the first well-formed row of a file is a ranked list rather than a pair; arguments
    and errors as in `first_row`."""

    def tell(row: Row) -> bool:
        ranked = is_ranking(row)
        detect = ranking_format if ranked else pair_format
        detect(row, policy.allow_empty_prompt).split(row)  # refuses a malformed one
        return ranked

    return first_row(path, tell, policy)


def load_preferences(
    path: str | Path, tokenizer: Tokenizer | None, max_length: int | None, overlong: str,
    policy: RowPolicy = STRICT, finish: Callable[[E], E] | None = None,
    whole: bool = False,
) -> tuple[list[Pair] | list[Ranking], Report]:
    """Pairs or ranked lists, as the first well-formed row is; arguments as in `load_pairs`."""
    load = load_rankings if holds_rankings(path, policy) else load_pairs
    return load(path, tokenizer, max_length, overlong, policy, finish, whole)
