"""The structured log: one object an event, and no secret in it, in the ledger, or in any other file of the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from flwr.app import Context, Message

import client.app
from fedtune.errors import RunError
from fedtune.redact import redact
from tests.laws.federation import config, run

SECRETS = ("hf_abcdefghijklmnopqrstuv", "correct-horse-battery", "eyJhbGciOi.eyJzdWIiOi.SflKxwRJSM", "geheim99")


def test_secrets_are_hidden_and_other_texts_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_API_KEY", "correct-horse-battery")
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    text = "cannot read https://anna:geheim99@host/x: hf_abcdefghijklmnopqrstuv, correct-horse-battery, token=geheim99"
    hidden = redact(text + " eyJhbGciOi.eyJzdWIiOi.SflKxwRJSM Bearer geheim99 password=geheim99")
    assert not any(secret in hidden for secret in SECRETS)
    assert hidden.count("***") == 7
    key = "-----BEGIN EC PRIVATE KEY-----\nabc\n-----END EC PRIVATE KEY----- after"
    assert redact(key) == "*** after"
    plain = "The loss was not finite after 0 of 4 steps: token 5 of client site-a, tokens: 7, false."
    assert redact(plain) == plain


def test_a_run_is_logged_event_by_event_and_no_file_has_a_secret(
    tiny_folder: Path, instructions: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NODE_TOKEN", "correct-horse-battery")
    settings = config("fedkseed", tiny_folder, instructions, tmp_path / "run", rounds=2, eval_samples=4)

    def handler(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            raise ValueError(f"refused {' '.join(f'token={secret}' for secret in SECRETS)}")
        return client.app.app(message, context)

    outcome = run(settings, handler=handler)
    lines = [json.loads(line) for line in (outcome.folder.path / "log.jsonl").read_text().splitlines()]
    rounds = [line["event"] for line in lines if line["event"].startswith("Round")]
    assert rounds == ["RoundFinished", *["RoundStarted", "RoundFinished"] * 2]
    assert sum(line["level"] == "warning" and line["event"] == "ClientFinished" for line in lines) == 3
    assert {"time", "pid", "level", "event"} <= set(lines[0])
    assert len(outcome.refused) == 3
    for path in outcome.folder.path.iterdir():
        assert not any(secret.encode() in path.read_bytes() for secret in SECRETS), path.name


def test_the_error_that_ended_a_run_is_logged(tiny_folder: Path, instructions: Path, tmp_path: Path) -> None:
    settings = config("fedkseed", tiny_folder, instructions, tmp_path / "run", rounds=1)

    def handler(message: Message, context: Context) -> Message:
        raise ValueError("boom token=geheim99")

    with pytest.raises(RunError, match="boom"):
        run(settings, handler=handler)
    last = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert (last["level"], last["event"]) == ("error", "RunError")
    for path in (tmp_path / "run").iterdir():
        assert b"geheim99" not in path.read_bytes(), path.name
