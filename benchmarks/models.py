"""The models and samples that clients are measured on: random Llamas in folders, and a client made from such a folder."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from benchmarks.measure import Options
from fedtune.algorithms import LocalWork
from fedtune.coefficients import Coefficients
from fedtune.config import RunConfig
from fedtune.data.batches import Batch, collate
from fedtune.data.encode import Encoded
from fedtune.embedded import embedded_path
from fedtune.evaluation import response_loss
from fedtune.layout import Layout
from fedtune.resident import Resident
from fedtune.wire import Instruction, Update

VOCABULARY = 16384
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True)
class Size:
    """A Llama by its width (64 a head), number of layers, and tokens of the sample, of which the first quarter is prompt.

    Attributes:
        key_value_heads: 0: as many as heads.
        steps: local steps of one measurement.
        most_repeats: of a measurement, where each takes many seconds.
    """

    hidden: int
    layers: int
    tokens: int
    vocabulary: int = VOCABULARY
    key_value_heads: int = 0
    steps: int = 4
    most_repeats: int = 9

    def repeats(self, options: Options) -> int:
        """Times that each case is measured."""
        return min(options.repeats, self.most_repeats)


STEP = Size(384, 11, 256)  # 25.8 M parameters
SMOLLM2 = Size(576, 30, 256, vocabulary=49152, key_value_heads=3, steps=2, most_repeats=3)  # 134.5 M, SmolLM2-135M's shape
MEMORY = Size(768, 12, 256)  # 97.5 M parameters
QUICK = Size(64, 2, 32, steps=1)
BILLION = Size(2048, 22, 256, vocabulary=32000, key_value_heads=4, steps=1, most_repeats=1)  # 1.0 G, TinyLlama's shape
SIZES = {"25M": STEP, "135M": SMOLLM2, "1.1B": BILLION}
STEPS = ("25M", "135M")  # the models on which steps are measured, unless others are asked for


def models(options: Options, usual: Sequence[str] = STEPS) -> dict[str, Size]:
    """By name: the models that were asked for, or the usual ones."""
    return {"quick": QUICK} if options.quick else {name: SIZES[name] for name in options.sizes or usual}


def save_random(size: Size, folder: Path, dtype: torch.dtype = torch.float32) -> int:
    """Write a random Llama (tied embeddings) and the embedded model's tokenizer; returns its parameters."""
    config = LlamaConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.hidden * 8 // 3,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // 64,
        num_key_value_heads=size.key_value_heads or size.hidden // 64,
        max_position_embeddings=max(512, size.tokens),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(dtype)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    logging.enable_progress_bar()
    for name in TOKENIZER_FILES:
        if (source := embedded_path("model") / name).exists():
            shutil.copy(source, folder / name)
    return int(model.num_parameters())


def sample(tokens: int, vocabulary: int = VOCABULARY) -> Encoded:
    """One sample of `tokens` tokens, the first quarter its prompt."""
    ids = np.random.default_rng(0).integers(3, min(vocabulary, VOCABULARY), tokens)
    return Encoded(tuple(ids.tolist()), tokens // 4, 0)


def batch(tokens: int, vocabulary: int = VOCABULARY) -> Batch:
    """The sample alone."""
    return collate([sample(tokens, vocabulary)], 0)


def forward(model: torch.nn.Module, inputs: Batch) -> torch.Tensor:
    """The loss of a plain forward pass: what inference costs."""
    with torch.no_grad():
        return response_loss(model, inputs)


class Client:
    """A client of one run, as a worker holds it: model and replica of `config`, brought to a state that is not the base."""

    def __init__(self, config: RunConfig, samples: tuple[Encoded, ...]) -> None:
        self.config, self._samples = config, samples
        self.resident = Resident(config)
        self.model: torch.nn.Module = self.resident.language_model.model
        self.device = self.resident.language_model.device
        state = self.resident.algorithm.start(config, self.layout)
        signs = np.where(np.arange(state.values.size) % 2 == 0, 1e-7, -1e-7).reshape(state.values.shape)
        self._state = replace(state, values=signs)
        self._started: LocalWork | None = None

    @property
    def layout(self) -> Layout:
        return self.resident.replica.layout

    def round(self) -> Update:
        """What a worker does in a round: rebuild the model of the instruction, run the local steps."""
        self._started = None
        return self.local_update()

    def local_update(self) -> Update:
        """The local steps alone, from the weights as they are, those of the instruction the first time."""
        return self.resident.algorithm.local_update(self.work(), self.config, self.instruction())

    def work(self) -> LocalWork:
        """What the client works on since the last `round`; the model of the instruction, rebuilt, the first time."""
        if self._started is None:
            self._started = self.resident.work(self.config, "client", self._samples, 1, self.coefficients())
        return self._started

    def instruction(self) -> Instruction:
        """What the server asks for."""
        model, here = self.coefficients(), self.resident
        digest = model.digest(here.replica.fingerprint)
        weights = self.draw_weights()
        counts = here.algorithm.counts(self._state, self.config, self.layout).astype(np.uint16)
        return Instruction(1, here.replica.fingerprint, self.layout.digest, digest, 0, model.pools, weights, counts)

    def coefficients(self) -> Coefficients:
        """The model of the state, as the server publishes it."""
        return self._state.published(self.config.coefficient_bits)

    def draw_weights(self) -> npt.NDArray[np.uint16]:
        """The chance of each seed, as the server sends it."""
        return self.resident.algorithm.draw_weights(self._state)
