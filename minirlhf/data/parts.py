"""The parts of a row: a column's string, messages, token ids or number, each refused by its name.

Nothing here knows which columns a file has, nor a tokenizer.
"""

import json
import math
import re
from dataclasses import replace

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind, strict_json
from minirlhf.files.rows import Row

Messages = list[dict]
Part = str | Messages | list[int]
Parts = tuple[Part | None, ...]  # (prompt or None, response, ...)

SPOKEN = re.compile(r"\n\n(Human|Assistant):")  # before each turn of an HH transcript
TRAIN_ON = ("all", "last", "completion")  # turns of messages that are learned, as turns.py says
REMOVE = "remove the row or fill it in"
ASKED = ("prompt", "query")  # what may be empty where that is allowed
SPEAKERS = {  # `from` in ShareGPT and its kin -> role
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant",
    "system": "system", "function_call": "assistant", "observation": "tool", "tool": "tool",
}
LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which margins are trained with


class Useless(Exception):
    """A row is as it should be and teaches nothing, for this reason: it is dropped and counted."""


def wrong_column(row: Row, key: str, legal: str) -> UserError:
    """The error for a column that is missing or of another type."""
    got = f"is {json_kind(row.columns[key])}" if key in row.columns else "is missing"
    legal += ", which no table has: write the file as JSON lines" if has_list(row, key) else ""
    keys = ", ".join(printable(name, 40) for name in row.columns) or "none"
    return UserError(row.where, f"{key} {got}", f"{legal}; keys present: {keys}")


def has_list(row: Row, key: str) -> bool:
    """Whether a cell of a table that is all text (CSV) has the text of a list or an object."""
    value = row.columns.get(key)
    return not row.typed and isinstance(value, str) and value.lstrip()[:1] in ("[", "{")


def wrong_value(row: Row, key: str, value: object, legal: str) -> UserError:
    """The error for a value that is of no legal kind or size."""
    return UserError(row.where, f"{key} is {printable(json.dumps(value), 40)}", legal)


def string_part(row: Row, key: str, may_be_empty: bool = False) -> str:
    """The text of a column."""
    value = row.columns.get(key)
    if not isinstance(value, str):
        raise wrong_column(row, key, "needs a string")
    if not (value.strip() or may_be_empty):
        raise UserError(row.where, f"{key} is empty", _fill(key))
    return value


def _fill(key: str) -> str:
    """What to do where a column is empty."""
    return f"{REMOVE}, or --allow-empty-prompt" if key in ASKED else REMOVE


def messages_part(row: Row, key: str, may_be_empty: bool = False) -> Messages:
    """The messages of a column, a single one included; the last must say something, by its text or
    by a tool call, unless it may be empty."""
    value = row.columns.get(key)
    listed = [value] if isinstance(value, dict) else value
    if not isinstance(listed, list):
        raise wrong_column(row, key, "needs a list of messages")
    if not listed:
        raise UserError(row.where, f"{key} is empty", REMOVE)
    turns = []
    for number, message in enumerate(listed):
        try:
            turns.append(_message(message))
        except ValueError as error:
            what, do = error.args
            raise UserError(row.where, f"{key}[{number}]{what}", do) from None
    if not (turns[-1]["content"].strip() or turns[-1].get("tool_calls") or may_be_empty):
        raise UserError(row.where, f"{key}: the last message is empty", _fill(key))
    return turns


def _message(message: object) -> dict:
    """A message as chat templates read it, its content one text.

    Raises:
        ValueError: (what is wrong, behind the message's name; what to do).
    """
    if not isinstance(message, dict):
        raise ValueError(f" is {json_kind(message)}", "needs {role: ..., content: ...}")
    # Tables write null for what a message lacks; templates ask whether it is there.
    given, message = message, {name: v for name, v in message.items() if v is not None}
    if "from" in message and "role" not in message:
        message = _of_sharegpt(message)
    if message.get("tool_calls"):  # beside which there need be no text
        message.setdefault("content", "")
    if isinstance(parts := message.get("content"), list):
        for at, part in enumerate(parts):
            kind = part.get("type") if isinstance(part, dict) else json_kind(part)
            if kind != "text" or not isinstance(part.get("text"), str):
                what = f": content[{at}] is of type {printable(str(kind), 40)}"
                raise ValueError(what, "only {type: text, text: ...} is read")
        message["content"] = "".join(part["text"] for part in parts)
    for name in ("role", "content"):
        if not isinstance(message.get(name), str):
            got = json_kind(message.get(name, given[name])) if name in given else "missing"
            raise ValueError(f": {name} is {got}", "needs a string")
    return message


def _of_sharegpt(message: dict) -> dict:
    """A message of from and value, as ShareGPT and LLaMA-Factory write it."""
    name, value = message.pop("from"), message.pop("value", None)
    if not isinstance(name, str) or name not in SPEAKERS:
        raise ValueError(f": from is {printable(repr(name), 40)}", f"legal: {', '.join(SPEAKERS)}")
    if not isinstance(value, str):
        raise ValueError(f": value is {json_kind(value)}", "needs a string")
    if name != "function_call":
        return {"role": SPEAKERS[name], "content": value, **message}
    try:
        calls = json.loads(value)
        calls = calls if isinstance(calls, list) else [calls]
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, TypeError, KeyError, RecursionError):
        legal = "a function_call needs the JSON text of {name: ..., arguments: ...}"
        raise ValueError(f": value is {printable(repr(value), 40)}", legal) from None
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls, **message}


def turns_part(row: Row, key: str, may_be_empty: bool = False) -> Messages:
    """The messages of a column; a string is a turn, of the user in a prompt, else the answer."""
    if isinstance(row.columns.get(key), str):
        role = "user" if key == "prompt" else "assistant"
        return [{"role": role, "content": string_part(row, key, may_be_empty)}]
    turns = messages_part(row, key, may_be_empty)
    if key != "prompt" and turns[0]["role"] != "assistant":
        got = printable(turns[0]["role"], 40)
        raise UserError(row.where, f"{key} begins with role {got!r}", "needs 'assistant'")
    return turns


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


def is_chat(part: Part | None) -> bool:
    """Whether a part is messages."""
    return isinstance(part, list) and bool(part) and isinstance(part[0], dict)


def part_kind(value: object) -> str:
    """How a column's value is told apart: "text", "messages" or "other"."""
    if isinstance(value, str):
        return "text"
    listed = [value] if isinstance(value, dict) else value
    if isinstance(listed, list) and all(isinstance(item, dict) for item in listed):
        return "messages"
    return "other"


def hh_turns(text: str) -> Messages:
    r"""The turns of a transcript such as Anthropic's, without an empty last one; none where a text
    is no transcript.

    >>> hh_turns("\n\nHuman: Why?\n\nAssistant: Because.\n\nHuman: Why?\n\nAssistant:")[1:]
    [{'role': 'assistant', 'content': 'Because.'}, {'role': 'user', 'content': 'Why?'}]
    """
    before, *spoken = SPOKEN.split(text)
    if before.strip():
        return []
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = [
        {"role": roles[who], "content": said.strip()}
        for who, said in zip(spoken[::2], spoken[1::2], strict=True)
    ]
    return turns if not turns or turns[-1]["content"] else turns[:-1]


def as_turns(row: Row, parts: Parts) -> Parts:
    """The parts of a row with texts as turns: of a transcript its own, else the prompt as the
    user's and each answer as the assistant's. Messages and ids stay as they are.

    Raises:
        UserError: a whole text, which no turn is made of.
    """
    prompt, *answers = parts
    if not isinstance(prompt or parts[-1], str):
        return parts
    if prompt is None:
        do = "give prompts and answers, or leave out --chat"
        raise UserError(row.where, "a whole text is no turn of a dialogue", do)
    if turns := hh_turns(prompt):
        made = [hh_turns(f"\n\nAssistant:{text}") for text in answers]
        if not all(answer and answer[-1]["role"] == "assistant" for answer in made):
            raise UserError(row.where, "a transcript ends with a turn of the Human", REMOVE)
        return (turns, *made)
    said = [{"role": "assistant", "content": text} for text in answers]
    return ([{"role": "user", "content": prompt}], *([turn] for turn in said))


# How the text of messages begins, or of one, as JSON or Python writes it.
_PACKED = re.compile(
    r"""\s*(?:array\()?(?:\[\s*\{|\{\s*['"](?:role|content|from|value)['"]\s*:)"""
)
_NAMED = [re.compile(rf"""(['"])(?:{a})\1\s*:""") for a in ("role|from", "content|value")]
CELLS = (
    "text", "messages", "prompt", "completion", "response", "chosen", "rejected", "conversations",
    "context", "conversation_a", "conversation_b", "chosen_conversations", "rejected_conversations",
)


def unpack(row: Row) -> tuple[Row, list[str]]:
    """(the row with messages where a column has the JSON text of them, names of these columns).

    Raises:
        UserError: a column has messages in Python's spelling, or as broken JSON, which no model is
            to read or to learn.
    """
    found = {}
    for key in CELLS:
        text = row.columns.get(key)
        if not isinstance(text, str) or not _PACKED.match(text):
            continue
        try:
            value = strict_json(text, row.where)
        except UserError:
            if all(name.search(text) for name in _NAMED):
                do = "write it as JSON (json.dumps), or the file as JSON lines"
                what = f"{key} has messages in a text that is no JSON"
                raise UserError(row.where, what, do) from None
            continue
        listed = value if isinstance(value, list) else [value]
        names = {"role", "content"}, {"from", "value"}
        if all(isinstance(m, dict) and any(n <= m.keys() for n in names) for m in listed):
            found[key] = value
    return (replace(row, columns=row.columns | found) if found else row), list(found)
