"""Names of special tokens inside messages: they stay text, whatever a chat template does with them.

Once a template has put its own tokens around the messages, nobody can tell whose are whose. So each
name in the messages gives way, before the template sees them, to a character that is used nowhere.
"""

import re
from collections.abc import Iterator


def _strings(value: object) -> Iterator[str]:
    """Every string of messages, keys too: a template may write those of a tool's arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, child in value.items():
            yield key
            yield from _strings(child)
    elif isinstance(value, list):
        for child in value:
            yield from _strings(child)


def unused_character(messages: list) -> str:
    """A private-use character that stands nowhere in the messages."""
    text = "\0".join(_strings(messages))
    return next(chr(code) for code in range(0x10FFFD, 0xF0000, -1) if chr(code) not in text)


def swap_names(messages: list, names: re.Pattern) -> tuple[list, dict[str, str]]:
    """Puts one private-use character in place of each special token's name in the messages.

    Once a template has put its own tokens around them, nobody can tell theirs from its own.

    Args:
        messages: messages, or lists of messages that will be rendered together.
        names: matches any special token's name.
    Returns:
        (messages, {character: name}); no character of it stood in the messages before.
    """
    text = "\0".join(_strings(messages))
    found = dict.fromkeys(names.findall(text))
    if not found:
        return messages, {}
    free = (chr(code) for code in range(0xF0000, 0x10FFFE) if chr(code) not in text)
    character = dict(zip(found, free, strict=False))

    def swap(value: object) -> object:
        if isinstance(value, str):
            return names.sub(lambda match: character[match[0]], value)
        if isinstance(value, dict):
            return {swap(key): swap(child) for key, child in value.items()}
        return [swap(child) for child in value] if isinstance(value, list) else value

    def swap_messages(value: object) -> object:
        """A message's own keys, as role and content, are for the template to know."""
        if isinstance(value, dict):
            return {key: swap(child) for key, child in value.items()}
        return [swap_messages(child) for child in value]

    return swap_messages(messages), {mark: name for name, mark in character.items()}
