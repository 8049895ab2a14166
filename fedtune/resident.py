"""What a process keeps loaded for a run: model, data and replica, loaded once and shared by all simulated clients.

A Resident is found again by the settings that it names, and can read no other: whatever a run may change without another
model or other data (batch size, rate, rounding) is handed in by the run that asks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch

from fedtune.algorithms import ALGORITHMS, LocalWork
from fedtune.coefficients import Coefficients
from fedtune.config import RunConfig, Scalar
from fedtune.data.batches import Batch, client_batches
from fedtune.data.encode import Encoded
from fedtune.data.federated import FederatedData, load_federated, load_local
from fedtune.declared import only
from fedtune.directions import Directions
from fedtune.evaluation import response_loss, response_losses
from fedtune.layout import Layout
from fedtune.models import LanguageModel, load_model, resolve_model
from fedtune.replica import Replica
from fedtune.scratch import trim
from fedtune.seeds import Stream, stream_key
from fedtune.stamps import folder_stamp, source_digest

MODEL_SETTINGS = (
    "model",
    "revision",
    "trust_remote_code",
    "dtype",
    "device",
    "device_map",
    "offload",
    "threads",
    "max_length",
    "blocks",
    "algorithm",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "seed",
)
"""What the loaded model depends on, with its adapters (drawn from the seed), layout and placement."""
DATA_SETTINGS = (
    "data",
    "instruction_column",
    "input_column",
    "output_column",
    "category_column",
    "template",
    "max_length",
    "partition",
    "dirichlet_alpha",
    "min_samples",
    "holdout",
    "holdout_category",
    "holdout_file",
    "eval_samples",
    "choices",
    "clients",
    "seed",
)
"""What the data depend on, besides the tokenizer, which is the model's."""
MOST_FILES = 64  # of clients with files of their own
PROBE_ROWS, PROBE_TOKENS, PROBE_STEP = 2, 12, 1e-3


class Resident:
    """A loaded model with its replica, and the federated data; each on first use."""

    def __init__(self, config: RunConfig) -> None:
        self.algorithm = ALGORITHMS[config.algorithm]
        self._model_settings = only(config, MODEL_SETTINGS, "the resident model")
        self._data_settings = only(config, DATA_SETTINGS, "the resident data")
        self._seen: dict[str, bytes] = {}
        self._own_files: OrderedDict[tuple[str, bytes], tuple[Encoded, ...]] = OrderedDict()

    def load(self) -> None:
        """Load model and data now, so that what is wrong with them is known before anything else happens."""
        _ = self.replica, self.data

    @cached_property
    def language_model(self) -> LanguageModel:
        seen = self._model_stamp(None)  # before it is loaded: what is written meanwhile is a change
        loaded = load_model(self._model_settings)
        self._seen["model"] = seen or self._model_stamp(loaded.folder)
        return replace(loaded, model=self.algorithm.adapt(loaded.model, self._model_settings))

    @cached_property
    def replica(self) -> Replica:
        model = self.language_model.model
        layout = Layout.of(model, self.algorithm.block_rule(self._model_settings))
        device = self.language_model.device
        computes_on = device if self._model_settings.offload and device.type != "cpu" else None
        return Replica(model, layout, self.language_model.folder, device=computes_on)

    @cached_property
    def data(self) -> FederatedData:
        self._seen["data"] = self._data_stamp()
        found = load_federated(self._data_settings, self.language_model.tokenizer)
        trim()  # rows, texts and lists of tokens were several times as large
        return found

    def own_file(self, path: str) -> tuple[Encoded, ...]:
        """The usable samples of a client's own file, as it is now. Raises DataError as `load_local` does."""
        key = path, source_digest(path)
        if key not in self._own_files:
            while len(self._own_files) >= MOST_FILES:
                self._own_files.popitem(last=False)
            self._own_files[key] = load_local(self._data_settings, self.language_model.tokenizer, path)
        self._own_files.move_to_end(key)
        return self._own_files[key]

    # ------------------------------------------------------------------ a client's work

    def batches(self, config: RunConfig, client: str, samples: Sequence[Encoded], round: int) -> Iterator[Batch]:
        """What `client` sees in a round, without end: its samples in the order of its stream of the round."""
        stream, lm = Stream(config.seed, "batches", round, client), self.language_model
        drawn = client_batches(samples, config.batch_size, stream, lm.tokenizer.pad_token_id)
        return (batch.to(lm.device) for batch in drawn)

    def work(self, config: RunConfig, client: str, samples: Sequence[Encoded], round: int, model: Coefficients) -> LocalWork:
        """What `client` works on in a round of the run `config`. The live weights are those of `model`, and will be written.

        Args:
            config: of the run that asks: nothing of an earlier one is used.
            model: that the client starts from; its last pool has the directions of the steps.
        """
        replica = self.replica
        batches = self.batches(config, client, samples, round)
        directions = replica.directions(model.pools[-1].pool)
        self._compare_ways(directions)
        replica.become(model)
        replica.touch()
        replica.perturbation.live.begin(config.update_rounding, stream_key(config.seed, "rounding", round, client))
        return LocalWork(
            model=replica.model,
            weights=replica.weights,
            loss=response_loss,
            batches=batches,
            directions=directions,
            perturbation=replica.perturbation,
            client=client,
            examples=len(samples),
            start=replica.start,
            losses=response_losses,
            moves=replica,
        )

    def _compare_ways(self, directions: Directions) -> None:
        """Let the perturbation find out, on the base model and tokens that are always the same, how it can evaluate.

        It would find out on the first batch of the first run else, and keep that for the next run.
        """
        perturbation = self.replica.perturbation
        if not perturbation.may_run_together(directions) or perturbation.compared(directions):
            return
        self.replica.become(Coefficients(()))
        batch, model = self._probe(), self.replica.model
        perturbation.losses(
            directions,
            [(0, PROBE_STEP), (0, -PROBE_STEP)],
            lambda: response_loss(model, batch),
            lambda copies: response_losses(model, batch, copies),
        )

    def _probe(self) -> Batch:
        """[PROBE_ROWS, PROBE_TOKENS] tokens, the same for every run."""
        rows = self.language_model.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        drawn = Stream("probe").below(int(rows), PROBE_ROWS * PROBE_TOKENS).reshape(PROBE_ROWS, PROBE_TOKENS)
        ids = torch.from_numpy(drawn)
        return Batch(ids, torch.ones_like(ids), ids).to(self.language_model.device)

    # ------------------------------------------------------------------ the process and the files

    def use_threads(self) -> None:
        """Have torch work with the threads of this model: another one may have been loaded meanwhile."""
        lm = self.__dict__.get("language_model")
        if lm is not None and torch.get_num_threads() != lm.threads:
            torch.set_num_threads(lm.threads)

    def is_current(self) -> bool:
        """Whether the files behind what is loaded are still those that it was loaded from."""
        lm = self.__dict__.get("language_model")
        now = {"model": lambda: self._model_stamp(lm and lm.folder), "data": self._data_stamp}
        return all(now[part]() == seen for part, seen in self._seen.items())

    def _model_stamp(self, folder: Path | None) -> bytes:
        """Of the folder that the settings name now, or of the copy of a hub model; b"" as long as that is not known."""
        named = Path(resolve_model(self._model_settings.model))
        place = named if named.is_dir() else folder
        return folder_stamp(place) if place else b""

    def _data_stamp(self) -> bytes:
        return source_digest(self._data_settings.data) + source_digest(self._data_settings.holdout_file)


@dataclass(frozen=True)
class _Held:
    key: tuple[tuple[type, Scalar], ...]
    resident: Resident


_held: list[_Held] = []  # at most one


def resident(config: RunConfig) -> Resident:
    """The Resident of this process for `config`; the one before is dropped when another model or data set is asked for."""
    names = (*MODEL_SETTINGS, *DATA_SETTINGS)
    key = tuple((type(value), value) for value in (getattr(config, name) for name in names))
    if not _held or _held[0].key != key:
        release()
        _held.append(_Held(key, Resident(config)))
    here = _held[0].resident
    here.use_threads()
    return here


def renewed(config: RunConfig) -> Resident:
    """As `resident`, for whoever begins something: loaded anew if a file behind the model or the data was changed since."""
    if not resident(config).is_current():
        release()
    return resident(config)


def release() -> None:
    """Drop what is loaded."""
    _held.clear()
