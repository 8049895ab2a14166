"""Line and bar charts as inline SVG: no script, colours from the page's style sheet, values as tooltips.

A chart is WIDTH x HEIGHT units and fills the width that it is given. Series differ by colour, marker and dashes
(`fedtune.report.styles`), so they can be told apart on paper.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fedtune.report.markup import Html, join, tag
from fedtune.report.styles import style

WIDTH, HEIGHT = 440, 260
LEFT, RIGHT, TOP, BOTTOM = 80, 12, 12, 40  # room for ticks and titles
MOST_MARKS, MOST_BARS = 24, 60
Show = Callable[[float], str]


@dataclass(frozen=True)
class Series:
    """A line through (x, y) points, in the order of x. `number` chooses the style."""

    name: str
    points: Sequence[tuple[float, float]]
    number: int


@dataclass(frozen=True)
class Axis:
    """Title with its unit, and how a value reads."""

    title: str
    show: Show
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Scale:
    """From values to places: `low` is at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value, rounded to a tenth of a unit."""
        low, high, value = (math.log10(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def line_chart(series: Sequence[Series], x: Axis, y: Axis, describe: str) -> Html:
    """Lines with markers. On a logarithmic axis points that are not above 0 are left out."""
    shown = [Series(one.name, [p for p in one.points if _on(p, x, y)], one.number) for one in series]
    xs = [point[0] for one in shown for point in one.points]
    ys = [point[1] for one in shown for point in one.points]
    if not xs:
        return tag("p", "No finite value was measured.", class_="empty")
    across = _scale(xs, LEFT, WIDTH - RIGHT, log=x.log, whole=x.whole, tight=True)
    upwards = _scale(ys, HEIGHT - BOTTOM, TOP, log=y.log)
    parts = [_y_axis(upwards, y), _x_axis(across, x), *(_line(one, across, upwards, x, y) for one in shown)]
    return _svg(parts, describe)


def _on(point: tuple[float, float], x: Axis, y: Axis) -> bool:
    """Whether a point has a place on both axes."""
    return (point[0] > 0 or not x.log) and (point[1] > 0 or not y.log)


def _line(one: Series, across: Scale, upwards: Scale, x: Axis, y: Axis) -> Html:
    look = style(one.number)
    places = [(across(px), upwards(py)) for px, py in one.points]
    path = "M" + "L".join(f"{px:g},{py:g}" for px, py in places) if places else ""
    every = max(1, math.ceil(len(places) / MOST_MARKS))
    chosen = sorted({*range(0, len(places), every), len(places) - 1}) if places else []
    marks = [
        tag("g", _mark(look.marker, *places[n]), tag("title", f"{one.name}: {y.show(py)} at {x.title} {x.show(px)}"))
        for n in chosen
        for px, py in (one.points[n],)
    ]
    stroke = tag("path", d=path, class_="line", stroke_dasharray=" ".join(map(str, look.dashes)) or None) if path else None
    return tag("g", stroke, *marks, class_=f"series s{one.number % 7}")


def legend(series: Sequence[Series]) -> Html:
    """The names of lines with a piece of each."""
    return tag("ul", *(tag("li", sign(one.number), one.name) for one in series), class_="legend")


def sign(number: int) -> Html:
    """A short piece of line `number` with its marker."""
    look = style(number)
    line = tag("path", d="M2,7L34,7", class_="line", stroke_dasharray=" ".join(map(str, look.dashes)) or None)
    group = tag("g", line, _mark(look.marker, 18, 7), class_=f"series s{number % 7}")
    return tag("svg", group, viewBox="0 0 36 14", class_="sign", aria_hidden="true")


_MARKS = {
    "s": "M-3,-3H3V3H-3Z",
    "^": "M0,-4L4,3H-4Z",
    "D": "M0,-4L4,0L0,4L-4,0Z",
    "v": "M0,4L4,-3H-4Z",
    "P": "M-1.2,-4H1.2V-1.2H4V1.2H1.2V4H-1.2V1.2H-4V-1.2H-1.2Z",
    "X": "M-4,-2.4L-2.4,-4L0,-1.6L2.4,-4L4,-2.4L1.6,0L4,2.4L2.4,4L0,1.6L-2.4,4L-4,2.4L-1.6,0Z",
    "*": "M0,-4.6L1.1,-1.5L4.4,-1.4L1.8,0.6L2.7,3.7L0,1.9L-2.7,3.7L-1.8,0.6L-4.4,-1.4L-1.1,-1.5Z",
}


def _mark(marker: str, x: float, y: float) -> Html:
    if marker == "o":
        return tag("circle", cx=f"{x:g}", cy=f"{y:g}", r="3.2", class_="mark")
    return tag("path", d=_MARKS[marker], transform=f"translate({x:g} {y:g})", class_="mark")


# ---------------------------------------------------------------------- bars


@dataclass(frozen=True)
class Part:
    """A layer of stacked bars: one value a bar. `number` chooses colour and pattern."""

    name: str
    values: Sequence[float]
    number: int


def stacked_bars(places: Sequence[int], parts: Sequence[Part], x: Axis, y: Axis, describe: str) -> Html:
    """Bars at rounds `places`. More than MOST_BARS rounds are drawn in groups of neighbours, each with its mean."""
    if not places or not any(value > 0 for part in parts for value in part.values):
        return tag("p", "Nothing was measured.", class_="empty")
    size = math.ceil(len(places) / MOST_BARS)
    groups = [range(start, min(start + size, len(places))) for start in range(0, len(places), size)]
    heights = [[sum(part.values[n] for n in group) / len(group) for group in groups] for part in parts]
    totals = [sum(column) for column in zip(*heights, strict=True)]
    upwards = _scale([0.0, max(totals)], HEIGHT - BOTTOM, TOP)
    step = (WIDTH - RIGHT - LEFT) / len(groups)
    width = min(step * 0.78, 44)
    bars = []
    for column, group in enumerate(groups):
        left, base = LEFT + (column + 0.5) * step - width / 2, 0.0
        where = _span(places[group[0]], places[group[-1]])
        for part, values in zip(parts, heights, strict=True):
            bars.append(_block(part, values[column], base, left, width, upwards, f"{x.title} {where}", y))
            base += values[column]
    ticks = _named_ticks([_span(places[group[0]], places[group[0]]) for group in groups], step)
    return _svg([_y_axis(upwards, y), *ticks, _title_below(x.title), *bars], describe)


def _block(
    part: Part, value: float, base: float, left: float, width: float, upwards: Scale, where: str, y: Axis
) -> Html | None:
    if value <= 0:
        return None
    top, bottom = upwards(base + value), upwards(base)
    box = {"x": f"{left:.1f}", "y": f"{top:g}", "width": f"{width:.1f}", "height": f"{max(bottom - top, 0.3):.1f}"}
    pattern = tag("rect", **box, class_="pattern", fill=f"url(#p{part.number % 4})") if part.number % 4 else None
    text = tag("title", f"{where}, {part.name}: {y.show(value)}")
    return tag("g", tag("rect", **box, class_=f"bar f{part.number % 7}"), pattern, text)


def bars_legend(parts: Sequence[Part], notes: Sequence[str]) -> Html:
    """The names of layers with their colours and patterns, and a note each."""
    items = []
    for part, note in zip(parts, notes, strict=True):
        box = {"x": 1, "y": 1, "width": 20, "height": 12}
        pattern = tag("rect", **box, class_="pattern", fill=f"url(#p{part.number % 4})") if part.number % 4 else None
        swatch = tag("svg", tag("rect", **box, class_=f"bar f{part.number % 7}"), pattern, viewBox="0 0 22 14", class_="swatch")
        items.append(tag("li", swatch, part.name, " ", tag("span", note, class_="quiet")))
    return tag("ul", *items, class_="legend")


def patterns() -> Html:
    """What bars are hatched with, once a page."""
    drawn = ("M0,6L6,0M-1,1L1,-1M5,7L7,5", "M0,0L6,6M-1,5L1,7M5,-1L7,1", "M0,3H6")
    defined = [
        tag("pattern", tag("path", d=d, class_="hatch"), id=f"p{n}", width=6, height=6, patternUnits="userSpaceOnUse")
        for n, d in enumerate(drawn, start=1)
    ]
    return tag("svg", tag("defs", *defined), class_="hidden", width=0, height=0, aria_hidden="true")


def _named_ticks(names: Sequence[str], step: float) -> list[Html]:
    every = max(1, math.ceil(len(names) * 34 / (WIDTH - LEFT - RIGHT)))
    y = HEIGHT - BOTTOM + 16
    return [
        tag("text", names[n], x=f"{LEFT + (n + 0.5) * step:.1f}", y=y, class_="tick middle")
        for n in range(0, len(names), every)
    ]


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


# ---------------------------------------------------------------------- axes


def _scale(
    values: Sequence[float], start: float, end: float, *, log: bool = False, whole: bool = False, tight: bool = False
) -> Scale:
    """A scale on which all values have room, between round numbers where it is not `tight`."""
    low, high = min(values), max(values)
    if log:
        return Scale(low / 1.3, high * 1.3, start, end, log=True)
    if low == high:
        margin = 1.0 if whole else abs(low) * 0.1 or 1.0
        low, high = (low - margin if low or not tight else low), high + margin
    if not tight:
        step = _step(low, high, 5)
        low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
    return Scale(low, high, start, end)


def _step(low: float, high: float, most: int) -> float:
    """1, 2 or 5 times a power of ten, so that there are about `most` steps."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)


def ticks(scale: Scale, *, whole: bool = False, most: int = 5) -> list[float]:
    """Round numbers on a scale; powers of ten on a logarithmic one, with 2 and 5 times them where it is short."""
    if scale.log:
        powers = range(math.floor(math.log10(scale.low)), math.ceil(math.log10(scale.high)) + 1)
        span = math.log10(scale.high / scale.low)
        factors = (1,) if span > 2.2 else (1, 3) if span > 1 else (1, 2, 5)
        found = [factor * 10.0**power for power in powers for factor in factors]
        kept = [value for value in found if scale.low <= value <= scale.high]
        return kept[:: max(1, math.ceil(len(kept) / (most + 1)))] or [scale.low]
    step = max(_step(scale.low, scale.high, most), 1.0 if whole else 0.0)
    first = math.ceil(scale.low / step - 1e-9)
    return [n * step for n in range(first, math.floor(scale.high / step + 1e-9) + 1)]


def _y_axis(scale: Scale, axis: Axis) -> Html:
    parts: list[Html] = []
    for value in ticks(scale):
        y = scale(value)
        parts.append(tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=f"{y:g}", y2=f"{y:g}", class_="grid"))
        parts.append(tag("text", axis.show(value), x=LEFT - 6, y=f"{y + 3.8:g}", class_="tick end"))
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return tag("g", *parts, tag("text", axis.title, transform=f"translate(11 {middle:g}) rotate(-90)", class_="title middle"))


def _x_axis(scale: Scale, axis: Axis) -> Html:
    bottom = HEIGHT - BOTTOM
    parts: list[Html] = [tag("line", x1=LEFT, x2=WIDTH - RIGHT, y1=bottom, y2=bottom, class_="axis")]
    for value in ticks(scale, whole=axis.whole):
        x = scale(value)
        parts.append(tag("line", x1=f"{x:g}", x2=f"{x:g}", y1=bottom, y2=bottom + 4, class_="axis"))
        parts.append(tag("text", axis.show(value), x=f"{x:g}", y=bottom + 16, class_="tick middle"))
    return tag("g", *parts, _title_below(axis.title))


def _title_below(title: str) -> Html:
    return tag("text", title, x=(LEFT + WIDTH - RIGHT) / 2, y=HEIGHT - 5, class_="title middle")


def _svg(parts: Sequence[Html | None], describe: str) -> Html:
    return tag("svg", join(parts), viewBox=f"0 0 {WIDTH} {HEIGHT}", role="img", aria_label=describe, class_="chart")
