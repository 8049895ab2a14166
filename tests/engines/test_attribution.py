"""Bytes on the wire, divided: every byte in one part, and polling told from messages by what the idle time looked like."""

from __future__ import annotations

import json
from pathlib import Path

from simulations.attribution import Bytes, Times, attribute, round_starts
from simulations.proxy import Exchange

TIMES = Times(idle=10.0, submitted=70.0, rounds=(100.0, 200.0))


def seen(moment: float, up: int, down: int, call: str = "/pull") -> Exchange:
    return Exchange(0, moment, moment + 1, up, down, call)


PLAIN = [
    seen(5, 1060, 139, "/register"),
    seen(9, 868, 130, "/heartbeat"),
    seen(20, 853, 128),
    seen(60, 849, 128),
    seen(80, 857, 128),  # polling
    seen(81, 853, 465),  # a message
    seen(82, 920, 5100, "/get-fab"),
    seen(99, 1263, 440, "/push"),
    seen(100, 853, 469),
    seen(150, 864, 130, "/heartbeat"),  # a sign of life, during the work
    seen(151, 868, 130, "/pull-object"),  # as long, but of another name
    seen(230, 1266, 440, "/push"),
]


def test_every_byte_is_in_one_part() -> None:
    parts = attribute(PLAIN, TIMES, bundle=5000)
    assert parts.connect == (1060 + 868, 139 + 130)
    assert parts.polling == (853 + 849 + 857 + 864, 3 * 128 + 130)
    assert parts.bundle == (920, 5100)
    assert parts.introduction == (853 + 1263, 465 + 440)
    assert parts.rounds == {1: (853 + 868, 469 + 130), 2: (1266, 440)}
    assert parts.total == (sum(one.up for one in PLAIN), sum(one.down for one in PLAIN))
    assert parts.idle_minute == (853 + 849, 256)


def test_without_names_lengths_decide() -> None:
    """TLS: the 24 bytes by which a connection ends may be among those of a request."""
    parts = attribute([seen(20, 898, 150, ""), seen(120, 922, 174, ""), seen(121, 973, 209, "")], TIMES, bundle=5000)
    assert parts.rounds[1] == Bytes(973, 209)
    assert parts.polling == Bytes(898 + 922, 150 + 174)


def test_a_large_answer_in_a_round_is_no_bundle() -> None:
    assert attribute([seen(150, 900, 90_000)], TIMES, bundle=5000).rounds[1] == (900, 90_000)


def test_the_log_says_when_rounds_began(tmp_path: Path) -> None:
    events = [("RunStarted", 0, "00"), ("RoundStarted", 1, "01"), ("RoundStarted", 1, "05"), ("RoundStarted", 2, "09.500")]
    log = tmp_path / "log.jsonl"
    log.write_text(
        "".join(
            json.dumps({"event": name, "round": number, "time": f"2026-01-01T00:00:{second}+00:00"}) + "\n"
            for name, number, second in events
        )
    )
    first, second = round_starts(log)
    assert second - first == 8.5
