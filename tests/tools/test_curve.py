"""Pictures of curves: well-formed SVG, points where they belong, the same bytes each time."""

import xml.etree.ElementTree as ET

import pytest

from minirlhf.tools.curve import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Panel, axis, draw

SVG = "{http://www.w3.org/2000/svg}"


def points_of(picture: str) -> list[list[tuple[float, ...]]]:
    """Pixels of each curve."""
    lines = ET.fromstring(picture).iter(f"{SVG}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ([0.2, 0.9], [0.2, 0.4, 0.6, 0.8, 1.0]),
        ([-7.0, 31.0], [-10, 0, 10, 20, 30, 40]),
        ([4, 32], [0, 5, 10, 15, 20, 25, 30, 35]),
        ([2.0], [2.0, 2.2]),  # one point has an axis too
        ([0.0, 0.0], [0.0, 0.2]),
        ([1e-9, 3e-9], [1e-9, 1.5e-9, 2e-9, 2.5e-9, 3e-9]),
    ],
)
def test_axis_spans_the_values_in_round_steps(values, ticks):
    assert axis(values) == pytest.approx(ticks)


def test_draw_puts_points_where_the_axes_say():
    # x axis 0 to 10, y axis 0 to 2; the second panel is one HEIGHT below
    panels = [Panel("a", {"one": [0, 1, 2]}), Panel("b", {"two": [2, 0, 2]})]
    picture = draw("step", [0, 5, 10], panels)
    left, right, middle = LEFT, WIDTH - RIGHT, (LEFT + WIDTH - RIGHT) / 2
    top, bottom = TOP, HEIGHT - BOTTOM
    first, second = points_of(picture)
    assert first == [(left, bottom), (middle, (top + bottom) / 2), (right, top)]
    assert second == [(left, HEIGHT + top), (middle, HEIGHT + bottom), (right, HEIGHT + top)]


def test_draw_names_curves_where_there_are_several():
    texts = [
        [text.text for text in ET.fromstring(draw("step", [1, 2], [panel])).iter(f"{SVG}text")]
        for panel in (Panel("r < 1 & more", {"a": [1, 2], "b": [0, 1]}), Panel("r", {"a": [1, 2]}))
    ]
    assert {"r < 1 & more", "a", "b", "step"} <= set(texts[0])
    assert {"r", "step"} <= set(texts[1]) and "a" not in texts[1]


def test_draw_gives_the_same_bytes_and_stays_inside():
    xs, ys = list(range(1, 33)), [(i * 7919 % 101) / 13 - 4 for i in range(32)]
    picture = draw("step", xs, [Panel("noise", {"a": ys})])
    assert picture == draw("step", xs, [Panel("noise", {"a": list(ys)})])
    for x, y in points_of(picture)[0]:
        assert LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM


def test_draw_takes_a_single_point():
    assert len(points_of(draw("step", [2], [Panel("a", {"one": [3.0]})]))[0]) == 1


def test_draw_refuses_a_curve_of_another_length():
    with pytest.raises(ValueError, match="zip"):
        draw("step", [1, 2, 3], [Panel("a", {"one": [1.0, 2.0]})])
