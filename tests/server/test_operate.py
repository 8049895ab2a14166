"""A run told what to do while it goes on, and what it says of itself."""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.app import Context, Message

import server.operate
from fedtune.config import RunConfig
from fedtune.control import MOST_AT_ONCE, Command, Doing, Order, is_live, said, send, waiting
from fedtune.errors import ControlError, Interrupted, RunError
from fedtune.ledger import Ledger
from fedtune.ledger_file import LOCK
from fedtune.progress import Event, Note, RoundFinished, listening
from fedtune.run_folder import RunFolder
from fedtune.verify import verify
from tests.laws.federation import config, run

Settings = Callable[..., RunConfig]


@pytest.fixture
def settings(tiny_folder: Path, instructions: Path, tmp_path: Path) -> Settings:
    def build(**changes: object) -> RunConfig:
        quick = {"eval_samples": 4, "eval_every": 0, "local_steps": 2, **changes}
        return config("fedkseed", tiny_folder, instructions, tmp_path / str(quick.pop("out", "run")), **quick)

    return build


def telling(settings: RunConfig, after: int, *orders: Order | bytes) -> Callable[[Event], None]:
    """A listener that leaves `orders` when round `after` is finished."""

    def listen(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.round == after:
            folder = RunFolder.open(settings.out)
            for number, order in enumerate(orders):
                if isinstance(order, Order):
                    send(folder, order)
                else:
                    (folder.path / "control").mkdir(exist_ok=True)
                    (folder.path / "control" / f"{number}.json").write_bytes(order)

    return listen


def commands(folder: Path) -> list[dict[str, object]]:
    with Ledger.open(folder) as ledger:
        verify(ledger)
        return [dict(event.detail) for event in ledger.events("command")]


def test_stop_keeps_the_state_and_a_resume_goes_on(settings: Settings) -> None:
    expected = run(settings(out="whole", rounds=3)).digests
    once = settings(rounds=3)
    with listening(telling(once, 1, Order(Command.STOP))), pytest.raises(Interrupted, match="after round 1; a resume goes on"):
        run(once)
    folder = RunFolder.open(once.out)
    assert said(folder)["doing"] == Doing.STOPPED
    assert list(waiting(folder)) == []
    assert run(once.replace(resume=once.out)).digests == expected
    assert said(folder)["doing"] == Doing.FINISHED


def test_a_dropped_client_is_asked_no_more_also_after_a_resume(settings: Settings) -> None:
    once = settings(rounds=4, clients_per_round=4, client_fraction=1.0)
    orders = (Order(Command.DROP, "2"), Order(Command.STOP))
    with listening(telling(once, 1, *orders)), pytest.raises(Interrupted):
        run(once)
    again = run(once.replace(resume=once.out))
    asked = [row["clients"] for row in again.folder.read_metrics()]
    assert asked == [[], ["0", "1", "2", "3"], *[["0", "1", "3"]] * 3]
    with Ledger.open(again.folder.path) as ledger:
        assert [event.detail["client"] for event in ledger.events("drop")] == ["2"]


def test_a_client_can_be_dropped_before_a_resume(settings: Settings) -> None:
    once = settings(rounds=2, clients_per_round=4)
    with listening(telling(once, 1, Order(Command.STOP))), pytest.raises(Interrupted):
        run(once)
    send(RunFolder.open(once.out), Order(Command.DROP, "0"))
    again = run(once.replace(resume=once.out))
    assert again.folder.read_metrics()[2]["clients"] == ["1", "2", "3"]


def test_evaluate_now_measures_a_round_that_was_not_due(settings: Settings) -> None:
    once = settings(rounds=3)
    with listening(telling(once, 1, Order(Command.EVALUATE))):
        outcome = run(once)
    losses = [row["eval_loss"] is not None for row in outcome.folder.read_metrics()]
    assert losses == [True, True, False, True]
    assert outcome.digests == run(settings(out="whole", rounds=3)).digests


def test_pause_waits_and_unpause_goes_on(settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    once, slept = settings(rounds=2), []
    folder = Path(once.out)

    def sleep(seconds: float) -> None:
        slept.append(said(RunFolder.open(folder))["doing"])
        if len(slept) == 3:
            send(RunFolder.open(folder), Order(Command.UNPAUSE))

    monkeypatch.setattr(server.operate.time, "sleep", sleep)
    with listening(telling(once, 1, Order(Command.PAUSE))):
        outcome = run(once)
    assert slept == [Doing.PAUSED] * 3
    assert outcome.digests == run(settings(out="whole", rounds=2)).digests


def test_what_the_run_does_not_know_or_cannot_do_is_refused_by_name(settings: Settings) -> None:
    once, notes = settings(rounds=2), []

    def listen(event: Event) -> None:
        if isinstance(event, Note) and event.warning:
            notes.append(event.text)

    wrong = (
        b"{", b"[]", b'{"command": "format", "client": ""}', b'{"command": "stop"}', b'{"command": "stop", "client": "1"}',
        b'{"command": "drop", "client": ""}', b'{"command": "drop", "client": "nobody"}', b"\xff\xfe", b"x" * 100_000,
    )  # fmt: skip
    with listening(telling(once, 1, *wrong)), listening(listen):
        outcome = run(once)
    assert len(notes) == len(wrong)
    refused = [str(command["refused"]) for command in commands(outcome.folder.path)]
    assert any("There is no command 'format': use one of pause, unpause, stop, drop, evaluate" in text for text in refused)
    assert any("There is no client 'nobody'" in text for text in refused)
    assert len(refused) == len(wrong)
    assert list(waiting(outcome.folder)) == []


def test_a_command_is_followed_once_even_if_the_process_died_before_it_was_removed(settings: Settings) -> None:
    once = settings(rounds=2)
    with listening(telling(once, 1, Order(Command.STOP))), pytest.raises(Interrupted):
        run(once)
    folder = RunFolder.open(once.out)
    (name,) = [str(command["name"]) for command in commands(folder.path)]
    (folder.path / "control" / name).write_text(json.dumps({"command": "stop", "client": ""}))
    assert run(once.replace(resume=once.out)).summary["rounds"] == 2


def test_a_run_that_nobody_carries_on_takes_no_commands(settings: Settings, tmp_path: Path) -> None:
    once = settings(rounds=1)
    run(once)
    folder = RunFolder.open(once.out)
    assert not is_live(folder.path)
    with pytest.raises(ControlError, match=r"Nobody carries on the run in .* nothing to stop"):
        send(folder, Order(Command.STOP))


def test_a_run_that_died_does_not_look_alive(settings: Settings) -> None:
    once = settings(rounds=2)

    def die(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.round == 1:
            assert said(RunFolder.open(once.out))["doing"] == Doing.RUNNING
            assert is_live(Path(once.out))
            raise KeyboardInterrupt

    with listening(die), pytest.raises(KeyboardInterrupt):
        run(once)
    assert said(RunFolder.open(once.out))["doing"] == "died"


def test_a_failed_run_says_why(settings: Settings) -> None:
    once = settings(rounds=1)

    def handler(message: Message, context: Context) -> Message:
        raise ValueError("boom")

    with pytest.raises(RunError, match="boom"):
        run(once, handler=handler)
    status = said(RunFolder.open(once.out))
    assert status["doing"] == Doing.FAILED
    assert "boom" in status["error"]


def strange(control: Path) -> None:
    """What is no command, in every way that a file can be none."""
    control.mkdir()
    (control / "1.json").write_bytes(b"[" * 2048)
    (control / "2.json").mkdir()
    (control / "2.json" / "inside").write_text("x")
    (Path(os.fsdecode(os.fsencode(control) + b"/\xff.json"))).write_text("{}")
    os.mkfifo(control / "3.json")
    (control / "4.json").touch()
    os.truncate(control / "4.json", 3 << 30)
    (control / "5.json").symlink_to("/dev/zero")
    (control / "6.json").symlink_to("6.json")
    (control / "7.json").write_text(json.dumps({"command": [], "client": ""}))
    (control / "8.json").write_text(json.dumps({"command": "drop", "client": "\x1b[2J"}))
    (control / "9.json").write_text('{"command": "drop", "client": "\\ud800"}')
    (control / "a b.json").write_text(json.dumps({"command": "pause", "client": ""}))


def test_what_is_no_command_is_refused_by_name_and_removed_and_the_run_goes_on(settings: Settings) -> None:
    once = settings(rounds=2)
    notes: list[str] = []

    def listen(event: Event) -> None:
        if isinstance(event, RoundFinished) and event.round == 1:
            strange(Path(once.out) / "control")
        if isinstance(event, Note) and event.warning:
            notes.append(event.text)

    with listening(listen):
        outcome = run(once)
    assert outcome.summary["rounds"] == 2
    refused = [str(command["name"]) for command in commands(outcome.folder.path) if "refused" in command]
    assert sorted(refused) == sorted([*(f"{number}.json" for number in range(1, 10)), r"\udcff.json", "a b.json"])
    assert len(notes) == len(refused)
    assert all(any(name in note for note in notes) for name in refused)
    assert not any("\x1b" in note for note in notes)
    assert list((outcome.folder.path / "control").iterdir()) == []
    with Ledger.open(outcome.folder.path) as ledger:
        verify(ledger)


def test_commands_without_end_do_not_hold_the_run(settings: Settings) -> None:
    """So many are taken before each round; the others wait."""
    once = settings(rounds=1)
    outcome = run(once)
    control = outcome.folder.path / "control"
    control.mkdir(exist_ok=True)
    for number in range(3 * MOST_AT_ONCE):
        (control / f"{number:05d}.json").write_text("no command")
    assert [path.name for path in waiting(outcome.folder)] == [f"{number:05d}.json" for number in range(MOST_AT_ONCE)]


def test_a_control_folder_that_leads_elsewhere_is_not_followed(settings: Settings, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "notes.json").write_text("{}")
    once = settings(rounds=1)
    outcome = run(once)
    (outcome.folder.path / "control").symlink_to(mine)
    assert waiting(outcome.folder) == []
    with pytest.raises(ControlError, match="is a link to another place"):
        send(outcome.folder, Order(Command.DROP, "1"))
    assert [path.name for path in mine.iterdir()] == ["notes.json"]


def test_whoever_asks_whether_a_run_goes_on_does_not_keep_it_from_going_on(settings: Settings) -> None:
    """`fedtune status` at the moment in which a resume takes the lock."""
    once = settings(rounds=1)
    run(once)
    asking = os.open(Path(once.out) / LOCK, os.O_RDONLY)
    fcntl.flock(asking, fcntl.LOCK_SH | fcntl.LOCK_NB)
    assert not is_live(Path(once.out)), "two may ask at a time"
    soon = threading.Timer(0.1, os.close, [asking])
    soon.start()
    with Ledger.open(Path(once.out), writing=True):
        assert is_live(Path(once.out))
    soon.join()
