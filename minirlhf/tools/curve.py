"""Curves of a run as a small SVG picture, which a browser and a README show; no library is needed.

>>> picture = draw("step", [1, 2, 3], [Panel("KL, nats", {"policy": [0.0, 1.0, 1.5]})])
>>> picture.startswith("<svg") and picture.count("<polyline")
1
"""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 190  # of a panel, in pixels
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 34, 24  # around a panel's frame
COLORS = ("#1f6feb", "#d1591f", "#2a8a4a")
GRID, INK = "#d9dde3", "#333"


class Panel(NamedTuple):
    title: str  # what it shows, with the unit
    curves: dict[str, Sequence[float]]  # name -> y at each x, at most three curves


def round_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten from low to high, at most `most` of them.

    >>> round_ticks(-0.33, 0.61)
    [-0.2, 0.0, 0.2, 0.4, 0.6]
    """
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(d * power for d in (1, 2, 5, 10, 20) if (high - low) / (d * power) < most)
    ticks = range(math.ceil(low / step), math.floor(high / step) + 1)
    return [round(tick * step, 10) for tick in ticks]


def draw(x_title: str, xs: Sequence[float], panels: Sequence[Panel]) -> str:
    """The panels one below the other, above one x axis. The same numbers give the same bytes.

    Args:
        xs: finite and ascending, two or more.
        panels: of finite numbers.
    """
    height = HEIGHT * len(panels) + BOTTOM
    body = [
        line for at, panel in enumerate(panels) for line in _panel(panel, xs, HEIGHT * at)
    ]
    body.append(_text(WIDTH - RIGHT, height - 6, x_title, "end"))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
    head += f'font-family="sans-serif" font-size="12" fill="{INK}">'
    background = f'<rect width="{WIDTH}" height="{height}" fill="white"/>'
    return "\n".join([head, background, *body, "</svg>"]) + "\n"


def _panel(panel: Panel, xs: Sequence[float], top: float) -> list[str]:
    ys = [y for curve in panel.curves.values() for y in curve]
    low, high = min(ys), max(ys)
    high = high if high > low else low + 1  # a constant has an axis too

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - xs[0]) / (xs[-1] - xs[0]) * (WIDTH - LEFT - RIGHT)
        down = (high - y) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return LEFT + across, top + TOP + down

    lines = []
    for tick in round_ticks(low, high):
        x, y = place(xs[0], tick)
        lines.append(f'<path d="M{x:.1f} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID}"/>')
        lines.append(_text(x - 8, y + 4, f"{tick:g}", "end"))
    lines += [_text(place(x, low)[0], top + HEIGHT - 4, f"{x:g}", "middle")
              for x in round_ticks(xs[0], xs[-1], 9)]
    lines.append(_text(LEFT, top + 20, panel.title, "start"))
    for at, (name, curve) in enumerate(panel.curves.items()):
        points = " ".join("{:.1f},{:.1f}".format(*place(*p)) for p in zip(xs, curve, strict=True))
        style = f'fill="none" stroke="{COLORS[at]}" stroke-width="2"'
        lines.append(f'<polyline points="{points}" {style}/>')
        if len(panel.curves) > 1:
            lines.append(_text(WIDTH - RIGHT - 110 * at, top + 20, name, "end", COLORS[at]))
    return lines


def _text(x: float, y: float, text: str, anchor: str, color: str = INK) -> str:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{color}"'
    return f"<text {place}>{escape(text)}</text>"
