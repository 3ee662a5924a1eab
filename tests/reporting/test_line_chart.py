"""Line charts: every point has its place, and odd values do no harm."""

import math
import re

import pytest

from dalle_jax.reporting.line_chart import plot


def polylines(svg):
    """Returns the corners of each line."""
    found = re.findall(r'<polyline points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found]


def ticks(svg, anchor):
    return [text.replace(",", "") for text in re.findall(rf'text-anchor="{anchor}" fill="#5f6368">([^<]*)<', svg)]


def test_places_follow_the_values():
    (line,) = polylines(plot({"a": [(0, 0.0), (50, 1.0), (100, 4.0)]}, "step", "loss", "c"))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx((y0 - y2) / 4, abs=0.2)
    assert 0 < x0 < x2 < 480 and 0 < y2 < y0 < 300


@pytest.mark.parametrize("name", ["loss", "image_nats_masked_25_50 (nats per image token)", "x" * 80])
def test_a_long_label_fits(name):
    svg = plot({"a": [(0, 0.0), (50, 1.0)]}, "step", name, "c")
    size = re.search(rf'fill="#202124"(?: font-size="([\d.]+)")?>{re.escape(name)}<', svg)[1]
    assert 0.55 * len(name) * float(size or 14) <= 300
    assert (size is None) == (name == "loss")


def test_an_axis_over_magnitudes_is_logarithmic():
    svg = plot({"a": [(1, 0.01), (2, 0.1), (3, 1.0)]}, "step", "loss", "c")
    (line,) = polylines(svg)
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)
    assert {"0.01", "0.1", "1"} <= set(ticks(svg, "end"))
    (line,) = polylines(plot({"a": [(1, -0.01), (2, 0.1), (3, 1.0)]}, "step", "loss", "c"))
    assert line[0][1] - line[1][1] < 0.3 * (line[1][1] - line[2][1]), "negative values have no logarithm"


def test_powers_of_two_are_evenly_spaced():
    svg = plot({"a": [(1, 1.0), (2, 2.0), (4, 3.0), (16, 4.0)]}, "n", "y", "c", powers=True)
    (line,) = polylines(svg)
    assert line[3][0] - line[2][0] == pytest.approx(2 * (line[1][0] - line[0][0]), abs=0.2)
    assert ticks(svg, "middle")[:4] == ["1", "2", "4", "16"]


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0, 1e-30, 1e30])
def test_a_single_or_constant_value(value):
    for points in ([(7, value)], [(1, value), (2, value)]):
        (line,) = polylines(plot({"a": points}, "step", "y", "c"))
        assert all(0 <= x <= 480 and 0 <= y <= 300 for x, y in line)


def test_values_that_are_not_finite_are_left_out():
    svg = plot({"a": [(1, 1.0), (2, math.nan), (3, None), (4, math.inf), (5, 2.0)]}, "x", "y", "c")
    assert [len(line) for line in polylines(svg)] == [2]
    assert plot({"a": [(1, math.nan)], "b": []}, "x", "y", "c") == ""


def test_a_long_line_is_thinned_out_and_keeps_its_ends():
    (line,) = polylines(plot({"a": [(x, float(x)) for x in range(10_001)]}, "x", "y", "c"))
    assert len(line) <= 402 and line[0][1] > line[-1][1]
    (short,) = polylines(plot({"a": [(0, 0.0), (10_000, 10_000.0)]}, "x", "y", "c"))
    assert (line[0], line[-1]) == (short[0], short[-1])


@pytest.mark.parametrize("low, high", [(0, 1), (-3, 7), (0.1234, 0.1235), (1e-12, 2e-12), (999, 100_001), (5, 5.5)])
def test_ticks_are_round_and_cover_the_values(low, high):
    svg = plot({"a": [(1, low), (2, (low + high) / 2), (3, high)]}, "x", "y", "c")
    assert 2 <= len(ticks(svg, "end")) <= 12
    (line,) = polylines(svg)
    assert all(12 - 0.1 <= y <= 256 + 0.1 for _, y in line)
