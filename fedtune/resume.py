"""What a resumed run does with each setting: it must match, the ledger's value wins, or the new value wins with a note.

One table. A setting that enters a state, an update or the division of the data must match: with another value the run would
not be the one that the ledger records. What only changes how losses compare stays as it was. What says where things are,
how fast they go or who is asked may change.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from fedtune.config import RunConfig, Scalar
from fedtune.errors import ForeignLedgerError
from fedtune.ledger import Ledger
from fedtune.ledger_cells import settings_in
from fedtune.ledger_file import LEDGER
from fedtune.run_folder import RunFolder


class Rule(Enum):
    """What happens to a value that differs from the ledger's."""

    MUST_MATCH = "must match"
    LEDGER_WINS = "ledger wins"
    NEW_WINS = "new value wins"


_SAME = """algorithm seed clients local_steps batch_size lr weighting K eps directions_per_step server_lr anneal momentum
    optimizer local_momentum accumulate clip_norm pool_size blocks allocation reconstruction coordinates lora_rank lora_alpha
    lora_targets only_client family rank pool_every
    coefficient_bits scalar_bits dtype update_rounding instruction_column input_column output_column category_column template
    max_length partition dirichlet_alpha min_samples holdout holdout_category"""
_KEPT = "eval_samples generate_samples choices max_new_tokens"
_NEW = """rounds client_fraction clients_per_round sampling over_selection min_replies short_round round_timeout wait_timeout
    grace max_examples keep_updates min_clients model revision trust_remote_code device device_map offload threads data
    holdout_file eval_every eval_batch_size out resume"""

POLICY: dict[str, Rule] = {
    key: rule
    for rule, keys in ((Rule.MUST_MATCH, _SAME), (Rule.LEDGER_WINS, _KEPT), (Rule.NEW_WINS, _NEW))
    for key in keys.split()
}

_PLACES = ("out", "resume")  # where the folder is now: not worth a note, and never compared


@dataclass(frozen=True)
class Plan:
    """How a run goes on: its settings, those that are new, and a sentence about each new value and each that is not used."""

    config: RunConfig
    changed: Mapping[str, Scalar]
    news: tuple[str, ...]
    unused: tuple[str, ...]


def settings_of(ledger: Ledger) -> RunConfig:
    """The settings that the run had last: those of the header and what later resumes changed."""
    used: dict[str, Any] = dict(ledger.header.used)
    for event in ledger.events("resume"):
        used.update(event.detail["settings"])
    return settings_in(used, "the header and the resumes")


def stored_settings(folder: RunFolder) -> RunConfig:
    """The settings of the run in `folder`, from its ledger; from config.json where the run died before it made one."""
    if not (folder.path / LEDGER).exists():
        return folder.config()
    with Ledger.open(folder.path) as ledger:
        return settings_of(ledger)


def plan(ledger: Ledger, asked: RunConfig, folder: RunFolder) -> Plan:
    """Hold `asked` against the ledger in `folder`.

    Raises:
        ForeignLedgerError: settings that must match do not, or the run is already past the last round.
    """
    if asked.rounds < ledger.last:
        raise ForeignLedgerError(
            f"The run in '{folder.path}' has finished {ledger.last} rounds already: rounds cannot be {asked.rounds}."
        )
    return held_against(folder, settings_of(ledger), asked)


def held_against(folder: RunFolder, before: RunConfig, asked: RunConfig) -> Plan:
    """What `asked` changes in the settings `before`. Raises ForeignLedgerError if settings that must match do not."""
    rules = {**POLICY, "rounds": _rule_of_rounds(before), **_rules_of_asking(before)}
    differing = [key for key in POLICY if key not in _PLACES and getattr(asked, key) != getattr(before, key)]
    fixed = [key for key in differing if rules[key] is Rule.MUST_MATCH]
    if fixed:
        raise ForeignLedgerError(
            f"The run in '{folder.path}' was made with "
            + ", ".join(f"{key} = {getattr(before, key)!r} (now {getattr(asked, key)!r})" for key in fixed)
            + ": resume it with the same values, or start a new run.",
            settings=tuple(fixed),
        )
    changed = {key: getattr(asked, key) for key in differing if rules[key] is Rule.NEW_WINS}
    kept = [key for key in differing if rules[key] is Rule.LEDGER_WINS]
    news = [f"{key} = {changed[key]!r} from here on; it was {getattr(before, key)!r}." for key in changed]
    unused = [
        f"{key} stays {getattr(before, key)!r} as in the rounds before: {getattr(asked, key)!r} is not used." for key in kept
    ]
    return Plan(before.replace(**changed, out=str(folder.path), resume=""), changed, tuple(news), tuple(unused))


def _rules_of_asking(before: RunConfig) -> dict[str, Rule]:
    """How many clients a round would ask is the number of steps of `central`."""
    if before.algorithm != "central":
        return {}
    return {"client_fraction": Rule.MUST_MATCH, "clients_per_round": Rule.MUST_MATCH}


def _rule_of_rounds(before: RunConfig) -> Rule:
    """The number of rounds is a part of the schedule of server_lr."""
    return Rule.MUST_MATCH if before.anneal != "none" else Rule.NEW_WINS
