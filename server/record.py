"""What a run writes down: the ledger first, then the files that are made from it, which a resume makes again where they lag."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from fedtune.algorithms import ALGORITHMS, State
from fedtune.algorithms.base import shares
from fedtune.config import RunConfig
from fedtune.errors import RunFolderError
from fedtune.evaluation import Evaluation, Generation, Scores
from fedtune.ledger import Round, Used
from fedtune.peaks import peak_memory
from fedtune.pieces import Buffer
from fedtune.replay import snapshot_of, state_after, updates_kept
from fedtune.run_folder import BEST, COEFFICIENTS, CONFIG, SUMMARY
from fedtune.traffic import Traffic, as_lists, from_lists, merged, total
from server.opening import Opened, elapsed_of
from server.phases import Phases
from server.strategy import Tally

BYTES_PER_WEIGHT = 4  # FedAvg on float32 weights, for comparison
_DIGEST_AT = slice(40, 56)  # of the model, in coefficients.bin (docs/wire.md)
_SCORES = (
    *("eval_loss", "eval_loss_sample_mean", "perplexity", "accuracy", "questions", "categories"),
    *("rouge_l", "rouge_l_papers", "exact_match"),
)


class Record:
    """The ledger and the folder of one run, and the rows of metrics.jsonl as they stand."""

    def __init__(self, opened: Opened) -> None:
        self.config: RunConfig = opened.config
        self.folder, self.ledger, self.rules = opened.folder, opened.ledger, opened.rules
        self.rows: list[dict[str, Any]] = []
        self._before, self._began = elapsed_of(self.ledger), time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds of the run so far, in all its processes."""
        return round(self._before + time.monotonic() - self._began, 3)

    @property
    def last(self) -> int:
        """The last round that is committed."""
        return self.ledger.last

    def attempts(self, number: int) -> int:
        """How often round `number` was asked and came out short."""
        return sum(1 for _ in self.ledger.events("attempt", after=number - 1))

    def dropped(self) -> set[str]:
        """Clients that take no part any more."""
        return {str(event.detail["client"]) for event in self.ledger.events("drop")}

    def keys(self) -> dict[str, str]:
        """The key that each client id belongs to (`server.roster`)."""
        return {str(client): str(key) for event in self.ledger.events("keys") for client, key in event.detail["keys"].items()}

    # ------------------------------------------------------------------ the ledger

    def commit_keys(self, keys: Mapping[str, str]) -> None:
        """Write down to which keys client ids belong from now on; nothing if there is none."""
        if keys:
            self.ledger.commit_event("keys", {"keys": dict(keys)}, self.elapsed)

    def commit(self, number: int, tally: Tally, phases: Phases, state: State) -> None:
        """Write round `number` and the state that it led to; until this returns nothing may use them."""
        row = Round(
            number=number,
            attempt=self.attempts(number) + 1,
            clients=tuple(tally.clients),
            refused=dict(tally.refused),
            train_loss=finite(tally.train_loss),
            traffic=self._with_attempts(number, tally),
            seconds=_rounded(phases.wall),
            cpu_seconds=_rounded(phases.cpu),
            elapsed=self.elapsed,
            state=self.rules.digest(state),
        )
        weights = shares(tally.updates, self.config)
        used = [Used(client, weights[client], self.ledger.stored(tally.payloads[client])) for client in tally.updates]
        pools = [self.ledger.stored(pool) for pool in self.rules.closed(state, self.ledger.pool_count)]
        snapshot = snapshot_of(state, number, self.ledger.store)
        self.ledger.commit_round(row, used, pools, snapshot, keep_updates=self.config.keep_updates)

    def commit_attempt(self, number: int, tally: Tally, phases: Phases) -> None:
        """Write down that round `number` came out short and is asked again."""
        detail = {"round": number, "clients": tally.clients, "refused": tally.refused, "seconds": _rounded(phases.wall)}
        self.ledger.commit_event("attempt", {**detail, "traffic": as_lists(tally.traffic)}, self.elapsed)

    def _with_attempts(self, number: int, tally: Tally) -> dict[str, Traffic]:
        """The bytes and messages of a round by client, those of its short attempts included."""
        traffic = dict(tally.traffic)
        for event in self.ledger.events("attempt", after=number - 1):
            traffic = merged(traffic, from_lists(event.detail["traffic"]))
        return traffic

    # ------------------------------------------------------------------ what is made from it

    def publish(self, number: int, state: State) -> None:
        """Write coefficients.bin: the model after the committed round `number`."""
        self.folder.write_parts(COEFFICIENTS, self.rules.encoded(state, number))

    def evaluated(self, number: int, state: State, loss: Evaluation, text: Generation | None, phases: Phases) -> None:
        """Write what was measured after round `number`: texts and best model first, so that they are never missing."""
        detail: dict[str, Any] = {
            "round": number,
            "eval_loss": finite(loss.loss),
            "eval_loss_sample_mean": finite(loss.loss_sample_mean),
            "perplexity": finite(loss.perplexity),
            "accuracy": finite(loss.accuracy),
            "questions": loss.questions,
            "categories": {name: _category(scores) for name, scores in loss.categories.items()},
            "rouge_l": text.rouge_l if text else None,
            "rouge_l_papers": text.rouge_l_papers if text else None,
            "exact_match": text.exact_match if text else None,
            "seconds": _rounded(phases.wall),
            "cpu_seconds": _rounded(phases.cpu),
        }
        if all(loss.loss < number_of(other["eval_loss"]) for other in self.rows if other["round"] != number):
            self.folder.write_parts(BEST, self.rules.encoded(state, number))
        if text:
            self.folder.write_json(f"generated_round_{number}.json", asdict(text))
        self.ledger.commit_event("evaluation", detail, self.elapsed)

    def add_row(self, number: int) -> dict[str, Any]:
        """The row of round `number` for metrics.jsonl; appended to it, or put in place of the one that is there."""
        row = _row(self.ledger.round(number), self._evaluations(number).get(number))
        if number == len(self.rows):
            self.rows.append(row)
            self.folder.append_metrics(row)
        else:
            self.rows[number] = row
            self.folder.write_metrics(self.rows)
        return row

    def has_evaluation(self, number: int) -> bool:
        """Whether the model after round `number` was evaluated."""
        return bool(self._evaluations(number))

    def _evaluations(self, number: int = -1) -> dict[int, Mapping[str, Any]]:
        """By round: all of them, or that of one round."""
        return {event.round: event.detail for event in self.ledger.events("evaluation", after=number)}

    # ------------------------------------------------------------------ after a resume

    def catch_up(self, state: State, done: int) -> None:
        """Make the files of the folder what they should be after the rows 0 .. `done`, from the ledger."""
        evaluations = self._evaluations()
        self.rows = [_row(row, evaluations.get(row.number)) for row in self.ledger.rounds() if row.number <= done]
        self.folder.sweep()
        for name in (SUMMARY, "error.json"):
            self.folder.discard(name)
        settings = {"asked": dict(self.ledger.header.asked), "used": self.config.as_mapping()}
        if self.folder.read_json(CONFIG) != settings:
            self.folder.write_json(CONFIG, settings)
        if self._metrics() != self.rows:
            self.folder.write_metrics(self.rows)
        if done == self.last:
            self.publish(done, state)
        if self.rows:
            self._catch_up_best()

    def _metrics(self) -> list[dict[str, Any]]:
        try:
            return self.folder.read_metrics()
        except RunFolderError:
            return []

    def _catch_up_best(self) -> None:
        """Write best_coefficients.bin again, by replay, if it is not the model with the lowest loss.

        Where updates were not kept it cannot be made again: another model has no business under its name and is removed. The
        evaluation that a process died in writes it anew.
        """
        best = int(min(self.rows, key=lambda row: number_of(row["eval_loss"]))["round"])
        stored: Buffer = b""
        with contextlib.suppress(RunFolderError):
            stored = self.folder.mapped(BEST)
        if bytes(stored[_DIGEST_AT]) == self.ledger.round(best).state:
            return
        if best != self.last and not updates_kept(self.ledger):
            self.folder.discard(BEST)
        else:
            self.folder.write_parts(BEST, self.rules.encoded(state_after(self.ledger, self.rules, best), best))

    # ------------------------------------------------------------------ the end

    def finish(self, parameters: int, base: int) -> dict[str, Any]:
        """Write summary.json; returns it. `parameters` are those that are tuned, `base` those of the base model."""
        summary = summarise(self.config, self.rows, parameters, base, self.elapsed)
        self.folder.write_json(SUMMARY, summary)
        return summary


def _row(round: Round, evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    scores, traffic = evaluation or {}, round.total
    return {
        "round": round.number,
        "clients": list(round.clients),
        "refused": dict(round.refused),
        **{name: scores.get(name) for name in _SCORES},
        "train_loss": round.train_loss,
        "bytes_up": traffic.payload_up,
        "bytes_down": traffic.payload_down,
        "serialised_up": traffic.serialised_up,
        "serialised_down": traffic.serialised_down,
        "messages_up": traffic.messages_up,
        "messages_down": traffic.messages_down,
        "traffic": as_lists(round.traffic),
        "seconds": {**round.seconds, **scores.get("seconds", {})},
        "cpu_seconds": {**round.cpu_seconds, **scores.get("cpu_seconds", {})},
        "digest": round.state.hex(),
    }


def summarise(
    config: RunConfig, rows: Sequence[Mapping[str, Any]], parameters: int, base: int, seconds: float
) -> dict[str, Any]:
    """summary.json: before and after, what it cost beside FedAvg, and where it is."""
    best = min(rows, key=lambda row: number_of(row["eval_loss"]))
    sent = total(traffic for row in rows for traffic in from_lists(row["traffic"]).values())
    return {
        "algorithm": config.algorithm,
        "family": ALGORITHMS[config.algorithm].family_of(config),
        "seed": config.seed,
        "rounds": config.rounds,
        "clients": config.clients,
        "clients_per_round": config.invited_per_round,
        "parameters": parameters,
        "initial_loss": rows[0]["eval_loss"],
        "final_loss": rows[-1]["eval_loss"],
        "best_loss": best["eval_loss"],
        "best_round": best["round"],
        "initial_loss_sample_mean": rows[0]["eval_loss_sample_mean"],
        "final_loss_sample_mean": rows[-1]["eval_loss_sample_mean"],
        "initial_accuracy": rows[0]["accuracy"],
        "final_accuracy": rows[-1]["accuracy"],
        "questions": rows[0]["questions"],
        "categories": _before_and_after(rows[0]["categories"] or {}, rows[-1]["categories"] or {}),
        "initial_rouge_l": rows[0]["rouge_l"],
        "final_rouge_l": rows[-1]["rouge_l"],
        "initial_exact_match": rows[0]["exact_match"],
        "final_exact_match": rows[-1]["exact_match"],
        "payload_bytes_up": sent.payload_up,
        "payload_bytes_down": sent.payload_down,
        "payload_bytes_up_per_client_round": _each(sent.payload_up, sent.messages_up),
        "payload_bytes_down_per_client_round": _each(sent.payload_down, sent.messages_down),
        "serialised_bytes_up": sent.serialised_up,
        "serialised_bytes_down": sent.serialised_down,
        "serialised_bytes_up_per_client_round": _each(sent.serialised_up, sent.messages_up),
        "serialised_bytes_down_per_client_round": _each(sent.serialised_down, sent.messages_down),
        "fedavg_bytes": 2 * BYTES_PER_WEIGHT * base * sent.messages_down,
        "rounds_used": sum(len(row["clients"]) > len(row["refused"]) for row in rows[1:]),
        "updates_used": sum(len(row["clients"]) - len(row["refused"]) for row in rows),
        "updates_refused": sum(len(row["refused"]) for row in rows),
        "seconds": seconds,
        "cpu_seconds": round(sum(sum(row["cpu_seconds"].values()) for row in rows), 3),
        "peak_memory_bytes": peak_memory(),
        "digest": rows[-1]["digest"],
        "out": config.out,
    }


def _category(scores: Scores) -> dict[str, Any]:
    """The scores of one category in a line of metrics.jsonl."""
    return {"samples": scores.samples, "eval_loss": finite(scores.loss), "accuracy": finite(scores.accuracy)}


def _before_and_after(first: Mapping[str, Any], last: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The scores of each category in summary.json."""
    return {
        name: {
            "samples": found["samples"],
            **{
                f"initial_{key}": first.get(name, {}).get(long)
                for key, long in (("loss", "eval_loss"), ("accuracy", "accuracy"))
            },
            **{f"final_{key}": found[long] for key, long in (("loss", "eval_loss"), ("accuracy", "accuracy"))},
        }
        for name, found in last.items()
    }


def finite(value: float | None) -> float | None:
    """JSON has no NaN: what is not a number is null."""
    return value if value is not None and math.isfinite(value) else None


def number_of(value: object) -> float:
    """A loss to compare: one that was not measured, or not finite, is the worst."""
    return float(value) if isinstance(value, int | float) else math.inf


def _rounded(phases: Mapping[str, float]) -> dict[str, float]:
    return {name: round(seconds, 4) for name, seconds in phases.items()}


def _each(bytes_sent: int, messages: int) -> float:
    return round(bytes_sent / messages, 1) if messages else 0.0
