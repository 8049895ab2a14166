"""Foreign text on screens and in files: nothing that acts on a terminal, no secret, no length that costs anything."""

from __future__ import annotations

import json
import time

import pytest

from fedtune.errors import MalformedMessageError
from fedtune.foreign import LONGEST_LINE, LONGEST_TEXT, client_id, for_file, for_json, for_reading, for_screen
from tests.foreign_texts import TEXTS, acting

ACTING = ("\x1b[2J", "\x9b31m", "\r\nINFO : round 9", "\x07", "\x00", "\u202e", "\u2066", "\u2028", "\ud83d", "\x7f")


@pytest.mark.parametrize("acting", ACTING)
def test_what_acts_on_a_terminal_is_written_as_what_it_is(acting: str) -> None:
    for safe in (for_screen(f"a{acting}b"), for_file(f"a{acting}b")):
        assert safe.isprintable()
        assert safe.startswith("a\\")
        assert safe.endswith("b")
        safe.encode()


def test_ordinary_text_in_any_script_stays() -> None:
    for text in ("", "loss 0.5 at step 7", "Zürich, 北京, עברית, नमस्ते", "a\u00a0b [/] <b> {x}"):
        assert for_screen(text) == for_file(text) == text


def test_long_text_is_cut_before_it_is_worked_on() -> None:
    for make, most in ((for_screen, LONGEST_LINE), (for_file, LONGEST_TEXT)):
        assert make("x" * most) == "x" * most
        assert make("x" * (most + 3)) == "x" * most + " ... (3 more characters)"
        assert len(make("\x1b" * (1 << 24))) < 12 * most


def test_files_get_no_secret() -> None:
    assert "geheim" not in for_file("token=geheim99 and https://a:geheim99@host/")


def test_a_secret_at_the_cut_is_not_shown_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "correct-horse-battery-staple" * 20
    monkeypatch.setenv("SITE_API_KEY", secret)
    for before in range(LONGEST_TEXT - len(secret) - 20, LONGEST_TEXT + 20, 7):
        for after in (0, 10_000):
            shown = for_file("x" * before + secret + " y" * after)
            assert "corr" not in shown
            assert len(shown) < LONGEST_TEXT + 40
    shrinks = for_file(f"token={'a' * 3000} " * 2 + "x" * 2000 + secret + "y" * 10_000)
    assert "corr" not in shrinks
    assert for_file("x" * 20_000) == "x" * LONGEST_TEXT + " ... (16000 more characters)"


@pytest.mark.parametrize("text", TEXTS, ids=ascii)
def test_text_that_is_read_keeps_its_layout_and_nothing_else(text: str) -> None:
    assert not [found for found in acting(for_reading(text)) if not found.startswith("INFO")]
    assert for_reading(text).count("\n") == text.count("\n")


def test_spelling_is_no_control_character() -> None:
    for text in ("\u0645\u06cc\u200c\u062e", "\u0915\u094d\u200d\u0937", "\tone\n\ttwo", "\U0001f468\u200d\U0001f469"):
        assert for_reading(text) == text


@pytest.mark.parametrize("text", [*TEXTS, "\ud83d", "\U000e0041", "\uffff", "北京 \U0001f600"], ids=ascii)
def test_a_json_document_keeps_its_value_and_acts_on_nothing(text: str) -> None:
    for indent in (None, 2):
        safe = for_json(json.dumps({text: [text, 1.5]}, ensure_ascii=False, indent=indent))
        assert json.loads(safe) == {text: [text, 1.5]}
        assert not list(acting(safe))
        safe.encode()
    assert "北京 \U0001f600" in for_json('"北京 \U0001f600"')


def test_a_client_id_has_one_form() -> None:
    for good in ("0", "17", "site-a", "ward_3.north@clinic", "a" * 64):
        assert client_id(good) == good
    for bad in ("", "a" * 65, "[/]", "a\nb", "a\x00b", "\u00b2", "\u0663", " a", "-a", "a b", "Zürich", 7, None, b"a", ["a"]):
        with pytest.raises(MalformedMessageError, match="A client id is"):
            client_id(bad)


def test_a_hostile_text_takes_no_time() -> None:
    begun = time.process_time()
    for_file("-eyJ" * (1 << 20))
    assert time.process_time() - begun < 5.0
