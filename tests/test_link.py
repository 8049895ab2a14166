"""The simulated link against values computed by hand."""

from __future__ import annotations

import json

import pytest

from fedtune.errors import ConfigError, RunFolderError
from fedtune.link import (
    LINKS,
    Link,
    assigned,
    client_seconds,
    link_and_work_seconds,
    link_seconds,
    round_seconds,
)
from fedtune.overheads import wire_estimate
from fedtune.traffic import Traffic, as_lists

ONE = Traffic(1000, 2000, 1200, 2200, 1, 1)  # payload up and down, serialised up and down, a message each way
LINK = Link.parse("down=2,up=1,latency=50")


def row(number: int, traffic: dict[str, Traffic], **seconds: float) -> dict[str, object]:
    """As metrics.jsonl has it."""
    found: dict[str, object] = json.loads(json.dumps({"round": number, "traffic": as_lists(traffic), "seconds": seconds}))
    return found


def test_a_message_on_the_wire_weighs_what_was_measured() -> None:
    assert wire_estimate(ONE) == (1200 + 4574 + 4343, 2200 + 1177 + 830)
    assert wire_estimate(ONE + ONE) == (2 * 10_117, 2 * 4_207)
    assert wire_estimate(Traffic()) == (0, 0)


def test_a_client_by_hand() -> None:
    """Payload: 2000 bytes down at 2 Mbit/s are 8 ms, 1000 up at 1 Mbit/s 8 ms, two round trips 100 ms."""
    assert client_seconds(LINK, ONE, "payload") == pytest.approx(0.008 + 0.008 + 0.1)
    assert client_seconds(LINK, ONE) == pytest.approx(4207 * 8 / 2e6 + 10_117 * 8 / 1e6 + 9 * 0.05)
    assert client_seconds(LINK, Traffic()) == 0


def test_a_message_that_was_not_answered_has_its_own_way_only() -> None:
    asked = Traffic(payload_down=2000, serialised_down=2200, messages_down=1)
    assert client_seconds(LINK, asked, "payload") == pytest.approx(0.008 + 0.05)
    assert client_seconds(LINK, asked) == pytest.approx(3377 * 8 / 2e6 + 4574 * 8 / 1e6 + 5 * 0.05)


def test_a_round_takes_as_long_as_its_slowest_client() -> None:
    links = {"a": LINK, "b": Link("slow", down_mbit=0.1, up_mbit=0.1, latency_ms=1000)}
    assert round_seconds(links, {"a": ONE, "b": ONE}, "payload") == pytest.approx(0.16 + 0.08 + 2)
    assert round_seconds(LINK, {"a": ONE, "b": ONE}, "payload") == pytest.approx(0.116)
    assert round_seconds(LINK, {}) == 0
    with pytest.raises(ConfigError, match=r"Client c has no link: links were given for a, b\."):
        round_seconds(links, {"c": ONE})


def test_rounds_add_up_with_and_without_work() -> None:
    rows = [row(0, {}, evaluate=3.0), row(1, {"0": ONE}, clients=2.0, aggregate=0.5), row(2, {"0": ONE, "1": ONE}, clients=1.0)]
    assert link_seconds(rows, LINK, "payload") == pytest.approx([0, 0.116, 0.232])
    assert link_and_work_seconds(rows, LINK, "payload") == pytest.approx([3, 5.616, 6.732])
    one = client_seconds(LINK, ONE)
    assert link_seconds(rows, LINK) == pytest.approx([0, one, 2 * one])


def test_a_row_without_traffic_is_refused() -> None:
    with pytest.raises(RunFolderError, match=r"Round 1 does not say what each client sent: the run is of an older fedtune\."):
        link_seconds([{"round": 1}], LINK)


def test_links_by_name_and_by_numbers() -> None:
    for name, link in LINKS.items():
        assert Link.parse(name) == link
        assert link.name == name
    found = Link.parse("latency=40, up=5,down=20.5")
    assert (found.down_mbit, found.up_mbit, found.latency_ms) == (20.5, 5, 40)


@pytest.mark.parametrize("text", ["", "5g", "down=20", "down=20,up=5", "down=a,up=5,latency=1", "down=1,up=1,latency=1,more=2"])
def test_what_is_no_link_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"is no link: give one of lan, fibre, dsl, 4g, iot, or down=20,up=5,latency=40\."):
        Link.parse(text)


@pytest.mark.parametrize(
    "text", ["down=0,up=1,latency=1", "down=1,up=-1,latency=1", "down=1,up=1,latency=-1", "down=1,up=inf,latency=1"]
)
def test_numbers_that_no_link_has_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"A link has down and up above 0"):
        Link.parse(text)


def test_each_client_always_gets_the_same_link() -> None:
    clients = [str(number) for number in range(200)]
    links = [LINKS["dsl"], LINKS["4g"]]
    found = assigned(links, clients, seed=1)
    assert found == {**assigned(links, clients[::2], seed=1), **assigned(links, clients[1::2], seed=1)}
    assert 60 < sum(link is LINKS["dsl"] for link in found.values()) < 140
    assert found != assigned(links, clients, seed=2)
