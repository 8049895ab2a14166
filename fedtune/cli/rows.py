"""A row of metrics.jsonl as typed numbers, for the live table and the log lines."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self


@dataclass(frozen=True)
class RoundRow:
    """One round. Round 0 is the base model: it has no clients and moves no bytes.

    Attributes:
        clients: updates used; `refused` were not.
        train_loss, eval_loss, accuracy, rouge_l: None where the round did not measure them (or the number was not finite).
        bytes_up, bytes_down: payload of the round; `messages_up`, `messages_down` are the messages that carried it.
        seconds: all phases together.
    """

    round: int
    clients: int
    refused: int
    train_loss: float | None
    eval_loss: float | None
    accuracy: float | None
    rouge_l: float | None
    bytes_up: int
    bytes_down: int
    messages_up: int
    messages_down: int
    seconds: float

    @classmethod
    def of(cls, metrics: Mapping[str, object]) -> Self:
        """Read a row; what is missing counts as none or nothing."""
        asked, refused, phases = metrics.get("clients"), metrics.get("refused"), metrics.get("seconds")
        count_refused = len(refused) if isinstance(refused, Mapping) else 0
        return cls(
            round=whole(metrics, "round"),
            clients=max(0, (len(asked) if isinstance(asked, list | tuple) else 0) - count_refused),
            refused=count_refused,
            train_loss=real(metrics, "train_loss"),
            eval_loss=real(metrics, "eval_loss"),
            accuracy=real(metrics, "accuracy"),
            rouge_l=real(metrics, "rouge_l"),
            bytes_up=whole(metrics, "bytes_up"),
            bytes_down=whole(metrics, "bytes_down"),
            messages_up=whole(metrics, "messages_up"),
            messages_down=whole(metrics, "messages_down"),
            seconds=sum(real(phases, name) or 0.0 for name in phases) if isinstance(phases, Mapping) else 0.0,
        )

    @property
    def up_per_client(self) -> float:
        """Payload bytes of one client's answer."""
        return self.bytes_up / max(1, self.messages_up)

    @property
    def down_per_client(self) -> float:
        """Payload bytes of one instruction."""
        return self.bytes_down / max(1, self.messages_down)


def real(values: Mapping[str, object], key: str) -> float | None:
    """`values[key]` as a number, None if there is none."""
    value = values.get(key)
    return float(value) if isinstance(value, int | float) else None


def whole(values: Mapping[str, object], key: str) -> int:
    """`values[key]` as a whole number, 0 if there is none."""
    value = values.get(key)
    return value if isinstance(value, int) else 0
