"""`fedtune loss`: the held-out loss of a model as a run would measure it, to the last digit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtune.cli import presets
from fedtune.cli.presets import PresetArgument, SetOption
from fedtune.cli.screen import Screen, print_json
from fedtune.errors import ModelError
from fedtune.foreign import for_screen
from fedtune.numbers import in_loss

if TYPE_CHECKING:
    from fedtune.evaluation import Evaluation


def loss(
    preset: PresetArgument,
    settings: SetOption = [],  # noqa: B006 (typer reads the default and never changes it)
    model: Annotated[
        str, typer.Option("--model", metavar="MODEL", help="Instead of the preset's: a folder or hub name.", show_default=False)
    ] = "",
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead.")] = False,
) -> None:
    """Measure a model on the held-out samples of a preset, in nats per token, by category, with the accuracy where the
    preset has choices; nothing is trained or written.

    Exits with 1 if the loss is not finite.

    [bold]fedtune loss demo_fedkseed[/bold]   the base model, as after round 0 of the run

    [bold]fedtune loss demo_fedkseed --model tuned[/bold]   what export or apply wrote: the run's last loss, digit by digit
    """
    config = presets.choose(preset, settings, {"model": model} if model else None).config
    if model:  # a preset trusts its own model, and no other
        said = "trust_remote_code" in dict(presets.parse_setting(text) for text in settings)
        config = config.replace(revision="", trust_remote_code=config.trust_remote_code and said)
    if trust_remote_code:
        config = config.replace(trust_remote_code=True)
    from fedtune.coefficients import Coefficients
    from fedtune.evaluation import evaluate_heldout
    from fedtune.resident import renewed

    here = renewed(config)
    here.load()
    here.replica.become(Coefficients(()))  # what ran in this process before may have left another model
    found = evaluate_heldout(here.language_model, here.data, config.eval_batch_size)
    fingerprint = here.replica.fingerprint.hex()
    if as_json:
        print_json({**_without_nan(asdict(found)), "fingerprint": fingerprint})
    else:
        _print(found, fingerprint)
    if not found.finite:
        raise ModelError(
            f"The held-out loss of '{here.language_model.source}' is not finite, for {found.lost:,} of {found.samples:,} "
            "samples: the model has diverged, or overflows in this dtype (try --set dtype=float32).",
            lost=found.lost,
        )


def _print(found: Evaluation, fingerprint: str) -> None:
    lines = [
        ("held-out loss", repr(found.loss)),
        ("mean over samples", repr(found.loss_sample_mean)),
        ("samples, tokens", f"{found.samples:,}, {found.tokens:,}"),
        ("fingerprint", fingerprint),
    ]
    if found.accuracy is not None:
        lines.insert(2, ("accuracy", f"{in_loss(found.accuracy)}, of {found.questions:,} questions"))
    for name, scores in found.categories.items():
        accuracy = f", accuracy {in_loss(scores.accuracy)}" if scores.accuracy is not None else ""
        lines.append((f"  {name or '(none)'}", f"{in_loss(scores.loss)}{accuracy}, of {scores.samples:,} samples"))
    for name, value in lines:
        Screen().say(f"{for_screen(name, 40):<18}{value}")


def _without_nan(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN: what is not a number is null, in the categories too."""
    return {
        name: _without_nan(value) if isinstance(value, Mapping) else _finite(value) if isinstance(value, float) else value
        for name, value in values.items()
    }


def _finite(value: float) -> float | None:
    """`value`, or None if it is not finite."""
    return value if math.isfinite(value) else None
