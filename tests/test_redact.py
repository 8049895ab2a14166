"""Secrets are hidden, and no text, however it is built, makes that take longer than its length is worth."""

from __future__ import annotations

import time

import pytest

from fedtune.redact import HIDDEN, redact

TOKEN = "eyJhbGciOi.eyJzdWIiOi.SflKxwRJSM"


@pytest.mark.parametrize(
    ("text", "left"),
    [
        (TOKEN, HIDDEN),
        (f"x-{TOKEN}", f"x-{HIDDEN}"),
        (f"eyJ.eyJ-{TOKEN}!", f"eyJ.{HIDDEN}!"),
        (f"eyJa.b {TOKEN}.more", f"eyJa.b {HIDDEN}.more"),
        ("eyJa eyJa.b eyJ..", "eyJa eyJa.b eyJ.."),
        ("https://anna:pass@word@host/x", f"https://{HIDDEN}@host/x"),
        ("redis://:geheim@host", f"redis://{HIDDEN}@host"),
        ("http://host:80/a@b", "http://host:80/a@b"),
        ("hf_short, hf_" + "a" * 16, f"hf_short, {HIDDEN}"),
        ("Bearer abcdefgh password=abcd", f"Bearer {HIDDEN} password={HIDDEN}"),
        ("-----BEGIN RSA PRIVATE KEY-----\nabc", HIDDEN),
        ("-----BEGIN CERTIFICATE-----\nabc", "-----BEGIN CERTIFICATE-----\nabc"),
    ],
)
def test_known_answers(text: str, left: str) -> None:
    assert redact(text) == left


def test_the_longer_of_two_secrets_is_hidden_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_TOKEN", "abcdefgh")
    monkeypatch.setenv("B_TOKEN", "abcdefgh-and-more")
    assert redact("abcdefgh-and-more, abcdefgh") == f"{HIDDEN}, {HIDDEN}"


PARTS = (
    "-eyJ", "eyJ", "eyJa.", "-eyJ.a", "eyJa.eyJ", "-----BEGIN ", "-----BEGIN A", "-----BEGIN PRIVATE KEY-----",
    "-----END PRIVATE KEY-----", "PRIVATE KEY ", "-----END A", "hf_", "hf-hf_", "hf_aaaaaaaaaaaaaaa.", "://", "://a:", "://:",
    "a:", "a@", ":@", "://a:b@", "bearer ", "bearer", "token=", "token:a ", "-", ".", "a", "A ", " ", "\n",
)  # fmt: skip
STARTS = ("", "eyJ", "://", "://a:", "-----BEGIN ", "-----BEGIN PRIVATE KEY-----", "token=", "hf_", "bearer ")


@pytest.mark.parametrize("part", PARTS, ids=ascii)
def test_a_long_text_takes_no_longer_than_its_length(part: str) -> None:
    """64 kB of the worst one took 33 s, and a text of twice the length four times as long."""
    starts = STARTS if part in ("-eyJ", "a", "a:", "://") else ("",)
    for size in (1 << 16, 1 << 20):
        begun = time.process_time()
        for start in starts:
            redact(start + part * (size // len(part)))
        assert time.process_time() - begun < 2.0 * len(starts)
