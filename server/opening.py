"""How a run begins: in a new folder with a new ledger, or where the ledger of an earlier process ends."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from fedtune.algorithms import State
from fedtune.beside import Beside
from fedtune.chain import as_text
from fedtune.config import RunConfig
from fedtune.data.encode import Encoded
from fedtune.data.federated import FederatedData
from fedtune.errors import ForeignLedgerError, LedgerError
from fedtune.ledger import Header, Ledger, Round
from fedtune.ledger_file import LEDGER
from fedtune.replay import Rules, restore, snapshot_of
from fedtune.resident import Resident, renewed
from fedtune.resume import plan, settings_of
from fedtune.run_folder import METRICS, RunFolder, check_new, dated, versions
from fedtune.trust import RESUME, own_code_explained
from fedtune.verify import check_chains


@dataclass(frozen=True)
class Opened:
    """A run that can go on: its settings, folder and ledger, the rules and the state after the ledger's last round.

    `notes` say what differs from the process before.
    """

    config: RunConfig
    folder: RunFolder
    ledger: Ledger
    rules: Rules
    state: State
    notes: tuple[str, ...] = ()


def open_run(asked: RunConfig) -> Opened:
    """Begin the run that `asked` describes, or carry on the one in `asked.resume`. Model and data are loaded then.

    Raises:
        FedtuneError: the folder exists (a new run), does not hold this run (a resumed one), or cannot be written; nothing
            was changed.
    """
    return _carry_on(asked) if asked.resume else _begin(asked)


def _begin(asked: RunConfig) -> Opened:
    config = asked.replace(out=str(Path(asked.out or dated(asked.algorithm)).resolve()))
    check_new(config.out)
    here = renewed(config)
    here.load()  # a run that cannot start leaves no folder behind
    folder = RunFolder.create(config.out, asked.as_mapping(), config)
    return _with_new_ledger(folder, asked, config, here)


def _with_new_ledger(folder: RunFolder, asked: RunConfig, config: RunConfig, here: Resident) -> Opened:
    rules = _rules(config, here)
    state = rules.start()
    layout = here.replica.layout
    header = Header(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions=versions(),
        asked=asked.as_mapping(),
        used=config.as_mapping(),
        fingerprint=rules.fingerprint,
        layout=layout.digest,
        shapes=tuple((entry.name, entry.shape) for entry in layout.entries),
        partition=data_digest(here.data),
        pool=state.pool.identity,
    )
    snapshot = snapshot_of(state, 0, Beside(folder.path).store)
    ledger = Ledger.create(folder.path, header, snapshot, Round(0, state=rules.digest(state)))
    return Opened(config, folder, ledger, rules, state)


def _carry_on(asked: RunConfig) -> Opened:
    folder = RunFolder.open(Path(asked.resume).resolve())
    if not (folder.path / LEDGER).exists():
        return _never_begun(folder, asked)
    ledger = Ledger.open(folder.path, writing=True)
    try:
        check_chains(ledger)
        going_on = plan(ledger, asked, folder)
        here = renewed(going_on.config)
        with own_code_explained(settings_of(ledger), going_on.config, RESUME):
            here.load()
        rules = _rules(going_on.config, here)
        _check_same(ledger, rules, here)
        state = restore(ledger, rules)
        ledger.sweep(keep_updates=going_on.config.keep_updates)
        now = versions()
        older = _older(ledger)
        ledger.commit_event("resume", {"settings": dict(going_on.changed), "versions": now}, elapsed_of(ledger))
    except BaseException:
        ledger.close()
        raise
    news = [f"{name} is {now[name]} now; it was {older[name]}. " + _LIBRARY for name in now if now[name] != older.get(name)]
    begun = _begun(ledger.last, going_on.config.rounds, rules.digest(state).hex())
    return Opened(going_on.config, folder, ledger, rules, state, (begun, *going_on.news, *going_on.unused, *news))


def _begun(last: int, rounds: int, digest: str) -> str:
    if last >= rounds:
        return f"All {rounds} rounds were done before, digest {digest}: none is run. --set rounds=MORE would go on."
    return f"Going on after round {last} of {rounds}, digest {digest}."


_LIBRARY = "Rounds from here on may differ in their last digits from those of the earlier process."


def _never_begun(folder: RunFolder, asked: RunConfig) -> Opened:
    """A process died after it made the folder and before it made the ledger: nothing had happened yet."""
    if (folder.path / METRICS).exists():
        raise LedgerError(f"'{folder.path}' has rounds but no {LEDGER}: it is of a fedtune without ledgers. Start a new run.")
    now = {key: getattr(asked, key) for key in ("model", "revision", "trust_remote_code", "data", "holdout_file")}
    config = folder.config().replace(**now, out=str(folder.path), resume="")
    here = renewed(config)
    here.load()
    opened = _with_new_ledger(folder, config, config, here)
    try:
        going_on = plan(opened.ledger, asked, folder)
        opened.ledger.commit_event("resume", {"settings": dict(going_on.changed), "versions": versions()})
    except BaseException:
        opened.ledger.close()
        raise
    return Opened(going_on.config, folder, opened.ledger, opened.rules, opened.state, (*going_on.news, *going_on.unused))


def _rules(config: RunConfig, here: Resident) -> Rules:
    return Rules(config, here.replica.layout, here.replica.fingerprint)


def _check_same(ledger: Ledger, rules: Rules, here: Resident) -> None:
    """Refuse another base model, other directions or other data than the ledger's."""
    header = ledger.header
    if (rules.fingerprint, rules.layout.digest) != (header.fingerprint, header.layout):
        raise ForeignLedgerError(
            f"The base model '{rules.config.model}' is not the one that the run started from: give the same files and dtype.",
            expected=header.fingerprint.hex(),
            got=rules.fingerprint.hex(),
        )
    if rules.algorithm.pool(rules.config, rules.layout, 0).identity != header.pool:
        raise ForeignLedgerError("This program derives other directions than the run's: install the fedtune that began it.")
    if data_digest(here.data) != header.partition:
        raise ForeignLedgerError(f"The data '{rules.config.data}' is not what the run started with: give the same files.")


def elapsed_of(ledger: Ledger) -> float:
    """Seconds that the run took so far, in all its processes, as far as the ledger knows."""
    return max([ledger.round(ledger.last).elapsed, *(event.elapsed for event in ledger.events())])


def _older(ledger: Ledger) -> dict[str, str]:
    """The versions that the run went on with last."""
    found = dict(ledger.header.versions)
    for event in ledger.events("resume"):
        found = dict(event.detail["versions"])
    return found


def data_digest(data: FederatedData) -> bytes:
    """32 bytes over which rows each client and the held-out set have, and their tokens."""
    digest = hashlib.sha256(as_text(data.partition.as_json()).encode())
    for sample in _samples((*data.clients, data.heldout)):
        digest.update(np.array([len(sample.input_ids), sample.prompt_length, *sample.input_ids], dtype="<i4").tobytes())
    return digest.digest()


def _samples(groups: Iterable[Iterable[Encoded]]) -> Iterator[Encoded]:
    for group in groups:
        yield from group
