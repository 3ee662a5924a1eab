"""Line charts as SVG inside HTML. They scale with the page, and the text in them stays text.

    parts = [plot({"training": [(50, 2.5), (100, 1.5)], "validation": [(100, 1.75)]}, "step", "loss", "Loss")]

Coordinates are those of the SVG's view box, `_WIDTH` x `_HEIGHT`, with the origin at the top left.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections.abc import Callable, Mapping, Sequence

Points = Sequence[tuple[float, float]]

_WIDTH, _HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 18, 12, 50  # margins
_COLORS = ("#1a73e8", "#d93025", "#188038", "#9334e6", "#e37400", "#12b5cb")
_MOST_POINTS = 400  # of a line; a longer one is thinned out
_MOST_MARKERS = 40  # points of a line with a marker at each
_FONT, _LETTER = 14, 0.56  # size of letters, and their mean width as a share of it
_TICKS = 5  # about this many on an axis
_WIDE = 20.0  # values whose largest is this many times their smallest have a logarithmic axis, if all are positive


def plot(series: Mapping[str, Points], x: str, y: str, caption: str, powers: bool = False) -> str:
    """Plots lines through points.

    Values that are all positive and differ widely have a logarithmic y axis.

    Args:
      series: points (x, y) of each line, by its name. Points that are not finite are left out.
      x, y: labels of the axes.
      caption: text below the plot.
      powers: use a logarithmic x axis of base 2 with a tick at each point, for numbers of candidates.

    Returns:
      HTML; "" if no point is finite.
    """
    lines = {name: _finite(points) for name, points in series.items()}
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return ""
    across = [point[0] for points in lines.values() for point in points]
    values = [point[1] for points in lines.values() for point in points]
    wide = min(values) > 0 and max(values) > _WIDE * min(values)
    if powers:
        horizontal = _Axis(min(across), max(across), sorted(set(across)), math.log2)
    else:
        horizontal = _Axis(min(across), max(across), _round_ticks(min(across), max(across), inside=True))
    vertical = _logarithmic(min(values), max(values)) if wide else _linear(min(values), max(values))
    place = lambda point: (
        _LEFT + horizontal.share(point[0]) * (_WIDTH - _LEFT - _RIGHT),
        _HEIGHT - _BOTTOM - vertical.share(point[1]) * (_HEIGHT - _TOP - _BOTTOM),
    )
    parts = [*_grid(horizontal, vertical, place), *_labels(x, y)]
    colors = {name: _COLORS[i % len(_COLORS)] for i, name in enumerate(lines)}
    for name, points in lines.items():
        parts += _line(name, points, colors[name], place)
    key = "".join(
        f'<span><em style="background:{color}"></em>{html.escape(name)}</span>' for name, color in colors.items()
    )
    svg = (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{html.escape(caption)}" font-size="{_FONT}">'
        f"{''.join(parts)}</svg>"
    )
    below = f'<div class="key">{key}</div><figcaption>{html.escape(caption)}</figcaption>'
    return f'<figure class="plot">{svg}{below}</figure>'


@dataclasses.dataclass(frozen=True)
class _Axis:
    """An axis from `low` to `high`, with ticks inside; `scale` is the identity or a logarithm."""

    low: float
    high: float
    ticks: Sequence[float]
    scale: Callable[[float], float] = float

    def share(self, value: float) -> float:
        """Returns the place of a value, 0 at `low` and 1 at `high`."""
        low, high = self.scale(self.low), self.scale(self.high)
        return (self.scale(value) - low) / (high - low) if high > low else 0.5


def _finite(points: Points) -> list[tuple[float, float]]:
    """Returns the finite points in the order of x, thinned out, with the first and the last one."""
    known = [(x, y) for x, y in points if x is not None and y is not None]
    known = sorted((float(x), float(y)) for x, y in known if math.isfinite(x) and math.isfinite(y))
    step = -(-len(known) // _MOST_POINTS) or 1
    thinned = known[::step]
    return thinned + known[-1:] if known and thinned[-1] != known[-1] else thinned


def _linear(low: float, high: float) -> _Axis:
    ticks = _round_ticks(low, high)
    return _Axis(ticks[0], ticks[-1], ticks)


def _round_ticks(low: float, high: float, inside: bool = False) -> list[float]:
    """Returns round numbers, about `_TICKS` of them, around [low, high] or inside it."""
    if high <= low:
        reach = abs(low) / 2 or 1.0
        return [low] if inside else [low - reach, low, low + reach]
    rough = (high - low) / _TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    round_low, round_high = (math.ceil, math.floor) if inside else (math.floor, math.ceil)
    first, last = round_low(low / step + (1e-9 if not inside else -1e-9)), round_high(high / step + 1e-9)
    return [number * step for number in range(first, last + 1)]


def _logarithmic(low: float, high: float) -> _Axis:
    """Returns an axis of base 10 with ticks at powers of ten, and at 2 and 5 times them if these are few."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    for factors in ((1,), (1, 2, 5)):
        ticks = [factor * 10.0**power for power in range(first, last + 1) for factor in factors]
        inside = [tick for tick in ticks if low / 1.1 <= tick <= high * 1.1]
        if len(inside) >= 3:
            break
    return _Axis(min([low, *inside]), max([high, *inside]), inside, math.log10)


def _grid(horizontal: _Axis, vertical: _Axis, place: Callable[[tuple[float, float]], tuple[float, float]]) -> list[str]:
    parts = []
    for tick in vertical.ticks:
        _, y = place((horizontal.low, tick))
        parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" stroke="#e8eaed" />')
        parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end" fill="#5f6368">{_number(tick)}</text>')
    for tick in horizontal.ticks:
        x, _ = place((tick, vertical.low))
        parts.append(f'<path d="M{x:.1f} {_HEIGHT - _BOTTOM}v4" stroke="#5f6368" />')
        parts.append(
            f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 19}" text-anchor="middle" fill="#5f6368">{_number(tick)}</text>'
        )
    return parts


def _labels(x: str, y: str) -> list[str]:
    middle = (_HEIGHT - _BOTTOM + _TOP) / 2
    across = (_LEFT + _WIDTH - _RIGHT) / 2
    small = f' font-size="{_HEIGHT / (_LETTER * len(y)):.1f}"' if _LETTER * _FONT * len(y) > _HEIGHT else ""
    return [
        f'<text x="{across}" y="{_HEIGHT - 8}" text-anchor="middle" fill="#202124">{html.escape(x)}</text>',
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle" fill="#202124"{small}>'
        f"{html.escape(y)}</text>",
    ]


def _line(name: str, points: Points, color: str, place: Callable) -> list[str]:
    places = [place(point) for point in points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2" stroke-linejoin="round" />']
    if len(points) <= _MOST_MARKERS:
        for (x, y), (left, top) in zip(points, places):
            said = html.escape(f"{name}: {y:.4g} at {_number(x)}")
            parts.append(
                f'<circle cx="{left:.1f}" cy="{top:.1f}" r="3.5" fill="{color}"><title>{said}</title></circle>'
            )
    return parts


def _number(value: float) -> str:
    """Formats a tick: "0.05", "20,000", "1e-05"."""
    if value == int(value) and 1000 <= abs(value) < 1e7:
        return f"{int(value):,}"
    return f"{value:.4g}"
