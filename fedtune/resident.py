"""What a process keeps loaded for a run: model, data and replica, loaded once and shared by all simulated clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

from fedtune.algorithms import ALGORITHMS, LocalWork
from fedtune.config import RunConfig, Scalar
from fedtune.data.batches import client_batches
from fedtune.data.encode import Encoded
from fedtune.data.federated import FederatedData, load_federated
from fedtune.directions import Pool
from fedtune.evaluation import response_loss, response_losses
from fedtune.layout import Layout
from fedtune.models import LanguageModel, load_model
from fedtune.replica import Replica
from fedtune.seeds import Stream, stream_key

_MODEL_SETTINGS = (
    "model",
    "revision",
    "trust_remote_code",
    "dtype",
    "device",
    "device_map",
    "offload",
    "threads",
    "blocks",
    "algorithm",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
)
_DATA_SETTINGS = (
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
    "clients",
    "seed",
    "model",
    "revision",
    "trust_remote_code",
)


class Resident:
    """A loaded model with its replica, and the federated data; each on first use."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.algorithm = ALGORITHMS[config.algorithm]

    def load(self) -> None:
        """Load model and data now, so that what is wrong with them is known before anything else happens."""
        _ = self.replica, self.data

    @cached_property
    def language_model(self) -> LanguageModel:
        loaded = load_model(self.config)
        return replace(loaded, model=self.algorithm.adapt(loaded.model, self.config))

    @cached_property
    def replica(self) -> Replica:
        model = self.language_model.model
        layout = Layout.of(model, self.algorithm.block_rule(self.config))
        device = self.language_model.device
        computes_on = device if self.config.offload and device.type != "cpu" else None
        return Replica(model, layout, self.language_model.folder, device=computes_on)

    @cached_property
    def data(self) -> FederatedData:
        return load_federated(self.config, self.language_model.tokenizer)

    def work(self, client: str, samples: Sequence[Encoded], round: int, pool: Pool) -> LocalWork:
        """What `client` works on in a round: its samples in the order of the stream (seed, "batches", round, client).

        The weights must be those that the client starts from: a master copy is made of them.
        """
        replica, lm, config = self.replica, self.language_model, self.config
        stream = Stream(config.seed, "batches", round, client)
        batches = client_batches(samples, config.batch_size, stream, lm.tokenizer.pad_token_id)
        replica.perturbation.live.begin(config.update_rounding, stream_key(config.seed, "rounding", round, client))
        return LocalWork(
            model=replica.model,
            weights=replica.weights,
            loss=response_loss,
            batches=(batch.to(lm.device) for batch in batches),
            directions=replica.directions(pool),
            perturbation=replica.perturbation,
            client=client,
            examples=len(samples),
            start=replica.start,
            losses=response_losses,
        )


_resident: dict[tuple[Scalar, ...], Resident] = {}


def resident(config: RunConfig) -> Resident:
    """The Resident of this process for `config`; the one before is dropped when another model or data set is asked for."""
    settings = config.as_mapping()
    key = tuple(settings[name] for name in (*_MODEL_SETTINGS, *_DATA_SETTINGS))
    if key not in _resident:
        _resident.clear()
        _resident[key] = Resident(config)
    return _resident[key]


def release() -> None:
    """Drop what is loaded."""
    _resident.clear()
