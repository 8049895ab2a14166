"""The round loop: wait for clients, ask, collect, move the state, write down, evaluate. Its state is in the strategy.

A round is committed to the ledger before its result is used, so a process that dies leaves a run that another one carries
on to the same end.
"""

from __future__ import annotations

import time
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord
from flwr.serverapp import Grid

from fedtune.control import Doing
from fedtune.directions.choice import kernels_note
from fedtune.divergence import first_divergence
from fedtune.errors import DivergedError, RunError
from fedtune.evaluation import evaluate_heldout, generate
from fedtune.layout import base_size
from fedtune.progress import Note, RoundFinished, RunFinished, RunStarted, check_stop, emit
from fedtune.resident import Resident, resident
from server.exchange import POLL_SECONDS, Patience, exchange
from server.newcomers import Newcomers
from server.opening import Opened
from server.operate import Operator
from server.outcome import failed_alike, unchanged
from server.phases import Phases
from server.record import Record
from server.strategy import CoefficientStrategy

SHORT_ROUNDS = 3  # so many rounds in a row, or tries at one, without enough usable updates end the run
_SIXTEEN_BIT = (
    "a local step smaller than half the spacing of a weight is lost on the client, so what it trains and what is rebuilt "
    "from its numbers differ; the global model is summed in float32 all the same (docs/methods.md has figures; "
    "update_rounding = stochastic or master keeps such steps)"
)


class Run:
    """One run on a grid of clients.

    Args:
        grid: Flower's, or the one in this process.
        opened: the run, new or carried on.
    """

    def __init__(self, grid: Grid, opened: Opened) -> None:
        self.grid, self.config, self.folder, self.notes = grid, opened.config, opened.folder, opened.notes
        self.here: Resident = resident(opened.config)
        self.record = Record(opened)
        dropped, keys = self.record.dropped(), self.record.keys()
        self.strategy = CoefficientStrategy(opened.rules, opened.state, dropped, keys, opened.ledger.keep)
        self.operator = Operator(self.record, self.strategy)
        self._newcomers: Newcomers | None = None
        self._phases = Phases()

    def execute(self) -> dict[str, object]:
        """All rounds that are left; returns the summary, which is also written to the folder.

        Raises:
            FedtuneError: a typed reason, with everything up to the last finished round kept. UnchangedError: all rounds are
                done, summary.json is written, and the model is still the base model.
        """
        self._announce()
        pending = self._catch_up()
        self.operator.heed()
        if self.record.last < self.config.rounds:
            self._wait_for_clients()
        if pending:
            self._settle(self.record.last)
        short = 0
        while (number := self.record.last + 1) <= self.config.rounds:
            self._between_rounds()
            self._greet()
            short = 0 if self._round(number) else short + 1
            if short == SHORT_ROUNDS:
                raise self._too_short()
        self._between_rounds()
        summary = self.record.finish(self.here.replica.layout.numel, base_size(self.here.replica.model))
        emit(RunFinished(summary))
        nothing = unchanged(self.record.rows)
        if nothing:
            raise nothing
        self.operator.say(Doing.FINISHED)
        return summary

    def _greet(self) -> None:
        """Ask clients that came since who they are."""
        if self._newcomers is not None:
            self._newcomers.greet()
            self.record.commit_keys(self.strategy.roster.new_keys())

    def _between_rounds(self) -> None:
        """Follow what the run was told to do. A run with all its rounds done still drops, evaluates and stops."""
        check_stop()
        self.operator.heed(self._greet)
        last = self.record.last
        if self.operator.evaluate_now and not self.record.has_evaluation(last):
            self._evaluate(last)
            self._add_row(last)
        self.operator.evaluate_now = False

    # ------------------------------------------------------------------ before the first round

    def _announce(self) -> None:
        config, here = self.config, self.here
        for note in filter(None, (*here.language_model.notes, here.data.questions.note, *self.notes)):
            emit(Note(note))
        if config.dtype != "float32" and config.update_rounding == "nearest":
            emit(Note(f"{config.dtype} weights: {_SIXTEEN_BIT}", warning=True))
        emit(Note(kernels_note(here.language_model.device, here.algorithm.family_of(config))))
        self.folder.write_json("partition.json", here.data.partition.as_json())
        self.strategy.summary()
        parameters = here.replica.layout.numel
        emit(
            RunStarted(
                config.algorithm,
                config.rounds,
                config.clients,
                config.invited_per_round,
                config.client_steps,
                parameters,
                base_size(here.replica.model),
                config.out,
            )
        )

    def _catch_up(self) -> bool:
        """Bring the files up to the ledger; returns whether the last round still has to be evaluated."""
        last = self.record.last
        pending = self._due(last) and not self.record.has_evaluation(last)
        self.record.catch_up(self.strategy.state, last - 1 if pending else last)
        for row in self.record.rows:
            emit(RoundFinished(int(row["round"]), row))
        return pending

    def _wait_for_clients(self) -> None:
        """Wait until enough nodes are connected, then learn who they are."""
        roster = self.strategy.roster
        deadline, wanted = time.monotonic() + self.config.wait_timeout, roster.wanted
        while (connected := len(list(self.grid.get_node_ids()))) < wanted:
            check_stop()
            if time.monotonic() > deadline:
                raise RunError(
                    f"{connected} of {wanted} nodes connected within {self.config.wait_timeout:g} s: "
                    "start more SuperNodes, or lower clients or min_clients."
                )
            time.sleep(POLL_SECONDS)
        self._newcomers = Newcomers(self.grid, self.strategy)
        asked, problems = self._newcomers.greet_all(self._patience(self.config.wait_timeout, enough=wanted))
        roster.check_enough(asked, problems)
        self.record.commit_keys(roster.new_keys())

    def _patience(self, timeout: float, enough: int) -> Patience:
        return Patience(timeout=timeout, grace=self.config.grace, enough=enough)

    # ------------------------------------------------------------------ a round

    def _round(self, number: int) -> bool:
        """One attempt at round `number`, and what follows from it; returns whether it had enough usable updates.

        Raises:
            FedtuneError: no round has moved the model so far, and every client failed for the same reason.
        """
        self._phases = Phases()
        self._train(number, self.record.attempts(number) + 1)
        tally = self.strategy.tally
        known = 1 if self.config.alone else len(self.strategy.clients)
        everybody = None if self.strategy.state.round else failed_alike(tally, known)
        if everybody or (tally.short and self.config.short_round == "repeat"):
            self.record.commit_attempt(number, tally, self._phases)
            if everybody:
                raise everybody  # the round was not run: once that is mended, a resume asks it again
            emit(Note(f"Round {number} had {len(tally.payloads)} usable updates and is asked again.", warning=True))
            return False
        self.record.commit(number, tally, self._phases, self.strategy.state)
        self._settle(number)
        return not tally.short

    def _train(self, number: int, attempt: int) -> None:
        strategy = self.strategy
        with self._phases.measure("prepare"):
            config = ConfigRecord({"attempt": attempt})
            instructions = strategy.configure_train(number, ArrayRecord(), config, self.grid)
        with self._phases.measure("clients"):
            enough = max(self.config.min_replies, -(-len(instructions) // 2))
            patience = self._patience(self.config.round_timeout, enough)
            take = partial(strategy.receive, number)
            exchange(self.grid, instructions, patience, take, one_by_one=strategy.sends_much)
            strategy.note_sent(instructions)
            del instructions  # which may be as large as the model
            more = strategy.configure_catch_up(number)
            exchange(self.grid, more, patience, take, one_by_one=strategy.sends_much)
            strategy.note_sent(more)
            strategy.tally.closed = patience.closed
        with self._phases.measure("aggregate"):
            strategy.aggregate_train(number, ())

    def _settle(self, number: int) -> None:
        """Publish the committed round, evaluate it if that is due, and write its line of metrics."""
        self.record.publish(number, self.strategy.state)
        if self._due(number):
            self._evaluate(number)
        emit(RoundFinished(number, self._add_row(number)))

    def _add_row(self, number: int) -> dict[str, object]:
        """Write the line of metrics of round `number`, and warn if it is the first that shows a run that diverges."""
        before = first_divergence(self.record.rows)
        row = self.record.add_row(number)
        found = first_divergence(self.record.rows)
        if found and not before:
            emit(Note(str(found), warning=True))
        return row

    def _due(self, number: int) -> bool:
        every = self.config.eval_every
        return number in (0, self.config.rounds) or (every > 0 and number % every == 0)

    def _evaluate(self, number: int) -> None:
        """Held-out loss and accuracy; generated text only for the base and the final model."""
        config, here = self.config, self.here
        self._phases = Phases()
        with self._phases.measure("rebuild"):
            here.replica.become(self.strategy.model, self.strategy.digest)
        with self._phases.measure("evaluate"):
            loss = evaluate_heldout(here.language_model, here.data, config.eval_batch_size)
        if number == 0:
            loss.check_base(here.language_model.source, config.dtype)
        text = None
        if config.generate_samples and number in (0, config.rounds):
            with self._phases.measure("generate"):
                text = generate(here.language_model, here.data.heldout, here.data.heldout_samples, config)
        self.record.evaluated(number, self.strategy.state, loss, text, self._phases)

    def _too_short(self) -> DivergedError:
        needed, tally = self.config.needed_replies, self.strategy.tally
        few = "No client returned a usable update" if needed == 1 else f"Fewer than {needed} clients returned a usable update"
        rounds = "rounds" if self.config.short_round == "skip" else "tries at a round"
        return DivergedError(
            f"{few} for {SHORT_ROUNDS} {rounds}. The last reasons: "
            + "; ".join(f"client {name}: {why}" for name, why in sorted(tally.refused.items()))
        )
