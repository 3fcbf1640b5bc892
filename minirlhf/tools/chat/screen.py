"""Answers on a terminal: side by side as they grow, and coloured once they have ended."""

import shutil
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from minirlhf.data.pieces import Piece
from minirlhf.run.terminal import fit, harmless, heat, on_background, width, wrap

GAP = " │ "
NARROWEST = 36  # columns of an answer that stands beside another


class Told(NamedTuple):
    """The number of each piece of an answer.

    Attributes:
        kind: reward, value, kl, advantage or logprob.
        about: what the numbers are, in a line.
        centre: the number that is white; values differ by less than they are.
    """

    kind: str
    about: str
    pieces: list[Piece]
    numbers: list[float]
    centre: float = 0.0

    @property
    def reach(self) -> float:
        """The distance from the centre of the deepest colour."""
        return max((abs(x - self.centre) for x in self.numbers), default=0.0) or 1.0

    def colors(self) -> list[tuple[int, int, int]]:
        return [heat((x - self.centre) / self.reach) for x in self.numbers]

    def legend(self, colored: bool) -> str:
        """The line that says what the colours mean, or the numbers of all pieces."""
        if colored:
            low, high = self.centre - self.reach, self.centre + self.reach
            ends = [(self.centre, heat(0))]
            ends[:0] = [(low, heat(-1))] * (min(self.numbers) < self.centre)
            ends += [(high, heat(1))] * (max(self.numbers) > self.centre)
            shown = (on_background(f" {number(x)} ", color) for x, color in ends)
            return f"{self.kind} {''.join(shown)} {self.about}"
        each = (f"{spelled(piece.text)}:{number(x)}"
                for piece, x in zip(self.pieces, self.numbers, strict=True))
        return f"{self.kind} ({self.about})  {'  '.join(each)}"


def number(x: float) -> str:
    """Signed, of two decimals, and no -0.00.

    >>> number(1.5), number(-0.001)
    ('+1.50', '+0.00')
    """
    return f"{round(x, 2) + 0.0:+.2f}"


def spelled(text: str) -> str:
    """A piece as one word: blanks and line ends have signs.

    >>> spelled(" a\\n")
    '␣a⏎'
    """
    return harmless(text).replace(" ", "␣").replace("\n", "⏎") or "∅"


def columns_for(count: int, room: int) -> int | None:
    """Columns of each of so many answers side by side; None where they would be too narrow."""
    each = (room - 1 - len(GAP) * (count - 1)) // count
    return each if count == 1 or each >= NARROWEST else None


class Columns:
    """Texts that grow side by side. A row is written once it is final in all of them, and the row
    behind them anew at each change: nothing but a carriage return moves the cursor.

    Args:
        each: columns of one text.
    """

    def __init__(self, out, count: int, each: int):
        self.out, self.each = out, each
        self.texts, self.ended, self.rows = [""] * count, [False] * count, 0

    def add(self, at: int, text: str) -> None:
        self.texts[at] += text
        self.draw()

    def end(self, at: int) -> None:
        self.ended[at] = True
        self.draw()

    def draw(self) -> None:
        lines = [wrap(text, self.each) for text in self.texts]
        most = max(map(len, lines))
        final = min(len(own) - 1 if not ended else most
                    for own, ended in zip(lines, self.ended, strict=True))
        shown = [self.row(lines, self.rows + more) for more in range(final - self.rows)]
        self.rows = max(final, self.rows)
        self.out.write("\r" + "".join(row + "\n" for row in shown))
        if self.rows < most:
            self.out.write(self.row(lines, self.rows))
        self.out.flush()

    def row(self, lines: Sequence[list[tuple[int, int]]], at: int) -> str:
        parts = [text[slice(*own[at])] if at < len(own) else ""
                 for text, own in zip(self.texts, lines, strict=True)]
        return GAP.join(fit(part, self.each) for part in parts)

    def color(self, told: Sequence[Told | None]) -> None:
        """Writes the ended texts anew over themselves, coloured; below them where they have left
        the screen at its top. A text without numbers stays as it is."""
        if 0 < self.rows < shutil.get_terminal_size().lines:
            self.out.write(f"\x1b[{self.rows}A\r\x1b[J")
        each = [
            [fit(text[slice(*line)], self.each) for line in wrap(text, self.each)] if one is None
            else list(painted(one, self.each)) for one, text in zip(told, self.texts, strict=True)
        ]
        for at in range(max(map(len, each))):
            blank = " " * self.each
            self.out.write(GAP.join(own[at] if at < len(own) else blank for own in each) + "\n")
        self.out.flush()


def painted(told: Told, room: int) -> Iterator[str]:
    """The lines of an answer with the colour of each piece, each of exactly `room` columns."""
    texts = [harmless(piece.text) for piece in told.pieces]
    whole, colors = "".join(texts), told.colors()
    for start, end in wrap(whole, room):
        line, at = "", 0
        for text, color in zip(texts, colors, strict=True):
            part = whole[max(at, start) : min(at + len(text), end)]
            line += on_background(part, color) if part else ""
            at += len(text)
        yield line + " " * (room - width(whole[start:end]))
