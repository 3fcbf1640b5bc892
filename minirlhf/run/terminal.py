"""What a terminal can show: colours where it has them and nobody minds, and the width of texts."""

import os
import shutil
import sys
import unicodedata
from collections.abc import Sequence
from itertools import takewhile
from typing import TextIO

RESET = "\x1b[0m"


def has_color(stream: TextIO | None = None) -> bool:
    """Whether a stream (stdout) shows colours: a terminal, unless NO_COLOR (https://no-color.org)
    or TERM=dumb says no."""
    stream = sys.stdout if stream is None else stream
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return not plain and stream.isatty()


def columns(stream: TextIO | None = None) -> int | None:
    """Columns of the terminal that a stream (stdout) is; None where it is none: a file has room."""
    stream = sys.stdout if stream is None else stream
    return shutil.get_terminal_size().columns if stream.isatty() else None


def heat(value: float) -> tuple[int, int, int]:
    """Red, green, blue of a background: from blue (-1) over none (0, white) to red (1).

    >>> heat(0.0), heat(1.0), heat(-1.0)
    ((255, 255, 255), (239, 138, 98), (103, 169, 207))
    """
    share = min(abs(value), 1.0)
    end = (239, 138, 98) if value > 0 else (103, 169, 207)  # ColorBrewer's RdBu, of 3 classes
    return tuple(round(255 + share * (channel - 255)) for channel in end)


def on_background(text: str, color: tuple[int, int, int]) -> str:
    """The text in black on a 24-bit colour, as a terminal reads it."""
    red, green, blue = color
    return f"\x1b[30;48;2;{red};{green};{blue}m{text}{RESET}"


def bold(text: str) -> str:
    return f"\x1b[1m{text}{RESET}"


def yellow(text: str) -> str:
    return f"\x1b[33m{text}{RESET}"


def width(text: str) -> int:
    """Columns that a text takes in a terminal: a Chinese character or an emoji takes two, an accent
    on the letter before it none.

    >>> width("ab"), width("奖励"), width("e\\u0301")
    (2, 4, 1)
    """
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    none = sum(bool(unicodedata.combining(c)) or c in "\u200d\ufe0e\ufe0f" for c in text)
    return len(text) + wide - none


def fit(text: str, room: int) -> str:
    """The text in exactly so many columns: padded with spaces, or cut with "…".

    >>> fit("奖励模型", 7), fit("ab", 4)
    ('奖励模…', 'ab  ')
    """
    if width(text) > room:
        while text and width(text) > room - 1:
            text = text[:-1]
        text += "…" if room else ""
    return text + " " * (room - width(text))


def differing(texts: Sequence[str], room: int) -> list[str]:
    """Texts in `room` columns each, from the word in which they first differ: what they all begin
    with is left out as "…".

    >>> differing(["It is a good film.", "It is a bad film."], 12)
    ['… good film.', '… bad film. ']
    """
    start = 0
    if max(map(width, texts)) > room:
        alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
        end = len(list(alike))
        start = texts[0].rfind(" ", 0, end) + 1
        if width(texts[0][start:end]) > room // 2:  # a word without end, or a script without blanks
            start = end
    return [fit(f"… {text[start:]}" if start else text, room) for text in texts]


def harmless(text: str) -> str:
    """A text that came from a model or a file, with all that would act on a terminal written out;
    line ends, blanks of all kinds and the joiners of emoji stay, a tab becomes four blanks.

    >>> harmless("a\\tb\\n\\x1b[2J"), harmless("奖\\u3000励")
    ('a    b\\n\\\\x1b[2J', '奖\\u3000励')
    """
    def shown(c: str) -> str:
        if c.isprintable() or c in "\n\u200c\u200d" or unicodedata.category(c) == "Zs":
            return c
        return c.encode("unicode_escape").decode()

    return "".join(map(shown, text.replace("\t", "    ")))


def wrap(text: str, room: int) -> list[tuple[int, int]]:
    """Where each line of a text begins and ends (not included), in so many columns: cut at line
    ends, at blanks, and within a word that is longer. A line that another follows is final: what
    is added to the text does not change it.

    >>> wrap("so it was", 5), wrap("奖励模型", 5), wrap("a\\n", 5)
    ([(0, 5), (6, 9)], [(0, 2), (2, 4)], [(0, 1), (2, 2)])
    """
    lines, start, used, blank = [], 0, 0, None  # blank: the last one of the line
    for at, c in enumerate(text):
        used += width(c)
        if c != "\n" and used <= room:
            blank = at if c == " " else blank
            continue
        if c in "\n ":
            end, then = at, at + 1
        elif blank is None or width(c) == 2:  # before a Chinese character any line may end
            end, then = at, at
        else:
            end, then = blank, blank + 1
        lines.append((start, end))
        start, used, blank = then, width(text[then : at + 1]), None
    return [*lines, (start, len(text))]
