"""What a stored run may decide about the model and data of this one, and what only whoever gives the command may.

Anybody may have made a run folder. So `trust_remote_code` is never taken from one, and nothing is fetched from the hub because
a folder names it: a model that is named here again may be, one that is in the hub's cache is read from there, a folder on
this machine is read without running any code. What is taken from a stored run is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from fedtune.config import RunConfig, Scalar
from fedtune.embedded import SHIPPED, shipped_path
from fedtune.errors import ConfigError, DataError, ModelError
from fedtune.foreign import for_screen
from fedtune.progress import Note, emit
from fedtune.source_names import expand, split_source

Ways = Mapping[str, str]
"""How a command is told a setting: by its name, the words with {} for the value."""

RESUME: Ways = {key: f"--set {key}={{}}" for key in ("model", "data", "holdout_file", "trust_remote_code")}
EXPORT: Ways = {"model": "--model {}", "trust_remote_code": "--trust-remote-code"}
COMPARE: Ways = {"model": "fedtune export RUN --format delta --model {} (and compare that file)"}


def said_now(stored: RunConfig, given: Mapping[str, Scalar]) -> RunConfig:
    """The settings of a stored run with what is `given` now, to resume it: what only the folder says does not count.

    Raises:
        ModelError, DataError: the hub would have to be asked for what only the stored run names.
    """
    named = dict(given)
    if "model" in named:
        named.setdefault("revision", "")  # of another model, or none
    else:
        named["model"] = base_of(stored, RESUME)
    for key in ("data", "holdout_file"):
        source = str(getattr(stored, key))
        if key not in named and split_source(source)[0] == "hub":
            raise DataError(
                f"The run reads '{for_screen(source)}' from the hub, and nothing is fetched because a folder names it: "
                f"say it again with {_said(RESUME, key, source)} if you trust it.",
                source=source,
            )
    if stored.trust_remote_code and "trust_remote_code" not in named:
        allow = RESUME["trust_remote_code"].format("true")
        emit(Note(f"The run ran code of its model; this one does not, unless you give {allow}."))
    return stored.replace(**{"trust_remote_code": False, **named})


def base_of(stored: RunConfig, ways: Ways, *, weights: bool = True) -> str:
    """What to load as the base model of a stored run that names it alone; said as a note.

    Args:
        ways: see `Ways`.
        weights: whether they are needed; else config.json is enough.

    Raises:
        ModelError: it is neither a folder of this machine, nor embedded, nor in the hub's cache.
    """
    name = stored.model
    if name == "embedded":
        return name
    found = _on_this_machine(stored, weights)
    if found is None:
        raise ModelError(
            f"The run's base model is '{for_screen(name)}', which is no folder here and not in the hub's cache, and nothing is "
            f"fetched because a folder names it: say where it is, or say its name again, with {_said(ways, 'model', name)}.",
            model=name,
        )
    emit(Note(f"The base model is '{for_screen(found)}', as the run folder says."))
    return found


def _on_this_machine(stored: RunConfig, weights: bool) -> str | None:
    """The model as the run names it, if that is a folder or ships with fedtune; where the hub's cache has it; or None."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if Path(expand(stored.model)).is_dir():
            return stored.model
        if not weights and shipped_path(f"{SHIPPED}/{stored.model}/config.json"):
            return stored.model
        cached = try_to_load_from_cache(stored.model, "config.json", revision=stored.revision or None)
    except (ConfigError, HFValidationError, OSError, ValueError):
        return None
    folder = Path(cached).parent if isinstance(cached, str) else None
    return str(folder) if folder and (not weights or any(folder.glob("*.safetensors"))) else None


@contextmanager
def own_code_explained(stored: RunConfig, now: RunConfig, ways: Ways) -> Iterator[None]:
    """Where the model needs code that a stored run had run, and that may not run now: say how to allow it."""
    try:
        yield
    except ModelError as error:
        if now.trust_remote_code or not stored.trust_remote_code or "trust_remote_code" not in ways:
            raise
        raise ModelError(
            f"{error} The run ran code of its model (trust_remote_code = true), which is never taken from a folder: give "
            f"{_said(ways, 'trust_remote_code', 'true')} if you trust that code.",
            **error.facts,
        ) from None


def _said(ways: Ways, key: str, value: str) -> str:
    return ways[key].format(for_screen(value))
