"""A text token by token, for people: characters that several tokens share are shown once whole."""

from collections.abc import Sequence
from typing import NamedTuple

from minirlhf.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what decoders write for bytes that are no character yet
LONGEST = 8  # tokens that one character may take: bytes of an emoji with its modifiers


class Piece(NamedTuple):
    """Tokens `start` to `end` (not included) of a response, and the text that they write."""

    start: int
    end: int
    text: str


def pieces(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> list[Piece]:
    """The tokens `ids` after those `before` them, in the smallest groups that decode to whole text.

    Control tokens are shown by their names. The texts, joined, are what the response shows; bytes
    that never become a character are shown as U+FFFD, a piece of at most LONGEST tokens.
    """
    found, start, row = [], 0, [*before, *ids]
    for end in range(1, len(ids) + 1):
        group = list(ids[start:end])
        text = tokenizer.decode_after(row[: len(before) + start], group)
        if text.endswith(BROKEN) and len(group) < LONGEST and end < len(ids):
            continue
        found.append(Piece(start, end, text or tokenizer.decode(group, skip_special=False)))
        start = end
    return found
