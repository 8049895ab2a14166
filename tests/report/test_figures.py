"""Figures of a comparison: which are drawn, what their numbers are, and that the same table gives the same bytes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from fedtune.errors import MissingPackageError, ReportError
from fedtune.report.curves import Point, bytes_a_round, curve, labels, of_base, peaks
from fedtune.report.figures import draw_frontier, figures
from fedtune.report.styles import style
from fedtune.report.table import Row

NAMES = {"loss_by_bytes", "loss_by_rounds", "loss_by_seconds", "bytes_by_round"}


def table(label: str = "Ferret", *, sent: int = 100, seeds: int = 2, preset: str = "demo") -> list[Row]:
    """Three rounds; seed s ends s/10 higher, and takes s seconds longer a round."""
    return [
        Row(
            preset,
            "ferret",
            label,
            seed,
            number,
            eval_loss=2.0 - number * (0.5 - seed / 20),
            bytes_up=sent * (number > 0),
            bytes_down=2 * sent * (number > 0),
            cumulative_bytes=3 * sent * number,
            seconds=float(number * (1 + seed)),
        )
        for seed in range(seeds)
        for number in range(3)
    ]


def test_a_point_is_the_mean_and_the_range_of_the_seeds() -> None:
    points = curve(table(), lambda row: row.seconds, lambda row: row.eval_loss)
    assert points[0] == Point(0.0, 2.0, 2.0, 2.0, 2)
    assert points[2] == Point(3.0, pytest.approx(1.05), 1.0, pytest.approx(1.1), 2)


def test_what_was_not_measured_leaves_a_gap() -> None:
    rows = [Row("p", "a", "A", 0, 0, eval_loss=1.0), Row("p", "a", "A", 0, 1), Row("p", "a", "A", 0, 2, eval_loss=float("nan"))]
    assert [point.x for point in curve(rows, lambda row: row.round, lambda row: row.eval_loss)] == [0.0]
    assert of_base(rows, lambda row: row.eval_loss) == 1.0
    assert of_base(rows[1:], lambda row: row.eval_loss) is None
    assert bytes_a_round(rows[:1], lambda row: row.bytes_up) is None
    assert peaks(rows, lambda row: row.peak_memory_bytes) == []


def test_bytes_of_a_round_leave_out_the_base_model() -> None:
    assert bytes_a_round(table(), lambda row: row.bytes_up) == 100
    assert labels([*table("B"), *table("A")]) == ["B", "A"]


def test_styles_differ() -> None:
    assert len({style(number) for number in range(168)}) == 168


@pytest.mark.filterwarnings("error")
def test_figures_are_drawn_twice_to_the_same_bytes(tmp_path: Path) -> None:
    both = [*table(), *table("Local only", sent=0), *table("LoRA, rank $8$ <b>", seeds=1)]
    first, second = figures(both, tmp_path / "a" / "deep"), figures(both, tmp_path / "b")
    named = NAMES | {"frontier"}  # of more than one series that sends something
    assert {path.name for path in first} == {f"{name}_demo.{form}" for name in named for form in ("png", "svg")}
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert one.read_bytes().startswith(b"\x89PNG" if one.suffix == ".png" else b"<?xml")


def test_the_frontier_has_a_point_for_each_series_and_a_line_for_what_differs_in_size_only() -> None:
    rows = [
        Row("p", "a", label, seed, number, 5.0 - cost / 100 - number - seed, bytes_up=cost * number, bytes_down=cost * number)
        for label, cost in (("K = 512, 2 bits", 10), ("K = 65,536, 2 bits", 40), ("FedAvg, 2 bits", 30))
        for seed in (0, 1)
        for number in (0, 1, 2)
    ]
    axes = draw_frontier(rows, "p").axes[0]
    drawn = {of.get_label(): of.lines[0].get_xydata().tolist() for of in axes.containers}
    expected = {"2 bits": [[30.0, 2.4], [120.0, 2.1]], "FedAvg, 2 bits": [[90.0, 2.2]]}
    assert drawn == {name: [pytest.approx(point) for point in points] for name, points in expected.items()}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "rows",
    [
        table("Local only", sent=0),
        [Row("p", "a", "A", 0, 0)],
        [Row("p", "a", "A", 0, 0, eval_loss=1.0), Row("p", "a", "A", 0, 1, 90.0, bytes_up=1, cumulative_bytes=1)],
    ],
    ids=["no bytes", "no numbers", "diverged"],
)
def test_odd_tables_are_drawn_too(tmp_path: Path, rows: list[Row]) -> None:
    assert len(figures(rows, tmp_path)) == 8


def test_what_was_measured_is_drawn_and_presets_have_files_of_their_own(tmp_path: Path) -> None:
    costs = {"peak_memory_bytes": 10**9, "serialised_bytes": 5, "cpu_seconds": 1.0, "link_seconds": 2.0}
    more = [Row("a/b", "a", "A", 0, 1, 1.0, accuracy=0.5, **costs)]
    found = {path.name for path in figures([*more, *table(preset="a b")], tmp_path) if path.suffix == ".svg"}
    extra = {
        "accuracy_by_bytes",
        "accuracy_by_rounds",
        "memory",
        "loss_by_serialised_bytes",
        "loss_by_cpu_seconds",
        "loss_by_link_seconds",
    }
    assert found == {f"{name}_a-b.svg" for name in NAMES | extra} | {f"{name}_a-b-2.svg" for name in NAMES}


def test_nothing_to_draw_and_nothing_to_draw_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ReportError, match="no row"):
        figures([], tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(
        MissingPackageError, match=r"Figures need the package 'matplotlib'.*pip install 'fedtune\[experiments\]'"
    ):
        figures(table(), tmp_path)
