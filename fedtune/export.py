"""From a run folder to an ordinary Hugging Face folder: base model plus coefficients, written with save_pretrained."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from fedtune import wire
from fedtune.algorithms.base import pool_number
from fedtune.coefficients import Coefficients
from fedtune.directions.base import Pool
from fedtune.errors import MalformedMessageError, ModelError, RunFolderError
from fedtune.models import LanguageModel
from fedtune.resident import Resident
from fedtune.run_folder import COEFFICIENTS, RunFolder, check_new

FINAL, BEST = COEFFICIENTS, "best_coefficients.bin"


@dataclass(frozen=True)
class Exported:
    """What was written: the folder, the state's round and digest, and the bytes of weights and tokenizer."""

    folder: Path
    round: int
    digest: str
    bytes: int


def load_tuned(run: RunFolder, name: str = FINAL, model: str = "") -> tuple[LanguageModel, int, bytes]:
    """The tuned model of a run in memory (on the CPU), with the round and the digest of its state.

    Args:
        name: which coefficients, FINAL or BEST (of the lowest held-out loss).
        model: where the base model is now, if not where it was ("").

    Raises:
        RunFolderError: the folder has no coefficients, or damaged ones.
        ModelError: the base model is not the one that the run started from.
    """
    config = run.config().replace(device="cpu")
    config = config.replace(model=model) if model else config
    data = run.read_bytes(name)
    here = Resident(config)
    replica, algorithm = here.replica, here.algorithm

    def pool_at(number: int) -> Pool:
        return algorithm.pool(config, replica.layout, number)

    most = pool_number(config, config.rounds) + 1
    try:
        complete = wire.decode_instruction(data, pool_at, most, replica.layout.blocks, config.coefficient_bits)
    except MalformedMessageError as error:
        raise RunFolderError(f"'{run.path / name}' is damaged ({error}) Restore it from a copy.", name=name) from None
    if complete.fingerprint != replica.fingerprint:
        raise ModelError(
            f"The base model '{config.model}' is not the one that the run started from: give the same files and dtype.",
            expected=complete.fingerprint.hex(),
            got=replica.fingerprint.hex(),
        )
    replica.become(Coefficients(complete.pools), complete.digest)
    return here.language_model, complete.round - 1, complete.digest


def export_run(run: RunFolder, out: Path, name: str = FINAL, model: str = "") -> Exported:
    """Write the tuned model of `run` to the new folder `out`, loadable with AutoModelForCausalLM.from_pretrained.

    Raises:
        RunFolderError: `out` exists or cannot be written, or see `load_tuned`. ModelError: see `load_tuned`.
    """
    check_new(out)
    lm, round, digest = load_tuned(run, name, model)
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _save(lm, partial)
        partial.rename(out)
    except OSError as error:
        raise RunFolderError(
            f"'{out}' could not be written: {error.strerror or error}. Free some space or give a folder elsewhere with --out."
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return Exported(out, round, digest.hex(), sum(path.stat().st_size for path in out.rglob("*") if path.is_file()))


def _save(lm: LanguageModel, folder: Path) -> None:
    model: Any = lm.model
    model.config.use_cache = True  # switched off for training
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
