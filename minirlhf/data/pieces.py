"""A text token by token, for people: characters that several tokens share are shown once whole."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from minirlhf.data.tokenizer import Tokenizer

BROKEN = "\ufffd"  # what decoders write for bytes that are no character yet
LONGEST = 8  # tokens that one character may take: bytes of an emoji with its modifiers


class Piece(NamedTuple):
    """Tokens `start` to `end` (not included) of a response, and the text that they write."""

    start: int
    end: int
    text: str


def each_piece(
    tokenizer: Tokenizer, before: Sequence[int], ids: Iterable[int]
) -> Iterator[Piece]:
    """As `pieces`, each as soon as its tokens are there: for a text that is still being sampled."""
    row, group = list(before), []
    for id in ids:
        group.append(id)
        text = tokenizer.decode_after(row, group)
        if text.endswith(BROKEN) and len(group) < LONGEST:
            continue
        yield _piece(tokenizer, len(row) - len(before), group, text)
        row, group = row + group, []
    if group:
        text = tokenizer.decode_after(row, group)
        yield _piece(tokenizer, len(row) - len(before), group, text)


def _piece(tokenizer: Tokenizer, start: int, group: list[int], text: str) -> Piece:
    shown = text or tokenizer.decode(group, skip_special=False)
    return Piece(start, start + len(group), shown)


def pieces(tokenizer: Tokenizer, before: Sequence[int], ids: Sequence[int]) -> list[Piece]:
    """The tokens `ids` after those `before` them, in the smallest groups that decode to whole text.

    Control tokens are shown by their names. The texts, joined, are what the response shows; bytes
    that never become a character are shown as U+FFFD, a piece of at most LONGEST tokens.
    """
    return list(each_piece(tokenizer, before, ids))
