"""From a base model and a delta of kilobytes to the tuned model, bit by bit, after base and digest are verified."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from fedtune.config import RunConfig
from fedtune.delta import Delta
from fedtune.delta_reader import read
from fedtune.errors import DeltaMismatchError
from fedtune.export import Exported, write_folder
from fedtune.layout import Layout
from fedtune.models import LanguageModel, load_model
from fedtune.progress import Note, emit
from fedtune.replica import Replica
from fedtune.run_folder import check_new

_STORED = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # as safetensors names them


def apply_delta(base: str, path: Path, out: Path, revision: str = "", trust_remote_code: bool = False) -> Exported:
    """Rebuild the model of the delta `path` over `base` and write it to the new folder `out`, with the base's tokenizer.

    The weights are those of the run's replicas, bit by bit. Nothing is written before base and digest are verified.

    Args:
        base: folder, hub name or 'embedded'.
        revision, trust_remote_code: see the settings of these names.

    Raises:
        DeltaError: the file is damaged, or for another base model. ModelError: the base cannot be loaded.
        RunFolderError: `out` exists or cannot be written.
    """
    check_new(out)
    delta = read(path)
    emit(Note("rebuilding the model from base and coefficients"))
    settings = {"model": base, "revision": revision, "trust_remote_code": trust_remote_code, "dtype": delta.dtype}
    lm = load_model(RunConfig.from_mapping({**settings, "device": "cpu", "max_length": 8}))
    layout = Layout.of(lm.model, delta.block_rule)
    if layout.tensors != delta.tensors:
        raise DeltaMismatchError(
            f"'{base}' has parameters of other names or shapes than the base of the delta: give '{delta.base}'.", base=base
        )
    if layout.digest != delta.layout or layout.block_sizes != delta.block_sizes:
        raise DeltaMismatchError(
            f"This program divides '{base}' into other blocks than the one that wrote the delta: "
            f"install fedtune {delta.program}.",
            base=base,
        )
    replica = Replica(lm.model, layout, lm.folder)
    if replica.fingerprint != delta.fingerprint:
        raise DeltaMismatchError(
            f"'{base}' is not the base of the delta, its weights differ: {_other_weights(lm, delta)}.",
            expected=delta.fingerprint.hex(),
            got=replica.fingerprint.hex(),
        )
    replica.become(delta.coefficients, delta.digest)
    unchanged = all(pool.is_zero for pool in delta.pools)
    return Exported(out, delta.round, delta.digest.hex(), write_folder(lm, out), unchanged)


def _other_weights(lm: LanguageModel, delta: Delta) -> str:
    stored = _stored_dtypes(lm.folder)
    if stored and delta.dtype not in stored:
        return (
            f"its files are {' and '.join(sorted(stored))}, the run used {delta.dtype}; "
            f"give '{delta.base}' as it was before it was converted"
        )
    return f"give '{delta.base}' as it was when the run started, not a tuned or converted copy"


def _stored_dtypes(folder: Path | None) -> set[str]:
    """The types of the weights in the files of a model folder."""
    found = set[str]()
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        try:
            with safe_open(path, "numpy") as file:
                codes = {file.get_slice(name).get_dtype() for name in list(file.keys())}
        except (OSError, SafetensorError):
            continue
        found |= {_STORED.get(code, code) for code in codes}
    return found
