"""Curves of a run as a small SVG picture, which browsers and READMEs show; no library is needed.

>>> picture = draw("step", [1, 2, 3], [Panel("KL, nats", {"policy": [0.0, 1.0, 1.5]})])
>>> picture.startswith("<svg") and picture.count("<polyline")
1
"""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from minirlhf.evaluation.report.curves import axis

WIDTH, HEIGHT = 640, 190  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 24  # around a panel's frame
COLORS = ("#1f6feb", "#d1591f", "#2a8a4a")
INK, GRID = "#333333", "#d9dde3"


class Panel(NamedTuple):
    title: str  # what it shows, with the unit
    curves: dict[str, Sequence[float]]  # name -> y at each x; at most three


def draw(x_title: str, xs: Sequence[float], panels: Sequence[Panel]) -> str:
    """The panels one below the other, each over its x axis; the same numbers, the same bytes.

    Args:
        xs: one or more finite numbers, ascending.
        panels: of finite numbers.
    """
    height = HEIGHT * len(panels) + BOTTOM
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for at, panel in enumerate(panels):
        lines += _panel(panel, xs, HEIGHT * at)
    lines.append(_text(WIDTH - RIGHT, height - 6, x_title, "end"))
    return "\n".join([*lines, "</svg>"]) + "\n"


def _panel(panel: Panel, xs: Sequence[float], top: int) -> list[str]:
    across, up = axis(xs, 10), axis(y for ys in panel.curves.values() for y in ys)

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - across[0]) / (across[-1] - across[0]) * (WIDTH - LEFT - RIGHT)
        down = (up[-1] - y) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM)
        return LEFT + right, top + TOP + down

    lines = [_text(LEFT, top + 20, panel.title, "start")]
    for tick in up:
        x, y = place(across[0], tick)
        lines.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        lines.append(_text(x - 8, y + 4, f"{tick:g}", "end"))
    lines += [_text(place(x, 0)[0], top + HEIGHT - 6, f"{x:g}", "middle") for x in across]
    for at, (name, ys) in enumerate(panel.curves.items()):
        points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
        shown = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        line = f'fill="none" stroke="{COLORS[at]}" stroke-width="2"'
        lines.append(f'<polyline points="{shown}" {line}/>')
        if len(panel.curves) > 1:
            lines.append(_text(WIDTH - RIGHT - 80 * at, top + 20, name, "end", COLORS[at]))
    return lines


def _text(x: float, y: float, text: str, anchor: str, color: str = INK) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"'
    return f"<text {place}>{escape(text)}</text>"
