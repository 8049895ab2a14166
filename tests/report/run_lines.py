"""Lines of metrics.jsonl for the tests of reports, whole and otherwise."""

from __future__ import annotations

import json
from typing import Any

from fedtune.run_folder import RunFolder


def line(number: int, *, clients: tuple[str, ...] = ("0", "1"), loss: float | None = None, **more: Any) -> dict[str, Any]:
    """A line of metrics.jsonl; the loss falls from 2 unless it is given."""
    trained = number > 0
    return {
        "round": number,
        "clients": list(clients) if trained else [],
        "refused": {},
        "eval_loss": 2.0 / (1 + number) if loss is None else loss,
        "train_loss": 1.8 / number if trained else None,
        "rouge_l": 0.1 * number,
        "exact_match": None,
        "bytes_up": 2000 * trained,
        "bytes_down": 5000 * trained,
        "messages_up": 2 * trained,
        "messages_down": 2 * trained,
        "seconds": {"clients": 1.5, "evaluate": 0.25} if trained else {"evaluate": 0.25},
        "digest": f"{number:032x}",
        **more,
    }


def write_lines(folder: RunFolder, lines: list[Any]) -> None:
    """metrics.jsonl with these lines, whatever they are; a text is written as it is."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in lines]
    (folder.path / "metrics.jsonl").write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
