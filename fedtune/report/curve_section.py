"""The charts of a report: what they show of one run, or of several over one another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from fedtune.numbers import in_bytes, in_time
from fedtune.report.drawing import Axis, Part, Series, bars_legend, legend, line_chart, patterns, stacked_bars
from fedtune.report.markup import Html, tag
from fedtune.report.run import MOST_PHASES, Run, phases
from fedtune.report.sections import SCORES, heading
from fedtune.report.table import measured

Points = list[tuple[float, float]]
FEWEST = 3  # measurements from which on a score is worth a curve

ROUND = Axis("round", lambda value: f"{value:g}", whole=True)
SHARE = Axis("0 to 1", "{:.3g}".format)
LOSS = Axis("nats per token", lambda value: f"{value:.4g}")


def short_bytes(value: float) -> str:
    """Bytes for an axis: 10 kB, not 10.0 kB."""
    number, unit = in_bytes(value).split(" ")
    return f"{float(number):g} {unit}"


def short_time(value: float) -> str:
    """Seconds for an axis: 2 s, 4 min 10 s."""
    return f"{value:g} s" if value < 60 else in_time(value)


def curves(run: Run) -> Html:
    """Losses, scores, bytes and seconds of one run."""
    loss = [Series("held-out", of_round(run, "eval_loss"), 0), Series("training", of_round(run, "train_loss"), 1)]
    charts = [
        figure("Loss by round", [one for one in loss if one.points], ROUND, LOSS),
        figure("Held-out loss by payload so far", [Series("held-out", by_bytes(run), 0)], payload_axis([run]), LOSS),
        _scores(run),
        _bytes(run),
        _seconds(run),
    ]
    found = [chart for chart in charts if chart]
    return heading("Curves", patterns(), tag("div", *found, class_="charts")) if run.rows else Html("")


def compared(runs: Sequence[Run], names: Sequence[str]) -> Html:
    """Held-out losses of several runs by round, payload and time, and their bytes."""

    def of(points: Callable[[Run], Points]) -> list[Series]:
        return [Series(name, points(run), number) for number, (name, run) in enumerate(zip(names, runs, strict=True))]

    seconds = Axis("time so far", short_time)
    charts = [
        figure("Held-out loss by round", of(lambda run: of_round(run, "eval_loss")), ROUND, LOSS),
        figure("Held-out loss by payload so far", of(by_bytes), payload_axis(runs), LOSS),
        figure("Held-out loss by time", of(by_seconds), seconds, LOSS),
        figure("Payload of a round, both directions", of(bytes_by_round), ROUND, bytes_axis(runs)),
    ]
    for name, key in (("Accuracy", "accuracy"), ("ROUGE-L", "rouge_l")):
        if any(len(run.values(key)) >= FEWEST for run in runs):
            charts.append(figure(f"{name} by round", of(partial(of_round, key=key)), ROUND, SHARE))
    if any(run.values("train_loss") for run in runs):
        charts.append(figure("Training loss by round", of(lambda run: of_round(run, "train_loss")), ROUND, LOSS))
    return heading("Curves", tag("div", *charts, class_="charts"))


def figure(title: str, series: Sequence[Series], x: Axis, y: Axis) -> Html:
    """A chart under its title, with a legend."""
    silent = [one.name for one in series if one.points and x.log and not any(px > 0 for px, _ in one.points)]
    note = tag("p", f"Sent nothing: {', '.join(silent)}.", class_="quiet") if silent else None
    return tag("figure", tag("h3", title), line_chart(series, x, y, title), legend(series), note)


def payload_axis(runs: Sequence[Run]) -> Axis:
    """Logarithmic where runs differ by more than a factor of ten, as the bytes of algorithms do."""
    totals = [total for run in runs if (total := run.total("bytes_up") + run.total("bytes_down"))]
    return Axis("payload so far, all clients", short_bytes, log=bool(totals) and max(totals) > 10 * min(totals))


def bytes_axis(runs: Sequence[Run]) -> Axis:
    """Bytes of a round; logarithmic where they differ by more than a factor of twenty."""
    found = [value for run in runs for _, value in bytes_by_round(run) if value > 0]
    return Axis("bytes, all clients", short_bytes, log=bool(found) and max(found) > 20 * min(found))


def of_round(run: Run, key: str) -> Points:
    """A measured value by round."""
    return [(float(number), value) for number, value in run.values(key)]


def by_bytes(run: Run) -> Points:
    """The held-out loss by the payload that it had cost."""
    return _so_far(run, lambda row: (measured(row.get("bytes_up")) or 0.0) + (measured(row.get("bytes_down")) or 0.0))


def by_seconds(run: Run) -> Points:
    """The held-out loss by the seconds of all phases so far."""
    return _so_far(run, lambda row: sum(phases(row).values()))


def bytes_by_round(run: Run) -> Points:
    """Payload of each trained round."""
    return [(float(n), (measured(r.get("bytes_up")) or 0.0) + (measured(r.get("bytes_down")) or 0.0)) for n, r in _trained(run)]


def _so_far(run: Run, cost: Callable[[Mapping[str, object]], float]) -> Points:
    total, points = 0.0, []
    for row in run.rows:
        total += cost(row)
        loss = measured(row.get("eval_loss"))
        if loss is not None:
            points.append((total, loss))
    return points


def _trained(run: Run) -> list[tuple[int, Mapping[str, object]]]:
    return [(int(measured(row.get("round")) or 0), row) for row in run.trained()]


def _scores(run: Run) -> Html | None:
    found = [Series(name, of_round(run, key), number) for number, (name, key) in enumerate(SCORES)]
    series = [one for one in found if len(one.points) >= FEWEST]
    return figure("Scores by round", series, ROUND, SHARE) if series else None


def _bytes(run: Run) -> Html | None:
    places = [number for number, _ in _trained(run)]
    parts = [
        Part(name, [measured(row.get(key)) or 0.0 for _, row in _trained(run)], number)
        for number, (name, key) in enumerate((("up", "bytes_up"), ("down", "bytes_down")))
    ]
    notes = [in_bytes(sum(part.values)) for part in parts]
    return _bars("Payload of each round", places, parts, notes, Axis("bytes, all clients", short_bytes))


def _seconds(run: Run) -> Html | None:
    rows = [(int(measured(row.get("round")) or 0), phases(row)) for row in run.rows]
    totals: dict[str, float] = {}
    for _, spent in rows:
        for name, seconds in spent.items():
            totals[name] = totals.get(name, 0.0) + seconds
    whole = sum(totals.values())
    names = sorted(totals, key=lambda name: -totals[name])[:MOST_PHASES]
    parts = [Part(name, [spent.get(name, 0.0) for _, spent in rows], number) for number, name in enumerate(names)]
    notes = [f"{in_time(totals[name])}, {100 * totals[name] / whole:.0f} %" if whole else "" for name in names]
    return _bars("Seconds of each round by phase", [n for n, _ in rows], parts, notes, Axis("seconds", "{:g}".format))


def _bars(title: str, places: Sequence[int], parts: Sequence[Part], notes: Sequence[str], y: Axis) -> Html | None:
    if not places:
        return None
    return tag("figure", tag("h3", title), stacked_bars(places, parts, ROUND, y, title), bars_legend(parts, notes))
