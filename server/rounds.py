"""The round loop: wait for clients, ask, collect, move the state, evaluate, write down. Its state is in the strategy.

A round's files are written before the next round starts, so a process that dies leaves a folder that says exactly how
far the run came.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid

from fedtune import wire
from fedtune.config import RunConfig
from fedtune.directions.choice import kernels_note
from fedtune.errors import DivergedError, RunError
from fedtune.evaluation import Evaluation, Generation, evaluate, generate
from fedtune.progress import Note, RoundFinished, RunFinished, RunStarted, check_stop, emit
from fedtune.resident import Resident, resident
from fedtune.run_folder import RunFolder
from server.strategy import CoefficientStrategy, is_behind

POLL_SECONDS = 0.1
EMPTY_ROUNDS = 3  # so many rounds in a row without a usable update end the run
_SIXTEEN_BIT = (
    "a local step smaller than half the spacing of a weight is lost on the client, so what it trains and what is rebuilt "
    "from its numbers differ; the global model is summed in float32 all the same (docs/methods.md has figures; "
    "update_rounding = stochastic or master keeps such steps)"
)
BYTES_PER_WEIGHT = 4  # FedAvg on float32 weights, for comparison


class Run:
    """One run on a grid of clients.

    Args:
        grid: Flower's, or the one in this process.
        config: as used.
        folder: a new run folder.
    """

    def __init__(self, grid: Grid, config: RunConfig, folder: RunFolder) -> None:
        self.grid, self.config, self.folder = grid, config, folder
        self.here: Resident = resident(config)
        replica = self.here.replica
        self.strategy = CoefficientStrategy(config, self.here.algorithm, replica.layout, replica.fingerprint)
        self.rows: list[dict[str, object]] = []
        self._phases: dict[str, float] = {}
        self._started = time.monotonic()

    def execute(self) -> dict[str, object]:
        """All rounds; returns the summary, which is also written to the folder.

        Raises:
            FedtuneError: a typed reason, with everything up to the last finished round kept.
        """
        self._announce()
        self._wait_for_clients()
        self._write_round(0, *self._evaluate(0))
        empty = 0
        for number in range(1, self.config.rounds + 1):
            check_stop()
            self._phases = {}
            self._train(number)
            empty = 0 if len(self.strategy.tally.refused) < len(self.strategy.tally.clients) else empty + 1
            self._write_round(number, *self._evaluate(number))
            if empty == EMPTY_ROUNDS:
                raise DivergedError(
                    f"No client returned a usable update for {EMPTY_ROUNDS} rounds. The last reasons: "
                    + "; ".join(f"client {name}: {why}" for name, why in sorted(self.strategy.tally.refused.items()))
                )
        return self._finish()

    # ------------------------------------------------------------------ before the first round

    def _announce(self) -> None:
        config, here = self.config, self.here
        for note in here.language_model.notes:
            emit(Note(note))
        if config.dtype != "float32" and config.update_rounding == "nearest":
            emit(Note(f"{config.dtype} weights: {_SIXTEEN_BIT}", warning=True))
        emit(Note(kernels_note(here.language_model.device, config.family)))
        self.folder.write_json("partition.json", here.data.partition.as_json())
        self.strategy.summary()
        parameters = here.replica.layout.numel
        emit(
            RunStarted(
                config.algorithm,
                config.rounds,
                config.clients,
                config.asked_per_round,
                config.local_steps,
                parameters,
                config.out,
            )
        )

    def _wait_for_clients(self) -> None:
        """Wait until `clients` nodes are connected, then learn who they are."""
        deadline = time.monotonic() + self.config.wait_timeout
        while (connected := len(list(self.grid.get_node_ids()))) < self.config.clients:
            check_stop()
            if time.monotonic() > deadline:
                raise RunError(
                    f"{connected} of {self.config.clients} nodes connected within {self.config.wait_timeout:g} s: "
                    "start more SuperNodes, or lower clients."
                )
            time.sleep(POLL_SECONDS)
        questions = self.strategy.configure_introduction(self.grid)
        answers = self._exchange(questions, self.config.wait_timeout)
        self.strategy.accept_introductions(questions, answers)

    # ------------------------------------------------------------------ a round

    def _train(self, number: int) -> None:
        strategy = self.strategy
        with self._phase("prepare"):
            instructions = strategy.configure_train(number, ArrayRecord(), ConfigRecord(), self.grid)
        with self._phase("clients"):
            replies = self._exchange(instructions, self.config.round_timeout)
            strategy.note_sent(instructions)
            more = strategy.configure_catch_up(number, replies)
            if more:
                replies = [reply for reply in replies if not is_behind(reply)]
                replies += self._exchange(more, self.config.round_timeout)
                strategy.note_sent(more)
        with self._phase("aggregate"):
            strategy.aggregate_train(number, replies)

    def _exchange(self, messages: Sequence[Message], timeout: float) -> list[Message]:
        """Send messages and collect the answers that come in time."""
        if not messages:
            return []
        deadline = time.monotonic() + timeout
        waiting = set(self.grid.push_messages(messages))
        replies: list[Message] = []
        while waiting:
            arrived = list(self.grid.pull_messages(list(waiting)))
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            check_stop()
            if not waiting or time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS)
        return replies

    def _evaluate(self, number: int) -> tuple[Evaluation | None, Generation | None]:
        """Held-out loss when it is due; generated text only for the base and the final model."""
        config, here = self.config, self.here
        ends = number in (0, config.rounds)
        due = ends or (config.eval_every > 0 and number % config.eval_every == 0)
        if not due:
            return None, None
        with self._phase("rebuild"):
            here.replica.become(self.strategy.model, self.strategy.digest)
        with self._phase("evaluate"):
            loss = evaluate(here.language_model, here.data.heldout, config.eval_batch_size)
        if not loss.finite:
            emit(Note(f"The held-out loss after round {number} is not finite: lower lr or server_lr.", warning=True))
        if not (ends and config.generate_samples):
            return loss, None
        with self._phase("generate"):
            count = config.generate_samples
            text = generate(here.language_model, here.data.heldout[:count], here.data.heldout_samples[:count], config)
        return loss, text

    # ------------------------------------------------------------------ what is written

    def _write_round(self, number: int, loss: Evaluation | None, text: Generation | None) -> None:
        tally = self.strategy.tally
        row: dict[str, object] = {
            "round": number,
            "clients": tally.clients,
            "refused": tally.refused,
            "eval_loss": _finite(loss.loss) if loss else None,
            "eval_loss_sample_mean": _finite(loss.loss_sample_mean) if loss else None,
            "perplexity": _finite(loss.perplexity) if loss else None,
            "rouge_l": text.rouge_l if text else None,
            "rouge_l_papers": text.rouge_l_papers if text else None,
            "exact_match": text.exact_match if text else None,
            "train_loss": _finite(tally.train_loss),
            "bytes_up": tally.bytes_up,
            "bytes_down": tally.bytes_down,
            "messages_up": tally.messages_up,
            "messages_down": tally.messages_down,
            "seconds": {name: round(seconds, 4) for name, seconds in self._phases.items()},
            "digest": self.strategy.digest.hex(),
        }
        encoded = self._encoded_model(number)
        self.folder.write_bytes("coefficients.bin", encoded)
        if loss and all(loss.loss < _number(other["eval_loss"]) for other in self.rows):
            self.folder.write_bytes("best_coefficients.bin", encoded)
        if text:
            self.folder.write_json(f"generated_round_{number}.json", asdict(text))
        self.folder.append_metrics(row)
        self.rows.append(row)
        emit(RoundFinished(number, row))

    def _encoded_model(self, number: int) -> bytes:
        """The model after round `number` as a complete instruction: what a client that joins now would get."""
        strategy = self.strategy
        complete = wire.Instruction(
            round=number + 1,
            fingerprint=strategy.fingerprint,
            layout=strategy.layout.digest,
            digest=strategy.digest,
            held=0,
            pools=strategy.model.pools,
            draw_weights=self.here.algorithm.draw_weights(strategy.state),
        )
        return wire.encode_instruction(complete, self.config.coefficient_bits)

    def _finish(self) -> dict[str, object]:
        config, rows = self.config, self.rows
        best = min(rows, key=lambda row: _number(row["eval_loss"]))
        up, down = _sum(rows, "bytes_up"), _sum(rows, "bytes_down")
        messages_up, messages_down = _sum(rows, "messages_up"), _sum(rows, "messages_down")
        parameters = self.here.replica.layout.numel
        summary: dict[str, object] = {
            "algorithm": config.algorithm,
            "family": config.family,
            "seed": config.seed,
            "rounds": config.rounds,
            "clients": config.clients,
            "clients_per_round": config.asked_per_round,
            "parameters": parameters,
            "initial_loss": rows[0]["eval_loss"],
            "final_loss": rows[-1]["eval_loss"],
            "best_loss": best["eval_loss"],
            "best_round": best["round"],
            "initial_loss_sample_mean": rows[0]["eval_loss_sample_mean"],
            "final_loss_sample_mean": rows[-1]["eval_loss_sample_mean"],
            "initial_rouge_l": rows[0]["rouge_l"],
            "final_rouge_l": rows[-1]["rouge_l"],
            "initial_exact_match": rows[0]["exact_match"],
            "final_exact_match": rows[-1]["exact_match"],
            "payload_bytes_up": up,
            "payload_bytes_down": down,
            "payload_bytes_up_per_client_round": round(up / messages_up, 1) if messages_up else 0.0,
            "payload_bytes_down_per_client_round": round(down / messages_down, 1) if messages_down else 0.0,
            "fedavg_bytes": 2 * BYTES_PER_WEIGHT * parameters * messages_down,
            "updates_refused": sum(len(row["refused"]) for row in rows if isinstance(row["refused"], dict)),
            "seconds": round(time.monotonic() - self._started, 3),
            "digest": rows[-1]["digest"],
            "out": config.out,
        }
        self.folder.write_json("summary.json", summary)
        emit(RunFinished(summary))
        return summary

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        begun = time.monotonic()
        yield
        self._phases[name] = self._phases.get(name, 0.0) + time.monotonic() - begun


def _finite(value: float) -> float | None:
    """JSON has no NaN: what is not a number is null."""
    return value if math.isfinite(value) else None


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else math.inf


def _sum(rows: Sequence[dict[str, object]], key: str) -> int:
    return sum(value for row in rows if isinstance(value := row[key], int))
