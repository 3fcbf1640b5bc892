"""Names of control tokens inside texts and messages, and what keeps them text.

Text that comes from data is only ever text: "<|im_end|>" in a user's message is spelled out in
ordinary tokens, and no row of a data set can end a turn or forge a role.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from itertools import chain

from tokenizers import AddedToken

from minirlhf.data.parts import Messages
from minirlhf.errors import UserError

# Of templates in use; GLM's end a turn by the names of two of them.
ROLES = ("system", "user", "assistant", "tool", "developer", "function", "ipython", "observation")
THOUGHT = re.compile("think|thought|reason", re.IGNORECASE)


def pairs_of(names: Iterable[str]) -> set[str]:
    """Names that open something and those that close it.

    >>> sorted(pairs_of(["<think>", "</think>", "<s>", "[A]", "<|end_of_thought|>", "<|user|>",
    ...                  "<|begin_of_thought|>"]))
    ['</think>', '<think>', '<|begin_of_thought|>', '<|end_of_thought|>']
    """
    names, found = set(names), set()
    for name in names:
        closing = {name[:at] + "/" + name[at:] for at in (1, 2)}
        if THOUGHT.search(name):
            closing |= {re.sub("begin|start", "end", name), re.sub("BEGIN|START", "END", name)}
        for other in closing & names - {name}:
            found |= {name, other}
    return found


def learned_control(
    added: Mapping[int, AddedToken], eos_ids: Collection[int], named: Collection[str],
    written: Callable[[], tuple[str, str]],
) -> tuple[dict[int, str], dict[int, str]]:
    """(added tokens that control a dialogue without being special, thoughts), as a template says.

    Those that it writes around turns control, though they may not be special: some add ChatML's so.
    A special pair that stands around no turn but the assistant's is a thought.

    Args:
        named: bos, eos, unknown and padding, which are no thoughts.
        written: asked where it matters, what the template writes around turns that are not the
            assistant's, and all that it writes.
    """
    names = {id: token.content for id, token in added.items()}
    pairs = pairs_of(names.values())
    plain = {id: name for id, name in names.items()
             if not added[id].special and name.strip() and not name.isalnum()}
    thoughts = {id: name for id, name in names.items()
                if added[id].special and name in pairs and name not in named and id not in eos_ids}
    if not (plain or thoughts):
        return {}, {}
    around, anywhere = written()
    return (
        {id: name for id, name in plain.items()
         if name in around or (name in anywhere and name not in pairs)},
        {id: name for id, name in thoughts.items()
         if name not in around and (anywhere or THOUGHT.search(name))},
    )


def strings_of(value: object) -> Iterator[str]:
    """Every string of messages, keys too: a template may write those of a tool's arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from strings_of(child)
    elif isinstance(value, list):
        for child in value:
            yield from strings_of(child)


def _unused(text: str, codes: Iterable[int]) -> Iterator[str]:
    """Private-use characters, then unassigned ones, that do not stand in a text."""
    codes = chain(codes, range(0x40000, 0xE0000))
    yield from (chr(code) for code in codes if chr(code) not in text)
    raise UserError("a dialogue", "holds every private-use character", "remove the row")


def unused_character(messages: list) -> str:
    """A private-use character that stands nowhere in the messages."""
    return next(_unused("\0".join(strings_of(messages)), range(0x10FFFD, 0xF0000, -1)))


def swap_names(
    messages: list, names: re.Pattern, thoughts: Collection[str] = (), ends: Collection[str] = ()
) -> tuple[list, dict[str, str]]:
    """Puts one private-use character in place of each special token's name in the messages.

    So they stay text, whatever a chat template does with them. Once it has put its own tokens
    around the messages, nobody can tell whose are whose. A role from data is text too where a
    template that writes "<|" + role + "|>" could make one of `ends` of it.

    Args:
        messages: messages, or lists of messages that will be rendered together, and beside them
            what else the template sees by name.
        names: matches any special token's name.
        thoughts: names that are tokens in the assistant's turns, and stay as they are there.
        ends: names of tokens that begin or end a text or a turn.
    Returns:
        (messages, {character: name}); no character of it stood in the messages before.
    """
    text = "\0".join(strings_of(messages))
    found = dict.fromkeys(names.findall(text))
    found |= dict.fromkeys(role for role in _roles(messages) if _forges(role, ends))
    if not found:
        return messages, {}
    character = dict(zip(found, _unused(text, range(0xF0000, 0x10FFFE)), strict=False))

    def swap(value: object, kept: Collection[str]) -> object:
        if isinstance(value, str):
            return names.sub(lambda m: m[0] if m[0] in kept else character[m[0]], value)
        if isinstance(value, dict):
            return {swap(key, kept): swap(child, kept) for key, child in value.items()}
        return [swap(child, kept) for child in value] if isinstance(value, list) else value

    def swap_messages(value: object) -> object:
        """A message's own keys, as role and content, are for the template to know."""
        if isinstance(value, dict):
            role = value.get("role")
            kept = thoughts if role == "assistant" else ()
            swapped = {key: swap(child, kept) for key, child in value.items()}
            is_forged = isinstance(role, str) and role in character
            return swapped | {"role": character[role]} if is_forged else swapped
        return [swap_messages(child) for child in value]

    return swap_messages(messages), {mark: name for name, mark in character.items()}


def _roles(value: object) -> Iterator[str]:
    if isinstance(value, list):
        for child in value:
            yield from _roles(child)
    elif isinstance(value, dict) and isinstance(value.get("role"), str):
        yield value["role"]


def _forges(role: str, ends: Collection[str]) -> bool:
    """Whether a role that templates do not know may become one of `ends`, or end one.

    >>> [_forges(role, ["<|im_end|>"]) for role in ("user", "critic", "nd", "end", "a|>b<|c", "")]
    [False, False, False, True, True, True]
    """
    if role in ROLES:
        return False
    word = re.compile(rf"(?<![^\W_]){re.escape(role)}(?![^\W_])")
    return not re.fullmatch(r"\w[\w .-]*", role) or any(map(word.search, ends))


def marked(messages: Messages, mark: str, strip: bool = False) -> Messages:
    """With the mark behind the content of the last turn, in the place of blanks there if they are
    to be stripped; as they are where it is ""."""
    if not mark:
        return messages
    content = messages[-1]["content"]
    content = (content.rstrip() if strip else content) + mark
    return [*messages[:-1], messages[-1] | {"content": content}]


def begun(answer: Messages, mark: str) -> Messages:
    """With the mark before the content of the first turn, behind the blanks there."""
    content = answer[0].get("content") or ""
    blank = content[: len(content) - len(content.lstrip())]
    return [answer[0] | {"content": f"{blank}{mark}{content[len(blank) :]}"}, *answer[1:]]


def place_of(shown: str | UserError, text: str, mark: str) -> int | None:
    """Where the mark stands in a text that was rendered with it; None where it is lost, or has
    changed more than its place."""
    if isinstance(shown, UserError) or not shown.replace(mark, "").startswith(text):
        return None
    return at if (at := shown.find(mark)) >= 0 else None
