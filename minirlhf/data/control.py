"""Names of control tokens inside texts and messages, and what keeps them text.

Text that comes from data is only ever text: "<|im_end|>" in a user's message is spelled out in
ordinary tokens, and no row of a data set can end a turn or forge a role.
"""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from tokenizers import AddedToken

from minirlhf.data.parts import Messages
from minirlhf.errors import UserError

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


def unused_character(messages: list) -> str:
    """A private-use character that stands nowhere in the messages."""
    text = "\0".join(strings_of(messages))
    return next(chr(code) for code in range(0x10FFFD, 0xF0000, -1) if chr(code) not in text)


def swap_names(
    messages: list, names: re.Pattern, thoughts: Collection[str] = ()
) -> tuple[list, dict[str, str]]:
    """Puts one private-use character in place of each special token's name in the messages.

    So they stay text, whatever a chat template does with them. Once it has put its own tokens
    around the messages, nobody can tell whose are whose.

    Args:
        messages: messages, or lists of messages that will be rendered together, and beside them
            what else the template sees by name.
        names: matches any special token's name.
        thoughts: names that are tokens in the assistant's turns, and stay as they are there.
    Returns:
        (messages, {character: name}); no character of it stood in the messages before.
    """
    text = "\0".join(strings_of(messages))
    found = dict.fromkeys(names.findall(text))
    if not found:
        return messages, {}
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in text)
    character = dict(zip(found, free, strict=False))

    def swap(value: object, kept: Collection[str]) -> object:
        if isinstance(value, str):
            return names.sub(lambda m: m[0] if m[0] in kept else character[m[0]], value)
        if isinstance(value, dict):
            return {swap(key, kept): swap(child, kept) for key, child in value.items()}
        return [swap(child, kept) for child in value] if isinstance(value, list) else value

    def swap_messages(value: object) -> object:
        """A message's own keys, as role and content, are for the template to know."""
        if isinstance(value, dict):
            kept = thoughts if value.get("role") == "assistant" else ()
            return {key: swap(child, kept) for key, child in value.items()}
        return [swap_messages(child) for child in value]

    return swap_messages(messages), {mark: name for name, mark in character.items()}


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
