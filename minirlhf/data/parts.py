"""The parts of a row: a column's string, messages, token ids or number, each refused by its name.

Nothing here knows which columns a file has, nor a tokenizer.
"""

import json
import math

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind
from minirlhf.files.rows import Row

Messages = list[dict]
Part = str | Messages | list[int]

REMOVE = "remove the row or fill it in"
LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which margins are trained with


def wrong_column(row: Row, key: str, legal: str) -> UserError:
    """The error for a column that is missing or of another type."""
    got = f"is {json_kind(row.columns[key])}" if key in row.columns else "is missing"
    keys = ", ".join(printable(name, 40) for name in row.columns) or "none"
    return UserError(row.where, f"{key} {got}", f"{legal}; keys present: {keys}")


def wrong_value(row: Row, key: str, value: object, legal: str) -> UserError:
    """The error for a value that is of no legal kind or size."""
    return UserError(row.where, f"{key} is {printable(json.dumps(value), 40)}", legal)


def string_part(row: Row, key: str, may_be_empty: bool = False) -> str:
    """The text of a column."""
    value = row.columns.get(key)
    if not isinstance(value, str):
        raise wrong_column(row, key, "needs a string")
    if not (value.strip() or may_be_empty):
        raise UserError(row.where, f"{key} is empty", REMOVE)
    return value


def messages_part(row: Row, key: str, may_be_empty: bool = False) -> Messages:
    """The messages of a column; the last one must say something, unless it may be empty."""
    value = row.columns.get(key)
    if not isinstance(value, list):
        raise wrong_column(row, key, "needs a list of messages")
    if not value:
        raise UserError(row.where, f"{key} is empty", REMOVE)
    for number, message in enumerate(value):
        where = f"{key}[{number}]"
        if not isinstance(message, dict):
            found = json_kind(message)
            raise UserError(row.where, f"{where} is {found}", "needs {role: ..., content: ...}")
        for name in ("role", "content"):
            if not isinstance(message.get(name), str):
                got = json_kind(message[name]) if name in message else "missing"
                raise UserError(row.where, f"{where}: {name} is {got}", "needs a string")
    if not (value[-1]["content"].strip() or may_be_empty):
        raise UserError(row.where, f"{key}: the last message is empty", REMOVE)
    # Tables write null for what a message lacks; templates ask whether it is there.
    return [{name: v for name, v in message.items() if v is not None} for message in value]


def ids_part(row: Row, key: str, mask: str | None = None, may_be_empty: bool = False) -> list[int]:
    """The token ids of a column, without those where the mask column, if there is one, has 0."""
    value = row.columns.get(key)
    if not isinstance(value, list):
        raise wrong_column(row, key, "needs a list of token ids")
    for at, id in enumerate(value):
        if type(id) is not int or id < 0:
            raise wrong_value(row, f"{key}[{at}]", id, "a token id is an integer from 0")
    if mask in row.columns:
        kept = row.columns[mask]
        if not isinstance(kept, list):
            raise wrong_column(row, mask, "needs a list of 0 and 1")
        if len(kept) != len(value):
            what = f"{mask} has {len(kept)} numbers, {key} has {len(value)}"
            raise UserError(row.where, what, "they must be as many")
        for at, bit in enumerate(kept):
            if type(bit) not in (int, bool) or bit not in (0, 1):
                raise wrong_value(row, f"{mask}[{at}]", bit, "needs 0 or 1")
        value = [id for id, bit in zip(value, kept, strict=True) if bit]
    if not (value or may_be_empty):
        raise UserError(row.where, f"{key} is empty", REMOVE)
    return value


def optional_number(row: Row, key: str, low: float, high: float, legal: str) -> float | None:
    """A column's number from low to high, None where it has none.

    A table that is all text (CSV) may spell one, and leave its cell empty.
    """
    value = row.columns.get(key)
    if value is None or (value == "" and not row.typed):
        return None
    try:
        if row.typed and type(value) not in (int, float):
            raise TypeError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not low <= number <= high:
        raise UserError(row.where, f"{key} is {printable(repr(value), 40)}", legal)
    return number


def part_kind(value: object) -> str:
    """How a column's value is told apart: "text", "messages" or "other"."""
    if isinstance(value, str):
        return "text"
    if isinstance(value, list) and all(isinstance(item, dict) for item in value):
        return "messages"
    return "other"
