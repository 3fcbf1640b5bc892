"""What rows of published data sets ask: the prompt of each shape in published.py."""

from minirlhf.data.parts import Messages, hh_turns, messages_part, string_part, wrong_column
from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind, strict_json
from minirlhf.files.rows import Row


def turn(role: str, text: str) -> Messages:
    return [{"role": role, "content": text}]


def text_of(row: Row, name: str, value: object) -> str:
    """A value that must be a text, called by a name."""
    if not isinstance(value, str):
        raise UserError(row.where, f"{name} is {json_kind(value)}", "needs a string")
    return value


def several(row: Row, key: str) -> list:
    """The list in a column, which may be its JSON text; of a plain text, a list of it alone."""
    value = row.columns[key]
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        try:
            value = strict_json(value, row.where)
        except UserError as error:
            raise UserError(row.where, f"{key}: {error.what}", error.do) from None
    return value if isinstance(value, list) else [value]


def _optional(row: Row, key: str) -> str:
    """The text of a column that may be empty or missing."""
    return string_part(row, key, may_be_empty=True) if row.columns.get(key) is not None else ""


def nothing(row: Row) -> dict:
    """Of a row that has whole dialogues, of which formats.py finds the prompt."""
    return {}


def asked(row: Row, key: str) -> dict:
    """A column's text as the user's turn."""
    return {"prompt": turn("user", string_part(row, key))}


def instruction(row: Row, more: str = "input") -> dict:
    """The turns of an alpaca row before its answer, as LLaMA-Factory joins them."""
    system = _optional(row, "system")
    turns = turn("system", system) if system.strip() else []
    for at, said in enumerate(several(row, "history") if row.columns.get("history") else []):
        if not isinstance(said, list) or len(said) != 2:
            legal = "needs [user's text, assistant's text]"
            raise UserError(row.where, f"history[{at}] is {json_kind(said)}", legal)
        user, assistant = (text_of(row, f"history[{at}]", text) for text in said)
        turns += turn("user", user) + turn("assistant", assistant)
    texts = [_optional(row, "instruction"), _optional(row, more)]
    if not any(map(str.strip, texts)):
        raise UserError(row.where, "instruction is empty", "remove the row or fill it in")
    return {"prompt": turns + turn("user", "\n".join(text for text in texts if text.strip()))}


def dialogue(row: Row, key: str, name: str = "messages") -> dict:
    """Messages behind the system's turn of a column of its own; `name` is our column's."""
    turns, system = messages_part(row, key, may_be_empty=True), _optional(row, "system")
    told = system.strip() and turns[0]["role"] != "system"
    return {name: (turn("system", system) if told else []) + turns}


def context(row: Row) -> dict:
    return {"prompt": messages_part(row, "context")}


def question(row: Row) -> dict:
    """Behind the system's turn, if there is one."""
    system = _optional(row, "system")
    said = turn("system", system) if system.strip() else []
    return {"prompt": said + turn("user", string_part(row, "question"))}


def full_question(row: Row) -> dict:
    """Of WebGPT, where it may be an object."""
    value = row.columns["question"]
    if isinstance(value, dict):
        value = value.get("full_text")
    return {"prompt": turn("user", text_of(row, "question's full_text", value))}


def post(row: Row) -> dict:
    """The prompt that Stiennon et al. 2020 (arXiv:2009.01325) sampled summaries with."""
    info = row.columns["info"]
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
    return {"prompt": "\n\n".join([*parts, "TL;DR:"])}


def transcript(row: Row) -> dict:
    """The turns of a prompt of Nectar, told by Human: and Assistant:."""
    turns = hh_turns(string_part(row, "prompt"))
    if not turns or turns[-1]["role"] != "user":
        raise UserError(row.where, "prompt ends with no turn of a Human", r"like '\n\nHuman: Why?'")
    return {"prompt": turns}
