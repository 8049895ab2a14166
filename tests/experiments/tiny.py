"""A preset on the tiny model that a process of its own runs in seconds."""

from __future__ import annotations

from pathlib import Path


def preset(path: Path, model: Path, data: Path, **changes: object) -> Path:
    """Write the preset at `path`: FedKSeed, 4 rounds of 2 clients with 2 steps."""
    settings: dict[str, object] = {
        "algorithm": "fedkseed", "model": str(model), "data": str(data), "clients": 4, "clients_per_round": 2, "rounds": 4,
        "local_steps": 2, "K": 64, "lr": 1e-3, "max_length": 64, "template": "plain", "min_samples": 2, "threads": 1,
        "device": "cpu", "holdout": 0.2, "eval_samples": 8, **changes,
    }  # fmt: skip
    lines = [f"{key} = {str(value).lower() if isinstance(value, bool) else repr(value)}" for key, value in settings.items()]
    path.write_text("\n".join(["# Tiny", *lines, ""]))
    return path
