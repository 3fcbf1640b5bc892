"""Tables and equations in plain text, at most 100 columns wide where the numbers let them."""

from collections.abc import Sequence
from typing import NamedTuple

from minirlhf.errors import printable
from minirlhf.run.language import tell
from minirlhf.run.terminal import fit, width

WIDTH = 100


class Column(NamedTuple):
    """A column of a table: its title, a number a row, and what stands under them."""

    title: str
    values: Sequence[float | str]
    total: float | None = None  # the sum over all rows


class Page:
    """Lines that are collected, in one language, with so many decimals."""

    def __init__(self, language: str, decimals: int):
        self.language, self.decimals = language, decimals
        self.lines: list[str] = []

    def tell(self, sentence: str, **values: object) -> str:
        return tell(sentence, self.language, **values)

    def say(self, sentence: str, **values: object) -> None:
        self.lines += _wrapped(self.tell(sentence, **values), WIDTH)

    def blank(self) -> None:
        self.lines.append("")

    def text(self, title: str, text: object, lines: int = 3) -> None:
        """A text from a model or a file under its title, cut after some lines."""
        indent = fit(self.tell(title), 10)
        rest = printable(text, lines * (WIDTH - 12))
        for line in _wrapped(rest, WIDTH - width(indent)) or [""]:
            self.lines.append((indent + line).rstrip())
            indent = " " * 10

    def number(self, x: float) -> str:
        """With the page's decimals, and no -0."""
        told = f"{x:.{self.decimals}f}"
        return told.lstrip("-") if float(told) == 0 else told

    def term(self, x: float) -> str:
        """A number behind an operator: in parentheses where it is negative."""
        told = self.number(x)
        return f"({told})" if told.startswith("-") else told

    def table(self, texts: Sequence[str], columns: Sequence[Column], most: int | None,
              first: str = "token") -> None:
        """A line for each token, those in the middle left out where there are more than `most`.

        Args:
            texts: of each row, shown in a column of its own behind the row's number.
        """
        cells = [[x if isinstance(x, str) else self.number(x) for x in c.values] for c in columns]
        totals = ["" if c.total is None else self.number(c.total) for c in columns]
        titles = [self.tell(c.title) for c in columns]
        widths = [max(map(width, (title, total, *of_rows)))
                  for title, total, of_rows in zip(titles, totals, cells, strict=True)]
        head, under = self.tell(first), self.tell("sum of {rows}", rows=len(texts))
        widest = max(map(width, (head, under, *texts)))
        gap = "  " if 5 + width(under) + sum(2 + w for w in widths) <= WIDTH else " "
        left = WIDTH - 5 - sum(len(gap) + w for w in widths)
        room = min(widest, max(left, width(under)))
        shown = _shown(len(texts), most)
        self._row("", head, titles, room, widths, gap)
        for before, at in zip([-1, *shown], shown, strict=False):
            if at > before + 1:
                self.lines.append(f"     … {self.tell('{count} more', count=at - before - 1)}")
            self._row(str(at), texts[at], [of_rows[at] for of_rows in cells], room, widths, gap)
        if any(totals):
            self._row("", under, totals, room, widths, gap)

    def _row(
        self, number: str, text: str, cells: list[str], room: int, widths: list[int], gap: str
    ) -> None:
        told = (" " * (w - width(cell)) + cell for cell, w in zip(cells, widths, strict=True))
        self.lines.append(gap.join([f"{number:>3}  {fit(text, room)}", *told]).rstrip())

    def equation(self, name: str, formula: str, numbers: str, result: float) -> None:
        """name = formula = the same in numbers = result, in as many lines as it takes."""
        parts = [part for part in (formula, numbers, self.number(result)) if part]
        line = f"  {name}"
        for part in parts:
            if width(line) + 3 + width(part) > WIDTH:
                self.lines.append(line)
                line = f"  {' ' * len(name)}"
            line += f" = {part}"
        self.lines.append(line)


def _shown(rows: int, most: int | None) -> list[int]:
    if most is None or rows <= most:
        return list(range(rows))
    first = (most + 1) // 2
    return [*range(first), *range(rows - (most - first), rows)]


def _wrapped(text: str, room: int) -> list[str]:
    """Lines of at most `room` columns, broken at spaces where there are any."""
    lines, rest = [], text
    while rest:
        end, used = 0, 0
        while end < len(rest) and used + width(rest[end]) <= room:
            used += width(rest[end])
            end += 1
        space = rest.rfind(" ", 1, end)
        if end < len(rest) and space > end // 2:
            end = space
        lines.append(rest[:end])
        rest = rest[end:].removeprefix(" ") if end < len(rest) else ""
    return lines
