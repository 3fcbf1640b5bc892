"""What a row tells its chat template by name, beside the messages: tools, and what else it reads.

Both columns stay among a row's others, where all who render its messages find them: recipes,
`sample` and who reads what it writes, reward models with a tokenizer of their own.
"""

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from types import MappingProxyType

from minirlhf.errors import UserError, printable
from minirlhf.files.reading import json_kind, strict_json
from minirlhf.files.rows import Row

ARGUMENTS = ("tools", "chat_template_kwargs")  # columns
NONE: Mapping[str, object] = MappingProxyType({})
# What the renderer sets itself, and what transformers' apply_chat_template takes for itself.
SET = frozenset("""
    messages add_generation_prompt tools strftime_now raise_exception bos_token eos_token unk_token
    pad_token sep_token cls_token mask_token conversation chat_template continue_final_message
    tokenize sanitize_control_tokens padding truncation max_length return_tensors return_dict
    return_assistant_tokens_mask tokenizer_kwargs
""".split())


def given_arguments(words: Iterable[str]) -> dict[str, object]:
    """name -> value of legal words such as enable_thinking=false: JSON, or else a string."""
    found: dict[str, object] = {}
    for word in words:
        name, _, value = word.partition("=")
        found[name] = value
        with suppress(UserError):
            found[name] = strict_json(value, name)
    return found


def argument_problems(words: Iterable[str]) -> list[str]:
    """What is wrong with such words, in sentences; none where `given_arguments` can read them."""
    found, names = [], []
    for word in words:
        name, equals, _ = word.partition("=")
        if not (name and equals):
            got = printable(repr(word), 80)
            found.append(f"template_kwargs: got {got}, must be NAME=VALUE, as in x=false")
        elif name in SET:
            found.append(f"template_kwargs: {name} {_why(name)}")
        elif name in names:
            found.append(f"template_kwargs: two for {printable(name, 40)}")
        names.append(name)
    return found


def _why(name: str) -> str:
    return "is a column of its own" if name == "tools" else "is set by the renderer"


def template_arguments(columns: Mapping[str, object], where: str) -> dict[str, object]:
    """What a chat template sees by name of a row with these columns.

    Args:
        where: "file:line".
    Raises:
        UserError: tools are no list of objects nor the JSON text of one; chat_template_kwargs are
            no object nor the text of one, or hold a name that the renderer sets.
    """
    tools, others = (_value(columns.get(name), name, where) for name in ARGUMENTS)
    if not (tools is None or isinstance(tools, list)):
        raise _wrong(where, "tools", tools, "a list of JSON schemas")
    for at, tool in enumerate(tools or ()):
        if not isinstance(tool, dict):
            raise _wrong(where, f"tools[{at}]", tool, "a JSON schema, an object")
    others = {} if others is None else others
    if not isinstance(others, dict):
        raise _wrong(where, "chat_template_kwargs", others, "an object")
    for name in others:
        if name in SET:
            raise UserError(where, f"chat_template_kwargs: {name} {_why(name)}", "leave it out")
    return others if tools is None else {"tools": tools} | others


def _value(value: object, name: str, where: str) -> object:
    """Of a cell: as it is, or of its JSON text; tables leave it empty where there is none."""
    if not isinstance(value, str):
        return value
    try:
        return strict_json(value, name) if value.strip() else None
    except UserError as error:
        what = f"{name} is {printable(repr(value), 40)}"
        raise UserError(where, what, f"no JSON text: {error.what}") from None


def _wrong(where: str, name: str, value: object, legal: str) -> UserError:
    return UserError(where, f"{name} is {json_kind(value)}", f"needs {legal}, or its JSON text")


def with_arguments(row: Row, given: Mapping[str, object]) -> Row:
    """The row, which has also what is given to all rows; its own names win.

    Raises:
        UserError: as in `template_arguments`.
    """
    own = template_arguments(row.columns, row.where)
    if not given:
        return row
    own.pop("tools", None)
    return replace(row, columns=row.columns | {"chat_template_kwargs": {**given, **own}})
