"""From a run folder to a tuned model: an ordinary Hugging Face folder, or a delta of kilobytes."""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from fedtune import shortage, wire
from fedtune.algorithms import ALGORITHMS
from fedtune.algorithms.base import most_pools
from fedtune.architecture import layout_of_architecture
from fedtune.coefficients import Coefficients
from fedtune.config import RunConfig, Scalar
from fedtune.delta import Delta, encode
from fedtune.directions.base import Pool
from fedtune.errors import (
    ConfigError,
    FedtuneError,
    MalformedMessageError,
    ModelError,
    RunFolderError,
    StaleReplicaError,
    UnchangedError,
    WireError,
)
from fedtune.layout import Layout
from fedtune.models import LanguageModel, resolve_model
from fedtune.private import ordinary_mode
from fedtune.resident import Resident
from fedtune.run_folder import COEFFICIENTS, RunFolder, check_new
from fedtune.trust import EXPORT, Ways, base_of, own_code_explained
from fedtune.wire import Instruction

FINAL = COEFFICIENTS


@dataclass(frozen=True)
class Exported:
    """What was written: folder or file, the state's round and digest, the bytes; `base`: it is the base model itself."""

    path: Path
    round: int
    digest: str
    bytes: int
    unchanged: bool = False

    @property
    def what(self) -> str:
        """Which model it is, in words."""
        return f"the model after round {self.round}" + (
            ", which is the base model: no update has moved it" if self.unchanged else ""
        )


@dataclass(frozen=True)
class Base:
    """What is said about the base model by whoever asks, and not by the run folder, which anybody may have made.

    Attributes:
        model: folder or hub name; "": what the run folder names, if it is on this machine (`fedtune.trust`).
        revision: of a hub model that is named here.
        trust_remote_code: whether Python code that comes with the model may run.
    """

    model: str = ""
    revision: str = ""
    trust_remote_code: bool = False


AS_STORED = Base()


def load_tuned(run: RunFolder, name: str = FINAL, base: Base = AS_STORED) -> tuple[LanguageModel, int, bytes]:
    """The tuned model of a run in memory (on the CPU), with the round and the digest of its state.

    Args:
        name: which coefficients, FINAL or BEST (of the lowest held-out loss).
        base: the base model, if not where it was.

    Raises:
        RunFolderError: the folder has no coefficients, or damaged ones.
        ModelError: the base model is not the one that the run started from.
    """
    config = _config(run, base)
    here = Resident(config)
    with own_code_explained(run.config(), config, EXPORT):
        replica = here.replica
    complete = _coefficients(run, name, config, replica.layout)
    if complete.fingerprint != replica.fingerprint:
        raise _another_base(config, complete.fingerprint, replica.fingerprint)
    try:
        replica.become(Coefficients(complete.pools), complete.digest)
    except StaleReplicaError as error:
        raise _damaged(run, name, error) from None
    return here.language_model, complete.round - 1, complete.digest


def export_run(run: RunFolder, out: Path, name: str = FINAL, base: Base = AS_STORED, unchanged: bool = False) -> Exported:
    """Write the tuned model of `run` to the new folder `out`, loadable with AutoModelForCausalLM.from_pretrained.

    Args:
        unchanged: write it also if no update has moved it, so that it is the base model.

    Raises:
        UnchangedError: it is the base model, and `unchanged` is false.
        RunFolderError: `out` exists or cannot be written, or see `load_tuned`. ModelError: see `load_tuned`.
    """
    check_new(out)
    found = is_base(run, name)
    if found and not unchanged:
        raise _nothing_tuned(run, name)
    lm, round, digest = load_tuned(run, name, base)
    lm = replace(lm, model=ALGORITHMS[run.config().algorithm].merge(lm.model))
    return Exported(out, round, digest.hex(), write_folder(lm, out), found)


def is_base(run: RunFolder, name: str = FINAL) -> bool:
    """Whether the stored model of a run is the base model itself: no update has moved it.

    Raises:
        RunFolderError: the folder has no coefficients, or damaged ones.
    """
    try:
        digest, fingerprint = wire.named_state(run.mapped(name))
    except MalformedMessageError as error:
        raise _damaged(run, name, error) from None
    return digest == Coefficients(()).digest(fingerprint)


def delta_of_run(run: RunFolder, name: str = FINAL, base: Base = AS_STORED, ways: Ways = EXPORT) -> Delta:
    """The tuned model of `run` as a delta; of the base model only the config.json is needed. Raises as `load_tuned` does."""
    config = _config(run, base, ways, weights=False)
    if config.algorithm == "lora":
        raise RunFolderError(
            "A delta changes the base model's own weights, and the run tuned adapters beside them: "
            "use --format hf, which merges them."
        )
    with own_code_explained(run.config(), config, ways):
        layout = layout_of_architecture(config)
    complete = _coefficients(run, name, config, layout)
    if complete.layout != layout.digest:
        raise _another_base(config, complete.layout, layout.digest)
    used = {number: pool for number, pool in enumerate(complete.pools) if not pool.is_zero}
    return Delta(
        base=_base_name(run.config()),
        dtype=config.dtype,
        fingerprint=complete.fingerprint,
        tensors=layout.tensors,
        layout=layout.digest,
        block_rule=ALGORITHMS[config.algorithm].block_rule(config),
        block_sizes=layout.block_sizes,
        digest=complete.digest,
        round=complete.round - 1,
        pool_every=config.pool_every,
        family=complete.pools[0].pool.family,
        rank=complete.pools[0].pool.rank,
        size=complete.pools[0].pool.size,
        numbers=tuple(used),
        pools=tuple(used.values()),
    )


def export_delta(run: RunFolder, out: Path, name: str = FINAL, base: Base = AS_STORED, unchanged: bool = False) -> Exported:
    """Write the tuned model of `run` to the new file `out`, as a delta; `unchanged` as for `export_run`.

    Raises:
        UnchangedError: it is the base model, and `unchanged` is false.
        RunFolderError: `out` exists or cannot be written, or see `load_tuned`. ModelError: see `load_tuned`.
    """
    check_new(out)
    found = is_base(run, name)
    if found and not unchanged:
        raise _nothing_tuned(run, name)
    delta = delta_of_run(run, name, base)
    data = encode(delta)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(out)
    except OSError as error:
        raise _not_written(out, error) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    return Exported(out, delta.round, delta.digest.hex(), len(data), found)


def _config(run: RunFolder, base: Base, ways: Ways = EXPORT, *, weights: bool = True) -> RunConfig:
    """The settings of a run, on the CPU, with the base model that is said now."""
    stored = run.config()
    if not base.model:
        base = replace(base, model=base_of(stored, ways, weights=weights), revision=stored.revision)
    named: dict[str, Scalar] = asdict(base)
    return stored.replace(**named, device="cpu", device_map="none", offload=False)


def _coefficients(run: RunFolder, name: str, config: RunConfig, layout: Layout) -> Instruction:
    """The stored model of a run, as the complete instruction that a client who joins would get."""
    algorithm = ALGORITHMS[config.algorithm]

    def pool_at(number: int) -> Pool:
        return algorithm.pool(config, layout, number)

    most, bits = partial(most_pools, config), config.coefficient_bits
    try:
        return wire.decode_instruction(run.mapped(name), pool_at, most, layout.blocks, bits)
    except (WireError, StaleReplicaError) as error:
        raise _damaged(run, name, error) from None


_SNAPSHOT = re.compile(r"models--([^/]+)--([^/]+)/snapshots/([0-9a-f]{40})")  # where the hub's cache keeps a model


def _base_name(config: RunConfig) -> str:
    """What to call the base model where its path means nothing: hub name (with revision), or folder name.

    A variable in the name is expanded only where that gives a folder: a run folder may be somebody else's, and this name is
    published.
    """
    source = config.model
    if source == "embedded" or "$" in source or source[:1] == "~":
        with suppress(ConfigError):
            found = resolve_model(source)
            source = found if Path(found).is_dir() else source
    cached = _SNAPSHOT.search(source)
    if cached:
        return "{}/{}@{}".format(*cached.groups())
    if source == "embedded" or Path(source).is_dir() or source.count("/") > 1 or source[:1] in "./~":
        return Path(source).name
    return f"{source}@{config.revision}" if config.revision else source


# ---------------------------------------------------------------------------------------------------- a folder


def write_folder(lm: LanguageModel, out: Path) -> int:
    """Write model and tokenizer as `out`, which appears whole or not at all; returns its bytes."""
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _save(lm, partial)
        partial.rename(out)
    except OSError as error:
        raise _not_written(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def _save(lm: LanguageModel, folder: Path) -> None:
    model: Any = lm.model
    model.config.use_cache = True  # switched off for training
    model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    mode = ordinary_mode(folder)
    for path in filter(Path.is_file, folder.rglob("*")):
        path.chmod(mode)  # safetensors keeps its files to their owner, unlike everything beside them


def _nothing_tuned(run: RunFolder, name: str) -> UnchangedError:
    why = (
        "no update has moved it (`fedtune ledger show` has the reasons of every round)"
        if name == FINAL
        else "no round has a lower held-out loss"
    )
    return UnchangedError(f"The model of '{run.path}' is the base model: {why}. --base writes it all the same.")


def _another_base(config: RunConfig, expected: bytes, got: bytes) -> ModelError:
    return ModelError(
        f"The base model '{config.model}' is not the one that the run started from: give the same files and dtype.",
        expected=expected.hex(),
        got=got.hex(),
    )


def _damaged(run: RunFolder, name: str, error: FedtuneError) -> RunFolderError:
    return RunFolderError(f"'{run.path / name}' is damaged ({error}) Restore it from a copy.", name=name)


def _not_written(out: Path, error: OSError) -> RunFolderError:
    reason = shortage.disk(error) or error.strerror or error
    return RunFolderError(f"'{out}' could not be written: {reason}. Free some space or give another place with --out.")
