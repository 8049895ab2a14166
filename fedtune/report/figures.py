"""Figures of a comparison, as PNG and SVG, from the tidy table: scores against their cost, bytes and memory by algorithm.

Lines are means over seeds, bands the least and the greatest seed. Series differ by colour, marker and dashes
(`fedtune.report.styles`). The same table gives the same bytes with the same matplotlib: no dates, no random ids.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedtune.errors import MissingPackageError, ReportError
from fedtune.foreign import for_screen
from fedtune.numbers import in_bytes
from fedtune.report.curves import Measure, Point, bytes_a_round, curve, labels, of_base, of_label, peaks
from fedtune.report.styles import Style, style
from fedtune.report.table import Row

FORMATS = ("png", "svg")
LOSS = "held-out loss (nats per token)"
ACCURACY = "accuracy on held-out questions"
CUT = 2.0  # times the base model's loss: what is above is cut off, or a run that diverged would flatten all others
SIZED = re.compile(r"^K = [\d,.]+, ")  # begins the label of a series that is one point of a line
LONGEST = 120  # characters of a label or title
LONG = 16  # characters of a label from which on the legend has two columns instead of three
SETTINGS = {
    "svg.hashsalt": "fedtune",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.7,
}


def _loss(row: Row) -> float | None:
    return row.eval_loss


def _accuracy(row: Row) -> float | None:
    return row.accuracy


@dataclass(frozen=True)
class Axis:
    """What loss or accuracy is drawn against: name of the file, title of the axis, measure; bytes on a logarithmic scale."""

    name: str
    title: str
    measure: Measure
    in_bytes: bool = False
    of: Measure = _loss


PAYLOAD = "payload of all clients so far, both directions"
AXES = (
    Axis("loss_by_bytes", PAYLOAD, lambda row: row.cumulative_bytes, in_bytes=True),
    Axis("loss_by_serialised_bytes", "serialised messages of all clients so far", lambda row: row.serialised_bytes, True),
    Axis("loss_by_rounds", "round", lambda row: row.round),
    Axis("loss_by_seconds", "time so far (s)", lambda row: row.seconds),
    Axis("loss_by_cpu_seconds", "CPU time so far (s)", lambda row: row.cpu_seconds),
    Axis("loss_by_link_seconds", "communication so far on a simulated link (s)", lambda row: row.link_seconds),
    Axis("accuracy_by_bytes", PAYLOAD, lambda row: row.cumulative_bytes, in_bytes=True, of=_accuracy),
    Axis("accuracy_by_rounds", "round", lambda row: row.round, of=_accuracy),
)


def figures(table: Sequence[Row], folder: Path) -> list[Path]:
    """Draw everything that `table` has numbers for into `folder` (made if needed); returns the files, PNG and SVG of each.

    A preset's figures are NAME_PRESET.png and .svg: loss_by_bytes, loss_by_rounds, loss_by_seconds, and, where measured,
    loss_by_serialised_bytes, loss_by_cpu_seconds, loss_by_link_seconds, accuracy_by_bytes, accuracy_by_rounds and memory;
    frontier of two series or more; bytes_by_round always.

    Raises:
        ReportError: the table has no row. MissingPackageError: without matplotlib.
    """
    if not table:
        raise ReportError("The table has no row: there is nothing to draw.")
    matplotlib = _matplotlib()
    folder.mkdir(parents=True, exist_ok=True)
    written: list[Path] = []
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **SETTINGS, "backend": "agg"}):
        for preset, ending in _endings(table).items():
            rows = [row for row in table if row.preset == preset]
            for name, draw in _drawings(rows).items():
                written += _save(draw(preset), folder / f"{name}_{ending}")
    return written


def _drawings(rows: Sequence[Row]) -> dict[str, Callable[[str], Any]]:
    """The figures that there are numbers for, by name."""
    chosen: dict[str, Callable[[str], Any]] = {}
    for axis in AXES:
        if any(axis.measure(row) is not None and (axis.of is _loss or axis.of(row) is not None) for row in rows):
            chosen[axis.name] = partial(draw_loss, rows, axis)
    if sum(place is not None for place in _places(rows).values()) > 1:
        chosen["frontier"] = partial(draw_frontier, rows)
    chosen["bytes_by_round"] = partial(draw_bytes, rows)
    if any(row.peak_memory_bytes is not None for row in rows):
        chosen["memory"] = partial(draw_memory, rows)
    return chosen


def _endings(table: Sequence[Row]) -> dict[str, str]:
    """What the files of each preset end with: its name in plain characters, numbered where two would be the same."""
    found: dict[str, str] = {}
    for preset in dict.fromkeys(row.preset for row in table):
        plain = re.sub(r"[^A-Za-z0-9_-]+", "-", preset).strip("-") or "preset"
        same = sum(ending == plain or ending.startswith(f"{plain}-") for ending in found.values())
        found[preset] = f"{plain}-{same + 1}" if same else plain
    return found


# ---------------------------------------------------------------------- loss against what it cost


def draw_loss(table: Sequence[Row], axis: Axis, title: str) -> Any:
    """A matplotlib Figure of the loss or accuracy of every series against `axis`, with the base model's as a thin line."""
    names = labels(table)
    seeds = max(len({row.seed for row in of_label(table, label)}) for label in names)
    figure, axes = _figure(6.4, 4.6, f"{title}: mean and range of {seeds} seeds" if seeds > 1 else title)
    if axis.in_bytes:
        axes.set_xscale("log")
    base = of_base(table, axis.of)
    for number, label in enumerate(names):
        points = curve(of_label(table, label), axis.measure, axis.of)
        _draw_series(axes, points, label, style(number), log=axis.in_bytes)
    if base is not None:
        axes.axhline(base, color="#777777", linewidth=0.8, dashes=(1, 2), label="base model", zorder=1)
    axes.set_xlabel(axis.title)
    axes.set_ylabel(LOSS if axis.of is _loss else ACCURACY)
    if axis.of is _loss:
        _cut(axes, base)
    if axis.in_bytes:
        _byte_axis(axes.xaxis)
    elif axis.name.endswith("_by_rounds"):
        axes.xaxis.get_major_locator().set_params(integer=True)
    columns = 3 if max(map(len, names)) < LONG else 2
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False, handlelength=4)
    return figure


def _draw_series(axes: Any, points: Sequence[Point], label: str, look: Style, *, log: bool) -> None:
    """Line and band of one series. On a logarithmic axis one that costs nothing is a level: that of its last round."""
    drawn = [point for point in points if point.x > 0] if log else list(points)
    line = {"color": look.colour, "dashes": look.dashes or (None, None)}
    if not drawn:
        if points:
            last = points[-1]
            axes.axhspan(last.low, last.high, color=look.colour, alpha=0.12, linewidth=0)
            axes.axhline(last.y, **line, label=f"{_plain(label)} (sends nothing)")
        return
    x = [point.x for point in drawn]
    axes.fill_between(x, [p.low for p in drawn], [p.high for p in drawn], color=look.colour, alpha=0.18, linewidth=0)
    every = max(1, len(drawn) // 10)
    marks = {"marker": look.marker, "markevery": every, "markerfacecolor": "white", "markeredgecolor": look.colour}
    axes.plot(x, [point.y for point in drawn], **line, **marks, label=_plain(label))


def _cut(axes: Any, base: float | None) -> None:
    """Limit the axis where a series went far above the base model, and say so."""
    low, high = axes.get_ylim()
    if base is not None and base > 0 and high > CUT * base and low < CUT * base:
        axes.set_ylim(low, CUT * base)
        axes.set_ylabel(f"{LOSS}\ncut off above {CUT * base:.3g}")


# ---------------------------------------------------------------------- where every series ends


def draw_frontier(table: Sequence[Row], title: str) -> Any:
    """A Figure of the loss after the last round against the payload of a round: one point a series, means over seeds.

    Series that are called "K = 512, REST" are points of one line, REST.
    """
    names = labels(table)
    seeds = max(len({row.seed for row in of_label(table, label)}) for label in names)
    figure, axes = _figure(6.4, 4.6, f"{title}: mean and range of {seeds} seeds" if seeds > 1 else title)
    axes.set_xscale("log")
    lines: dict[str, list[Point]] = {}
    for label, place in _places(table).items():
        if place is not None:
            lines.setdefault(SIZED.sub("", label), []).append(place)
    for number, (name, found) in enumerate(lines.items()):
        look, places = style(number), sorted(found, key=lambda point: point.x)
        x, y = [point.x for point in places], [point.y for point in places]
        reach = [[p.y - p.low for p in places], [p.high - p.y for p in places]]
        line = {"color": look.colour, "marker": look.marker, "markerfacecolor": "white"}
        axes.errorbar(x, y, yerr=reach, **line, elinewidth=0.8, label=_plain(name), linestyle="-")
    base = of_base(table, _loss)
    if base is not None:
        _cut(axes, base)
    axes.set_xlabel("payload of a round, all clients, both directions")
    axes.set_ylabel(f"{LOSS},\nafter the last round")
    _byte_axis(axes.xaxis)
    columns = 3 if max(map(len, lines)) < LONG else 2
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)
    return figure


def _places(table: Sequence[Row]) -> dict[str, Point | None]:
    """By label: payload of a round and loss after the last one; None where nothing is sent or measured."""
    found: dict[str, Point | None] = {}
    for label in labels(table):
        rows = of_label(table, label)
        payload = bytes_a_round(rows, lambda row: (row.bytes_up or 0) + (row.bytes_down or 0))
        ends = curve([row for row in rows if row.round], lambda row: row.round, _loss)
        found[label] = replace(ends[-1], x=payload) if payload and ends else None
    return found


# ---------------------------------------------------------------------- bars


def draw_bytes(table: Sequence[Row], title: str) -> Any:
    """A Figure of the payload of a round, all clients together: two bars an algorithm, up and down, logarithmic."""
    names = labels(table)
    figure, axes = _figure(6.4, 1.2 + 0.55 * len(names), title)
    directions = (("up", lambda row: row.bytes_up, 0.2, ""), ("down", lambda row: row.bytes_down, -0.2, "//////"))
    for direction, measure, offset, hatch in directions:
        for place, label in enumerate(reversed(names)):
            value = bytes_a_round(of_label(table, label), measure)
            look = style(names.index(label))
            _bar(axes, place + offset, value, look, 0.36, hatch, f"{direction} {_in_bytes(value)}")
    _name_bars(axes, names)
    axes.set_xlabel("payload of a round, all clients (whole: up, hatched: down)")
    axes.set_xscale("log")
    _byte_axis(axes.xaxis)
    _room_for_text(axes)
    return figure


def draw_memory(table: Sequence[Row], title: str) -> Any:
    """A Figure of the peak memory of each algorithm: the mean over seeds, with the least and the greatest."""
    names = labels(table)
    figure, axes = _figure(6.4, 1.2 + 0.42 * len(names), title)
    for place, label in enumerate(reversed(names)):
        found = peaks(of_label(table, label), lambda row: row.peak_memory_bytes)
        value = sum(found) / len(found) if found else None
        text = _in_bytes(value) if value is not None else "not measured"
        spread = f" ({_in_bytes(min(found))} to {_in_bytes(max(found))})" if len(set(found)) > 1 else ""
        _bar(axes, place, value, style(names.index(label)), 0.6, "", text + spread)
    _name_bars(axes, names)
    axes.set_xlabel("peak memory")
    axes.set_xlim(0, 1.5 * axes.get_xlim()[1])
    _byte_axis(axes.xaxis)
    return figure


def _bar(axes: Any, place: float, value: float | None, look: Style, height: float, hatch: str, text: str) -> None:
    """One bar with its value beside it; nothing but the text where there is no value, or none that a logarithm has."""
    edge = {"edgecolor": look.colour, "facecolor": "white" if hatch else look.colour, "hatch": hatch}
    bars = axes.barh([place], [value or float("nan")], height=height, **edge)
    if value:
        axes.bar_label(bars, [text], padding=4, fontsize=8)
    else:
        axes.annotate(text, (0, place), (4, 0), ("axes fraction", "data"), "offset points", va="center", fontsize=8)


def _name_bars(axes: Any, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), [_plain(name) for name in reversed(names)])
    axes.set_ylim(-0.6, len(names) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)


def _room_for_text(axes: Any) -> None:
    """Widen a logarithmic axis to whole powers of ten, and one more at the right for the numbers beside the bars."""
    low, high = axes.get_xlim()
    if low <= 0 or high <= low:
        low, high = 1.0, 1000.0
    axes.set_xlim(low / 3, high * 12)


# ---------------------------------------------------------------------- the sheet


def _figure(width: float, height: float, title: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(_plain(title), fontsize=10, loc="left")
    return figure, axes


def _plain(text: str) -> str:
    """`text` as one line, without the dollars that matplotlib takes for mathematics."""
    return for_screen(text, LONGEST).replace("$", r"\$")


def _byte_axis(axis: Any) -> None:
    """Ticks that read 1 kB, 10 MB."""
    axis.set_major_formatter(lambda value, _: _short_bytes(value))


def _short_bytes(value: float) -> str:
    return re.sub(r"(\.\d*?)0+ ", r"\1 ", in_bytes(value)).replace(". ", " ") if value > 0 else "0"


def _in_bytes(value: float | None) -> str:
    return "-" if value is None else in_bytes(value)


def _save(figure: Any, stem: Path) -> list[Path]:
    written = []
    for form in FORMATS:
        path = stem.with_name(f"{stem.name}.{form}")
        metadata = {"Date": None} if form == "svg" else {"Software": None}
        figure.savefig(path, format=form, dpi=160, metadata=metadata)
        written.append(path)
    return written


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise MissingPackageError.of("matplotlib", "figures", "experiments") from None
    return matplotlib
