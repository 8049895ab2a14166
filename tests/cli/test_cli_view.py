"""What the screen knows after each event, and how it is drawn."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from playback import metrics
from rich.console import Console

from fedtune.cli.lines import SIGN_OF_LIFE, LineLog
from fedtune.cli.live import LiveRun, round_table
from fedtune.cli.rows import RoundRow
from fedtune.cli.view import RunView
from fedtune.progress import ClientFinished, ClientStep, EvaluationStep, Event, Note, RoundFinished, RoundStarted, RunStarted

STARTED = RunStarted("ferret", 4, 8, 2, 10, 1_000_000, 1_000_000, "runs/x")


class Clock:
    """A clock that the test moves."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def after(*events: Event, clock: Clock | None = None) -> RunView:
    view = RunView(clock or Clock())
    for event in events:
        view(event)
    return view


def steps(client: str, count: int) -> list[Event]:
    return [ClientStep(client, step + 1, 10, 2.0) for step in range(count)]


def drawn(view: RunView, height: int = 40, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(LiveRun(view))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_it_says_what_is_being_done() -> None:
    first = [STARTED, RoundStarted(1, ("0", "3"))]
    assert after().doing == "loading model and data"
    assert after(STARTED, EvaluationStep("loss", 3, 9)).doing == "evaluating, 3 of 9 samples"
    assert after(STARTED, EvaluationStep("generate", 3, 9)).doing == "generating, 3 of 9 samples"
    assert after(STARTED, EvaluationStep("loss", 9, 9)).doing == "waiting for clients, then evaluating the base model"
    assert after(*first, *steps("0", 10), *steps("3", 2)).doing == "round 1 of 4, client 3, local step 12 of 20"
    assert after(*first, RoundFinished(1, metrics(1, ("0", "3")))).doing == "between rounds"


def test_a_refused_client_counts_as_done() -> None:
    view = after(STARTED, RoundStarted(1, ("0", "3")), *steps("0", 4), ClientFinished(1, "0", "not finite"))
    assert view.steps == (10, 20)


def test_time_left_follows_the_steps_done() -> None:
    clock = Clock()
    view = RunView(clock)
    view(STARTED)
    assert view.seconds_left is None
    clock.now += 50  # loading does not count
    view(RoundStarted(1, ("0", "3")))
    assert view.seconds_left is None
    for event in steps("0", 5):
        view(event)
    clock.now += 10
    assert view.seconds_left == 10 / 5 * (4 * 2 * 10 - 5)
    view(RoundFinished(1, metrics(1, ("0", "3"))))
    assert view.seconds_left == 10 / 20 * (80 - 20)


def test_bytes_are_added_and_compared_with_fedavg() -> None:
    view = after(
        STARTED,
        RoundFinished(0, metrics(0, ())),
        RoundFinished(1, metrics(1, ("0", "3"))),
        RoundFinished(2, metrics(2, ("1", "2"))),
    )
    assert view.payload == 4 * 1100
    assert view.fedavg == 4 * 8_000_000
    view.started = replace(STARTED, parameters=8)  # adapters: FedAvg would send the whole model all the same
    assert view.fedavg == 4 * 8_000_000


def test_a_row_reads_metrics_and_tolerates_gaps() -> None:
    row = RoundRow.of(metrics(3, ("0", "1", "2"), {"1": "late"}))
    assert (row.round, row.clients, row.refused, row.seconds) == (3, 2, 1, 1.5)
    assert (row.up_per_client, row.down_per_client) == (100.0, 1000.0)
    empty = RoundRow.of({"round": 1})
    assert (empty.clients, empty.train_loss, empty.eval_loss, empty.up_per_client, empty.seconds) == (0, None, None, 0.0, 0.0)


def test_the_live_table_shows_rounds_work_and_bytes() -> None:
    text = drawn(
        after(
            STARTED,
            RoundFinished(0, metrics(0, ())),
            RoundStarted(1, ("0", "3")),
            RoundFinished(1, metrics(1, ("0", "3"), {"3": "late"})),
            RoundStarted(2, ("0", "3")),
            *steps("0", 5),
        )
    )
    assert "ferret: 1,000,000 parameters, 2 of 8 clients a round, 10 local steps, 4 rounds, in runs/x" in text
    assert "base" in text
    assert "1 (1 refused)" in text
    assert "round 2 of 4, client 0, local step 5 of 20" in text
    assert "payload so far 2.20 kB; FedAvg 16.0 MB (7,270x)" in text


def test_the_live_table_fits_the_terminal() -> None:
    rounds = [RoundFinished(number, metrics(number, ("0",))) for number in range(200)]
    text = drawn(after(STARTED, *rounds), height=24)
    assert len(text.splitlines()) <= 24
    shown = [line.split()[0] for line in text.splitlines() if line.split()]
    assert "199" in shown
    assert "..." in shown
    assert "100" not in shown


@pytest.mark.parametrize(("key", "title"), [("rouge_l", "ROUGE-L"), ("accuracy", "accuracy")])
def test_a_score_has_a_column_only_where_it_is_measured(key: str, title: str) -> None:
    scored = RoundRow.of({**metrics(1, ("0",)), key: 0.25})
    without = RoundRow.of(metrics(0, ()))
    table = round_table([without, scored], 5)
    (column,) = [column for column in table.columns if column.header == title]
    assert list(column.cells) == ["", "0.2500"]
    assert {"ROUGE-L", "accuracy"} & {column.header for column in table.columns} == {title}
    assert not {"ROUGE-L", "accuracy"} & {column.header for column in round_table([without], 5).columns}


def log_of(clock: Clock, events: list[tuple[float, Event]]) -> list[str]:
    lines: list[str] = []
    view = RunView(clock)
    log = LineLog(view, lines.append)
    for later, event in events:
        clock.now += later
        view(event)
        log(event)
    return lines


def test_the_log_has_a_line_a_round() -> None:
    rouge = {**metrics(1, ("0", "3"), {"3": "late"}), "rouge_l": 0.25, "accuracy": 0.875}
    lines = log_of(
        Clock(),
        [
            (0, Note("device: cpu")),
            (0, Note("slow disk", warning=True)),
            (0, STARTED),
            (0, RoundFinished(0, metrics(0, ()))),
            *[(0, event) for event in steps("0", 3)],
            (0, ClientFinished(1, "0", "")),
            (0, ClientFinished(1, "3", "late")),
            (0, RoundFinished(1, rouge)),
        ],
    )
    assert lines == [
        "device: cpu",
        "warning: slow disk",
        "ferret: 1,000,000 parameters, 2 of 8 clients a round, 10 local steps, 4 rounds, in runs/x",
        "base model, held-out loss 3.0000, 1.50 s",
        "warning: round 1, client 3: late",
        "round 1, 1 clients (1 refused), train loss 2.5000, held-out loss 2.7500, accuracy 0.8750, ROUGE-L 0.2500, "
        "up 100 B down 1.00 kB a client, 1.50 s",
    ]


def test_the_log_gives_a_sign_of_life_in_a_long_round() -> None:
    events: list[tuple[float, Event]] = [(0, STARTED), (0, RoundStarted(1, ("0", "3")))]
    events += [(SIGN_OF_LIFE / 5, event) for event in steps("0", 10)]
    lines = log_of(Clock(), events)
    assert lines[1:] == [
        "round 1 of 4, client 0, local step 5 of 20, about 2 min left",
        "round 1 of 4, client 0, local step 10 of 20, about 2 min left",
    ]
