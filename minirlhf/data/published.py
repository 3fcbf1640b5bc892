"""Data sets as they were published: a row of each shape, turned into the columns of formats.py.

The columns of a file's first row tell its shape. Questions become the turns of a user and answers
those of an assistant: a model's chat template renders them, or the plain one where it has none.
Only a post of TL;DR is a text that its summary continues.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from minirlhf.data.parts import (
    Messages,
    Useless,
    hh_turns,
    messages_part,
    optional_number,
    string_part,
    wrong_column,
    wrong_value,
)
from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind, strict_json
from minirlhf.files.rows import Row

WINNERS = ("model_a", "model_b", "tie", "tie (bothbad)", "both_bad")


class Shape(NamedTuple):
    """One published shape.

    Args:
        name: as the user is told.
        needs: columns that tell it and become others.
        turn: a row -> our columns and their values; raises UserError where it is not of this
            shape, Useless where it says nothing.
        reads: columns that it takes, too, where they are there.
        unless: columns of a row that is read as it stands.
        fits: whether the first row's values are this shape's.
    """

    name: str
    needs: tuple[str, ...]
    turn: Callable[[Row], dict]
    reads: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    fits: Callable[[Row], bool] = lambda row: True

    @property
    def told(self) -> str:
        return f"{self.name} ({', '.join(self.needs)})"


def shape_of(row: Row) -> Shape | None:
    """The shape that a file has whose first row this is; None where it needs no turning."""
    for shape in SHAPES:
        there = row.columns.keys()
        if there >= {*shape.needs} and not there & {*shape.unless} and shape.fits(row):
            return shape
    return None


def reshape(row: Row, shape: Shape | None) -> Row:
    """The row with our columns in the place of the shape's.

    Raises:
        UserError: it is not of this shape.
        Useless: it is, but tells no answer from another.
    """
    if shape is None:
        return row
    try:
        for name in shape.needs:
            if name not in row.columns:
                raise wrong_column(row, name, "needs what the first row has")
        made = shape.turn(row)
    except UserError as error:
        do = f"{error.do}; " if error.do else ""
        raise UserError(error.where, error.what, f"{do}detected: {shape.told}") from None
    taken = {*shape.needs, *shape.reads}
    return replace(row, columns={k: v for k, v in row.columns.items() if k not in taken} | made)


# ---- what rows are made of -----------------------------------------------------------------------


def _turn(role: str, text: str) -> Messages:
    return [{"role": role, "content": text}]


def _answer(row: Row, name: str, value: object) -> str:
    """An answer's text; raises Useless where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Useless("an empty answer")
    return _text(row, name, value)


def _text(row: Row, name: str, value: object) -> str:
    if not isinstance(value, str):
        raise UserError(row.where, f"{name} is {json_kind(value)}", "needs a string")
    return value


def _reply(row: Row, key: str) -> Messages:
    """The answer of a column as the assistant's turn."""
    return _turn("assistant", _answer(row, key, row.columns[key]))


def _optional(row: Row, key: str) -> str:
    """The text of a column that may be empty or missing."""
    return string_part(row, key, may_be_empty=True) if row.columns.get(key) is not None else ""


def _several(row: Row, key: str) -> list:
    """The list in a column, which may be its JSON text; of a plain text, a list of it alone."""
    value = row.columns[key]
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = strict_json(value, row.where)
        except UserError as error:
            raise UserError(row.where, f"{key}: {error.what}", error.do) from None
    return value if isinstance(value, list) else [value]


def _index(row: Row, key: str) -> int:
    """0 or 1, which in a table of text may be spelled."""
    value = row.columns[key]
    if not row.typed and value in ("0", "1"):
        value = int(value)
    if type(value) is not int or value not in (0, 1):
        raise wrong_value(row, key, value, "needs 0 or 1")
    return value


def _number(row: Row, key: str, most: float) -> float:
    """A number from -most to most."""
    number = optional_number(row, key, -most, most, f"needs a number from {-most:g} to {most:g}")
    if number is None:
        raise wrong_column(row, key, "needs a number")
    return number


def _pair(prompt: object, answers: tuple, better: int | None) -> dict:
    """A pair's columns; raises Useless where none of the two is better."""
    if better is None:
        raise Useless("a tie")
    given = {} if prompt is None else {"prompt": prompt}
    return given | {"chosen": answers[better], "rejected": answers[1 - better]}


def _ahead(first: float, second: float) -> int | None:
    return None if first == second else int(second > first)


# ---- shapes of texts -----------------------------------------------------------------------------


def _instruction(row: Row, more: str = "input") -> Messages:
    """The turns of an alpaca row before its answer, as LLaMA-Factory joins them."""
    system = _optional(row, "system")
    turns = _turn("system", system) if system.strip() else []
    for at, said in enumerate(_several(row, "history") if row.columns.get("history") else []):
        if not isinstance(said, list) or len(said) != 2:
            legal = "needs [user's text, assistant's text]"
            raise UserError(row.where, f"history[{at}] is {json_kind(said)}", legal)
        user, assistant = (_text(row, f"history[{at}]", text) for text in said)
        turns += _turn("user", user) + _turn("assistant", assistant)
    asked = [_optional(row, "instruction"), _optional(row, more)]
    if not any(map(str.strip, asked)):
        raise UserError(row.where, "instruction is empty", "remove the row or fill it in")
    return turns + _turn("user", "\n".join(text for text in asked if text.strip()))


def _alpaca(row: Row, answer: str = "output", more: str = "input") -> dict:
    return {"prompt": _instruction(row, more), "completion": _reply(row, answer)}


def _alpaca_pair(row: Row) -> dict:
    return _pair(_instruction(row), (_reply(row, "chosen"), _reply(row, "rejected")), 0)


def _dialogue(row: Row, key: str) -> dict:
    """Messages behind the system's turn of a column of its own."""
    turns, system = messages_part(row, key, may_be_empty=True), _optional(row, "system")
    told = system.strip() and turns[0]["role"] != "system"
    return {"messages": (_turn("system", system) if told else []) + turns}


# ---- shapes of pairs -----------------------------------------------------------------------------


def _sharegpt_pair(row: Row) -> dict:
    prompt = _dialogue(row, "conversations")["messages"]
    return {"prompt": prompt, "chosen": row.columns["chosen"], "rejected": row.columns["rejected"]}


def _torchtune_pair(row: Row) -> dict:
    return {side: row.columns[f"{side}_conversations"] for side in ("chosen", "rejected")}


def _question_pair(row: Row) -> dict:
    system = _optional(row, "system")
    prompt = _turn("system", system) if system.strip() else []
    prompt += _turn("user", string_part(row, "question"))
    return _pair(prompt, (_reply(row, "chosen"), _reply(row, "rejected")), 0)


def _helpsteer3(row: Row) -> dict:
    prefers = _number(row, "overall_preference", 3)  # below 0: the first response
    answers = _reply(row, "response1"), _reply(row, "response2")
    return _pair(messages_part(row, "context"), answers, _ahead(-prefers, prefers))


def _safe_rlhf(row: Row) -> dict:
    answers = _reply(row, "response_0"), _reply(row, "response_1")
    prompt = _turn("user", string_part(row, "prompt"))
    return _pair(prompt, answers, _index(row, "better_response_id"))


def _shp(row: Row) -> dict:
    answers = _reply(row, "human_ref_A"), _reply(row, "human_ref_B")
    return _pair(_turn("user", string_part(row, "history")), answers, 1 - _index(row, "labels"))


def _webgpt(row: Row) -> dict:
    question = row.columns["question"]
    if isinstance(question, dict):
        question = question.get("full_text")
    scores = _number(row, "score_0", 1), _number(row, "score_1", 1)
    answers = _reply(row, "answer_0"), _reply(row, "answer_1")
    prompt = _turn("user", _text(row, "question's full_text", question))
    return _pair(prompt, answers, _ahead(*scores))


def _winner(row: Row) -> int | None:
    winner = row.columns["winner"]
    if winner not in WINNERS:
        raise wrong_value(row, "winner", winner, f"legal: {', '.join(WINNERS)}")
    return WINNERS.index(winner) if winner in WINNERS[:2] else None


def _flagged(row: Row) -> int | None:
    keys = "winner_model_a", "winner_model_b"
    first, second = (_index(row, key) for key in keys)
    if first and second:
        raise UserError(row.where, f"{' and '.join(keys)} are both 1", "one of them wins, or none")
    return _ahead(first, second)


def _arena(row: Row) -> dict:
    better, sides = _winner(row), []
    for key in ("conversation_a", "conversation_b"):
        sides.append(messages_part(row, key, may_be_empty=True))
        _answer(row, key, sides[-1][-1]["content"])
    return _pair(None, tuple(sides), better)


def _arena_texts(row: Row, winner: Callable[[Row], int | None]) -> dict:
    """Both dialogues of a row that has what was asked in one list and each answer in another."""
    asked, better, sides = _several(row, "prompt"), winner(row), []
    for key in ("response_a", "response_b"):
        answers, turns = _several(row, key), []
        if len(answers) != len(asked):
            what = f"{key} has {len(answers)} texts, prompt has {len(asked)}"
            raise UserError(row.where, what, "they must be as many")
        for question, answer in zip(asked, answers, strict=True):
            turns += _turn("user", _text(row, "prompt", question))
            turns += _turn("assistant", _answer(row, key, answer))
        sides.append(turns)
    return _pair(None, tuple(sides), better)


def _tldr(row: Row) -> dict:
    """The prompt that Stiennon et al. 2020 (arXiv:2009.01325) sampled summaries with."""
    info, summaries = row.columns["info"], row.columns["summaries"]
    if not isinstance(info, dict):
        raise wrong_column(row, "info", "needs an object with post and title")
    known = {key: value for key, value in info.items() if isinstance(value, str) and value}
    if "post" in known:
        where = known.get("subreddit", "").removeprefix("r/")
        parts = [f"SUBREDDIT: r/{where}"] if where else []
        parts += [f"TITLE: {known['title']}"] if "title" in known else []
        parts.append(f"POST: {known['post']}")
    elif "article" in known:
        parts = ["Article:", known["article"]]
    else:
        got = ", ".join(printable(key, 40) for key in info) or "nothing"
        raise UserError(row.where, f"info has {got}", "needs post, or article")
    if not isinstance(summaries, list) or len(summaries) != 2:
        raise wrong_column(row, "summaries", "needs two objects with text")
    texts = []
    for at, summary in enumerate(summaries):
        text = summary.get("text") if isinstance(summary, dict) else summary
        texts.append(_answer(row, f"summaries[{at}]", text))
    return _pair("\n\n".join([*parts, "TL;DR:"]), tuple(texts), _index(row, "choice"))


# ---- shapes of ranked lists ----------------------------------------------------------------------


def _list(prompt: Messages, answers: list[str], label: str, values: list) -> dict:
    if len(answers) < 2:
        raise Useless("fewer than two answers")
    turns = [_turn("assistant", text) for text in answers]
    return {"prompt": prompt, "responses": turns, label: values}


def _objects(row: Row, key: str, text: str, label: str) -> list[dict]:
    """A column's list of objects that have both of these names."""
    listed = row.columns[key]
    if not isinstance(listed, list):
        raise wrong_column(row, key, "needs a list")
    for at, value in enumerate(listed):
        if not isinstance(value, dict) or not {text, label} <= value.keys():
            got = ", ".join(value) if isinstance(value, dict) else json_kind(value)
            legal = f"needs {{{text}: ..., {label}: ...}}"
            raise UserError(row.where, f"{key}[{at}] is {printable(got, 80)}", legal)
    return listed


def _ultrafeedback(row: Row, score: str) -> dict:
    listed = _objects(row, "completions", "response", score)
    texts = [_answer(row, f"completions[{i}]", one["response"]) for i, one in enumerate(listed)]
    return _list(_instruction(row), texts, "scores", [one[score] for one in listed])


def _nectar(row: Row) -> dict:
    prompt, listed = string_part(row, "prompt"), _objects(row, "answers", "answer", "rank")
    turns = hh_turns(prompt)
    if not turns or turns[-1]["role"] != "user":
        raise UserError(row.where, "prompt ends with no turn of a Human", r"like '\n\nHuman: Why?'")
    ranks = [
        int(one["rank"]) if type(one["rank"]) is float and one["rank"].is_integer() else one["rank"]
        for one in listed
    ]
    texts = [_answer(row, f"answers[{i}]", one["answer"]) for i, one in enumerate(listed)]
    return _list(turns, texts, "ranks", ranks)


def _holds(key: str, *names: str) -> Callable[[Row], bool]:
    """Whether a column is a list of objects, of which the first, if any, has these names."""

    def fits(row: Row) -> bool:
        listed = row.columns[key]
        if not isinstance(listed, list):
            return False
        first = listed[0] if listed else dict.fromkeys(names)
        return isinstance(first, dict) and {*names} <= first.keys()

    return fits


def _has_texts(row: Row) -> bool:
    """Whether chosen is an answer rather than a dialogue."""
    chosen = row.columns["chosen"]
    return isinstance(chosen, str) and not hh_turns(chosen)


SIDES = ("chosen", "rejected")
ALPACA = ("input", "system", "history")
ARENA = ("prompt", "response_a", "response_b")
OURS = ("prompt", "messages")
SHAPES = (
    Shape("sharegpt pairs", ("conversations", *SIDES), _sharegpt_pair, ("system",), OURS),
    Shape("torchtune pairs", tuple(f"{side}_conversations" for side in SIDES), _torchtune_pair),
    Shape("sharegpt", ("conversations",), partial(_dialogue, key="conversations"), ("system",),
          ("messages",)),
    Shape("dialogues with a system column", ("messages", "system"),
          partial(_dialogue, key="messages"), (), (),
          lambda row: isinstance(row.columns["system"], str | None)),
    Shape("alpaca pairs", ("instruction", *SIDES), _alpaca_pair, ALPACA, OURS, _has_texts),
    *(Shape(f"UltraFeedback by {score}", ("instruction", "completions"),
            partial(_ultrafeedback, score=score), ALPACA, OURS,
            _holds("completions", "response", score))
      for score in ("overall_score", "fine-grained_score", "score")),
    Shape("alpaca", ("instruction", "output"), _alpaca, ALPACA, OURS),
    Shape("dolly", ("instruction", "response"),
          partial(_alpaca, answer="response", more="context"), ("context",), OURS),
    Shape("questions with pairs", ("question", *SIDES), _question_pair, ("system",), OURS,
          _has_texts),
    Shape("HelpSteer3", ("context", "response1", "response2", "overall_preference"), _helpsteer3),
    Shape("PKU-SafeRLHF", ("prompt", "response_0", "response_1", "better_response_id"), _safe_rlhf),
    Shape("SHP", ("history", "human_ref_A", "human_ref_B", "labels"), _shp),
    Shape("WebGPT", ("question", "answer_0", "answer_1", "score_0", "score_1"), _webgpt),
    Shape("LMArena", ("conversation_a", "conversation_b", "winner"), _arena),
    Shape("LMArena", (*ARENA, "winner"), partial(_arena_texts, winner=_winner)),
    Shape("LMArena", (*ARENA, "winner_model_a", "winner_model_b"),
          partial(_arena_texts, winner=_flagged), ("winner_tie",)),
    Shape("TL;DR comparisons", ("info", "summaries", "choice"), _tldr),
    Shape("Nectar", ("prompt", "answers"), _nectar, (), ("responses",),
          _holds("answers", "answer", "rank")),
)
