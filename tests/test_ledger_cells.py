"""What each kind of cell of a ledger may hold, up to its limits; and what it may not, named by table, row and column."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedtune.errors import DamagedLedgerError, ForeignLedgerError
from fedtune.ledger_cells import LARGEST_COUNT, LONGEST_NAME, Cells, Undecodable, settings_in, text_of
from fedtune.traffic import Traffic


def cells(value: object) -> Cells:
    return Cells(Path("run/ledger.sqlite"), "events", "event 3", {"x": value})


def read(kind: str, value: object) -> object:
    return getattr(cells(value), kind)("x")


PLAIN = [
    ("whole", [0, 1, LARGEST_COUNT], [-1, LARGEST_COUNT + 1, 0.0, "1", b"1", None]),
    ("real", [0.0, -1.5, 1e308], [float("inf"), float("nan"), 1, "1.0", None]),
    ("real_or_none", [None, 2.5], [float("-inf"), 1, "x"]),
    ("text", ["", "x" * LONGEST_NAME], ["x" * (LONGEST_NAME + 1), b"x", 1, None, Undecodable(b"\xff")]),
    ("blob", [b"", b"x" * 5000], ["x", 1, None, Undecodable(b"\xff")]),
]
SIX = [0, 1, 2, 3, 4, LARGEST_COUNT]
JSON = [
    ("mapping", [{}, {"a": [1, {"b": None}]}], [[], 1, None, "x"]),
    ("names", [[], ["a", ""]], [{}, [1], [["a"]], [None], "a"]),
    ("texts", [{}, {"a": "b"}], [[], {"a": 1}, {"a": None}, {"a": ["b"]}]),
    ("numbers", [{}, {"a": 1, "b": -0.5}], [[], {"a": "1"}, {"a": True}, {"a": None}]),
    ("traffic", [{}, {"a": SIX}], [[], {"a": SIX[1:]}, {"a": [*SIX, 0]}, {"a": [*SIX[1:], -1]}, {"a": [*SIX[1:], True]},
                                   {"a": [*SIX[1:], 0.5]}, {"a": [*SIX[1:], LARGEST_COUNT + 1]}, {"a": {}}]),
    ("shapes", [[["a", [2, 3]], ["b", []]], [["a", [2**20, 2**20]]], [["a" * LONGEST_NAME, [1] * 16]]],
     [[], {}, [["a"]], [["a", [1], 2]], [["a", [2**20, 2**20]], ["b", [1]]], [["a", [1] * 17]], [[1, [1]]], [["a", 1]],
      [["a", [-1]]], [["a", [0.5]]], [["a" * (LONGEST_NAME + 1), [1]]]]),
]  # fmt: skip
SCORES = ("eval_loss_sample_mean", "perplexity", "accuracy", "rouge_l", "rouge_l_papers", "exact_match")
LAST = {"samples": 4, "eval_loss": 1.5, "accuracy": None}  # of a category
DETAILS = {  # what must be there, what may be there, and wrong values of both
    "evaluation": ({"round": 3, "eval_loss": None}, {**dict.fromkeys(SCORES, 0.5), "seconds": {"a": 1.0}, "questions": 3,
                    "categories": {"": {"samples": 2}, "a": LAST}},
                   {"round": -1, "eval_loss": "x", **dict.fromkeys(SCORES, True), "seconds": {"a": "b"}, "cpu_seconds": [],
                    "questions": None, "categories": {"a": {**LAST, "samples": -1}}}),
    "attempt": ({"round": 1, "clients": ["a"], "refused": {"a": "b"}, "seconds": {"a": 1}, "traffic": {"a": SIX}}, {},
                {"round": True, "clients": [1], "refused": {"a": 1}, "seconds": {"a": ""}, "traffic": {"a": [1]}}),
    "resume": ({"settings": {"a": 1, "b": "c", "d": True}, "versions": {"a": "1"}}, {},
               {"settings": {"a": []}, "versions": {"a": 1}}),
    "command": ({"name": "stop"}, {"client": "a"}, {"name": 1, "command": [], "client": None, "refused": {}}),
    "drop": ({"client": "a"}, {}, {"client": 1}),
    "keys": ({"keys": {"a": "b"}}, {}, {"keys": ["a"]}),
    "made up": ({}, {"round": "any"}, {}),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "good", "bad"), PLAIN, ids=[kind for kind, _, _ in PLAIN])
def test_a_cell_holds_what_it_is_asked_for_up_to_its_limits(kind: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        assert read(kind, value) == value
    for value in bad:
        refused(kind, value)


@pytest.mark.parametrize(("kind", "good", "bad"), JSON, ids=[kind for kind, _, _ in JSON])
def test_json_in_a_cell_has_the_form_of_its_column(kind: str, good: list[object], bad: list[object]) -> None:
    for value in good:
        assert json.loads(json.dumps(read(kind, json.dumps(value)), default=vars)) == as_read(kind, value)
    for value in bad:
        refused(kind, json.dumps(value))
    for text in ("", "{", "[1e999]", "NaN", b"{}", None):
        refused(kind, text)


def as_read(kind: str, value: object) -> object:
    if kind == "traffic":
        assert isinstance(value, dict)
        return {name: vars(Traffic(*counts)) for name, counts in value.items()}
    return value


def refused(kind: str, value: object) -> None:
    with pytest.raises(
        DamagedLedgerError, match=r"column x of event 3 \(table events\) (is|has|holds) \w.*\. Restore"
    ) as caught:
        read(kind, value)
    assert caught.value.facts == {"row": "event 3", "table": "events", "column": "x"}


@pytest.mark.parametrize("kind", DETAILS)
def test_an_event_has_its_fields_in_their_form_and_may_have_others(kind: str) -> None:
    needed, possible, bad = DETAILS[kind]
    good = needed | possible
    for sound in (needed, good | {"more": [1, {}]}):
        assert cells(json.dumps(sound)).detail("x", kind) == sound
    for name in needed:
        with pytest.raises(DamagedLedgerError, match=f"of an event '{kind}' has no {name}"):
            cells(json.dumps({key: value for key, value in good.items() if key != name})).detail("x", kind)
    for name, value in bad.items():
        with pytest.raises(DamagedLedgerError, match="column x of event 3"):
            cells(json.dumps(good | {name: value})).detail("x", kind)


@pytest.mark.parametrize("bad", [[], 1, {}, {"samples": 0.5}, {**LAST, "eval_loss": "x"}, {**LAST, "accuracy": True}])
def test_a_category_has_a_count_and_numbers_or_nothing(bad: object) -> None:
    sound = {"round": 3, "eval_loss": None, "categories": {"a": {"samples": 2}, "b": LAST}}
    assert cells(json.dumps(sound)).detail("x", "evaluation") == sound
    with pytest.raises(DamagedLedgerError, match="column x of event 3"):
        cells(json.dumps({**sound, "categories": {"a": LAST, "b": bad}})).detail("x", "evaluation")


def test_the_limits_of_a_number_and_a_length_are_the_callers() -> None:
    assert [cells(value).whole("x", 1, 2) for value in (1, 2)] == [1, 2]
    assert cells(b"12").blob("x", 2) == b"12"
    assert cells("12").text("x", 2) == "12"
    for refuse in (lambda: cells(0).whole("x", 1), lambda: cells(3).whole("x", most=2), lambda: cells(b"1").blob("x", 2)):
        with pytest.raises(DamagedLedgerError, match="column x"):
            refuse()


def test_a_text_of_the_file_is_utf_8_or_known_not_to_be() -> None:
    assert text_of("é".encode()) == "é"
    assert isinstance(text_of(b"\xff"), Undecodable)


def test_settings_that_are_unknown_are_foreign_and_impossible_ones_are_damage() -> None:
    assert settings_in({"rounds": 3}, "the header").rounds == 3
    with pytest.raises(ForeignLedgerError, match="use the fedtune that made it"):
        settings_in({"made_up": 3}, "the header")
    with pytest.raises(DamagedLedgerError, match="No run can have the settings in the header"):
        settings_in({"rounds": -3}, "the header")
