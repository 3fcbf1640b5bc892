"""A metric over the steps as an SVG picture: round axes, one polyline a run, gaps left open.

>>> picture([Series([1, 2, 3], [0, 1, 0.5])]).count("<polyline")
1
"""

import math
from collections.abc import Iterable, Sequence
from html import escape
from math import ceil, floor, log10

from minirlhf.evaluation.report.record import Series

WIDTH, HEIGHT = 360, 168  # of a picture; a phone shows one across, a desktop three
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 10, 22  # around the frame
BUCKETS = 300  # that many lines of a log and fewer are drawn one by one

Point = tuple[float, float]


def axis(values: Iterable[float], most: int = 6, least: float = 0.0) -> list[float]:
    """Equally spaced round numbers, about `most`, that span the values; two or more, `least` apart
    at least.

    >>> axis([-0.33, 0.61])
    [-0.4, -0.2, 0.0, 0.2, 0.4, 0.6, 0.8]
    """
    values = list(values)
    low, high = min(values), max(values)
    span, size = high - low, max(abs(low), abs(high))
    if span <= 1e-9 * size or span < 1e-300:  # one value: nothing finer could be told apart
        span = size if size > 1e3 or 0 < size < 1e-2 else 1.0
    power = 10.0 ** floor(log10(span / most))
    step = next(digit * power for digit in (1, 2, 5, 10) if span <= most * digit * power)
    step = max(step, least)
    last = max(ceil(high / step), floor(low / step) + 1)
    return [float(f"{tick * step:.12g}") for tick in range(floor(low / step), last + 1)]


def labels(ticks: Sequence[float]) -> list[str]:
    """The ticks in as few digits as tell them apart, whole ones whole.

    >>> labels([1e6, 1000000.5]), labels([0.0, 20000.0])
    (['1000000', '1000000.5'], ['0', '20000'])
    """
    if all(tick == int(tick) and abs(tick) < 1e7 for tick in ticks):
        return [f"{tick:.0f}" for tick in ticks]
    for digits in range(4, 18):
        told = [f"{tick:.{digits}g}" for tick in ticks]
        if len(set(told)) == len(ticks):
            break
    return told


def thinned(series: Series, buckets: int = BUCKETS) -> list[list[Point]]:
    """The points to draw, in pieces between gaps.

    Of more than two values a bucket, neighbouring ones share it, and its lowest and highest are
    kept, in their order: no spike is lost. A bucket with a value that is not finite ends a piece.
    """
    values, count = series.values, len(series.values)
    size = ceil(count / buckets) if count > 2 * buckets else 1
    pieces: list[list[Point]] = [[]]
    for start in range(0, count, size):
        bucket = range(start, min(start + size, count))
        finite = [(values[i], i) for i in bucket if not math.isnan(values[i])]
        if finite:
            kept = sorted({min(finite)[1], max(finite)[1]})
            pieces[-1] += [(series.steps[i], values[i]) for i in kept]
        if len(finite) < len(bucket) and pieces[-1]:
            pieces.append([])
    return [piece for piece in pieces if piece]


def picture(runs: Sequence[Series | None], label: str = "", buckets: int = BUCKETS) -> str:
    """The SVG of one metric, in the page's colours; "" where no value is finite.

    Args:
        runs: the metric of each run, None where it has none; the k-th is drawn in colour k.
        label: what a screen reader says of it.
    """
    drawn = [(k, thinned(series, buckets)) for k, series in enumerate(runs) if series is not None]
    points = [point for _, pieces in drawn for piece in pieces for point in piece]
    if not points:
        return ""
    xs = {x for x, _ in points}
    if len(xs) == 1:  # in the middle
        xs |= {min(xs) - 1, min(xs) + 1}
    across, up = axis(xs, 6, 1.0), axis((y for _, y in points), 4)

    def place(x: float, y: float) -> Point:
        right = (x - across[0]) / (across[-1] - across[0]) * (WIDTH - LEFT - RIGHT)
        down = (up[-1] - y) / (up[-1] - up[0]) * (HEIGHT - TOP - BOTTOM)
        return LEFT + right, TOP + down

    lines = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">']
    for tick, text in zip(up, labels(up), strict=True):
        y = place(across[0], tick)[1]
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>'
                     f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick, text in zip(across, labels(across), strict=True):
        x = place(tick, up[0])[0]
        lines.append(f'<text x="{x:.1f}" y="{HEIGHT - 6}" text-anchor="middle">{text}</text>')
    for k, pieces in drawn:
        for piece in pieces:
            shown = ["{:.1f},{:.1f}".format(*place(*point)) for point in piece]
            # A point alone is a line of no length, whose round ends make a dot.
            dot, shown = (" dot", 2 * shown) if len(shown) == 1 else ("", shown)
            lines.append(f'<polyline class="run{k}{dot}" points="{" ".join(shown)}"/>')
    return "".join([*lines, "</svg>"])


def told(value: float | None) -> str:
    """A number for people: four digits, whole and large ones whole.

    >>> told(0.123456), told(20480.0), told(12345.6), told(None)
    ('0.1235', '20,480', '12,346', '–')
    """
    if value is None:
        return "–"
    whole = 1e4 <= abs(value) < 1e7 or (abs(value) < 1e15 and value == int(value))
    return f"{value:,.0f}" if whole else f"{value:.4g}"
