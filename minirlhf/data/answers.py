"""How rows of published data sets answer: the answers of each shape in published.py.

Each raises Useless where none of a row's answers is better, or one is empty.
"""

from collections.abc import Callable

from minirlhf.data.parts import (
    Messages,
    Useless,
    messages_part,
    optional_number,
    wrong_column,
    wrong_value,
)
from minirlhf.data.questions import several, text_of, turn
from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind
from minirlhf.files.rows import Row

WINNERS = ("model_a", "model_b", "tie", "tie (bothbad)", "both_bad")


def _answer(row: Row, name: str, value: object) -> str:
    """An answer's text; raises Useless where there is none."""
    if value is None or (isinstance(value, str) and not value.strip()):
        raise Useless("an empty answer")
    return text_of(row, name, value)


def _reply(row: Row, key: str) -> Messages:
    """The answer of a column as the assistant's turn."""
    return turn("assistant", _answer(row, key, row.columns[key]))


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


def _pair(answers: tuple, better: int | None) -> dict:
    """A pair's columns; raises Useless where none of the two is better."""
    if better is None:
        raise Useless("a tie")
    return {"chosen": answers[better], "rejected": answers[1 - better]}


def _ahead(first: float, second: float) -> int | None:
    return None if first == second else int(second > first)


# ---- one answer, and pairs -----------------------------------------------------------------------


def nothing(row: Row) -> dict:
    """Of a row whose dialogue holds them."""
    return {}


def completion(row: Row, key: str) -> dict:
    return {"completion": _reply(row, key)}


def sides(row: Row) -> dict:
    """Both sides as they stand."""
    return {"chosen": row.columns["chosen"], "rejected": row.columns["rejected"]}


def texts(row: Row) -> dict:
    """Both sides, which are texts."""
    return _pair((_reply(row, "chosen"), _reply(row, "rejected")), 0)


def conversations(row: Row) -> dict:
    return {side: row.columns[f"{side}_conversations"] for side in ("chosen", "rejected")}


def helpsteer3(row: Row) -> dict:
    prefers = _number(row, "overall_preference", 3)  # below 0: the first response
    return _pair((_reply(row, "response1"), _reply(row, "response2")), _ahead(-prefers, prefers))


def safe_rlhf(row: Row) -> dict:
    answers = _reply(row, "response_0"), _reply(row, "response_1")
    return _pair(answers, _index(row, "better_response_id"))


def shp(row: Row) -> dict:
    answers = _reply(row, "human_ref_A"), _reply(row, "human_ref_B")
    return _pair(answers, 1 - _index(row, "labels"))


def webgpt(row: Row) -> dict:
    scores = _number(row, "score_0", 1), _number(row, "score_1", 1)
    return _pair((_reply(row, "answer_0"), _reply(row, "answer_1")), _ahead(*scores))


def winner(row: Row) -> int | None:
    """Of LMArena's older rows; None: it is a tie."""
    name = row.columns["winner"]
    if name not in WINNERS:
        raise wrong_value(row, "winner", name, f"legal: {', '.join(WINNERS)}")
    return WINNERS.index(name) if name in WINNERS[:2] else None


def flagged(row: Row) -> int | None:
    """Of rows that have a column for each winner."""
    keys = "winner_model_a", "winner_model_b"
    first, second = (_index(row, key) for key in keys)
    if first and second:
        raise UserError(row.where, f"{' and '.join(keys)} are both 1", "one of them wins, or none")
    return _ahead(first, second)


def arena(row: Row) -> dict:
    better, dialogues = winner(row), []
    for key in ("conversation_a", "conversation_b"):
        dialogues.append(messages_part(row, key, may_be_empty=True))
        _answer(row, key, dialogues[-1][-1]["content"])
    return _pair(tuple(dialogues), better)


def arena_texts(row: Row, which: Callable[[Row], int | None]) -> dict:
    """Both dialogues of a row that has what was asked in one list and each answer in another."""
    asked, better, dialogues = several(row, "prompt"), which(row), []
    for key in ("response_a", "response_b"):
        answers, turns = several(row, key), []
        if len(answers) != len(asked):
            what = f"{key} has {len(answers)} texts, prompt has {len(asked)}"
            raise UserError(row.where, what, "they must be as many")
        for question, answer in zip(asked, answers, strict=True):
            turns += turn("user", text_of(row, "prompt", question))
            turns += turn("assistant", _answer(row, key, answer))
        dialogues.append(turns)
    return _pair(tuple(dialogues), better)


def summaries(row: Row) -> dict:
    """Of TL;DR, as texts that go on with the post."""
    listed = row.columns["summaries"]
    if not isinstance(listed, list) or len(listed) != 2:
        raise wrong_column(row, "summaries", "needs two objects with text")
    found = []
    for at, summary in enumerate(listed):
        text = summary.get("text") if isinstance(summary, dict) else summary
        found.append(_answer(row, f"summaries[{at}]", text))
    return _pair(tuple(found), _index(row, "choice"))


# ---- ranked lists --------------------------------------------------------------------------------


def _list(answers: list[str], label: str, values: list) -> dict:
    if len(answers) < 2:
        raise Useless("fewer than two answers")
    return {"responses": [turn("assistant", text) for text in answers], label: values}


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


def ultrafeedback(row: Row, score: str) -> dict:
    listed = _objects(row, "completions", "response", score)
    found = [_answer(row, f"completions[{i}]", one["response"]) for i, one in enumerate(listed)]
    return _list(found, "scores", [one[score] for one in listed])


def nectar(row: Row) -> dict:
    listed = _objects(row, "answers", "answer", "rank")
    ranks = [
        int(one["rank"]) if type(one["rank"]) is float and one["rank"].is_integer() else one["rank"]
        for one in listed
    ]
    found = [_answer(row, f"answers[{i}]", one["answer"]) for i, one in enumerate(listed)]
    return _list(found, "ranks", ranks)
