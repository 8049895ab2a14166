"""What a run needs when only the model's config.json is there: no weights, no tokenizer, no data, no network.

The model is built of fake tensors, which have shapes and no memory, and a training pass over the longest batch that
`max_length` allows is traced through it. Time cannot be known so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from fedtune.algorithms import ALGORITHMS
from fedtune.config import RunConfig
from fedtune.data.batches import Batch
from fedtune.embedded import SHIPPED, shipped_path
from fedtune.errors import ModelError
from fedtune.layout import Layout
from fedtune.models import DTYPES, check_positions, read_config, resolve_model
from fedtune.needs import Needs, needs
from fedtune.perturb import Perturbation


def architecture_folder(config: RunConfig) -> Path:
    """The folder with the config.json of `config.model`: its own, the one that ships with fedtune, or the hub's.

    Raises:
        ModelError: there is none.
    """
    source = resolve_model(config.model)
    if (Path(source) / "config.json").is_file():
        return Path(source)
    shipped = shipped_path(f"{SHIPPED}/{source}/config.json") if not Path(source).is_absolute() else None
    if shipped:
        return shipped.parent
    try:
        return Path(hf_hub_download(source, "config.json", revision=config.revision or None)).parent
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError):
        raise ModelError(
            f"There is no config.json of '{source}', neither in a folder of that name nor on the hub: "
            "give a folder that has one.",
            model=source,
        ) from None


def needs_of_architecture(config: RunConfig) -> Needs:
    """The needs of a run of `config`, from the architecture alone; samples count as `max_length` response tokens each.

    Raises:
        ModelError: no config.json, or not one of a causal language model that fits `max_length`.
    """
    model_config = read_config(architecture_folder(config), config.model, config)
    check_positions(model_config, config.max_length, config.model)
    with FakeTensorMode():
        model = _built(model_config, config)
        layout = Layout.of(model, ALGORITHMS[config.algorithm].block_rule(config))
        return needs(config, model, layout, Perturbation(model, layout), _longest(config))


def layout_of_architecture(config: RunConfig) -> Layout:
    """The layout of the model of `config`, with the blocks of its algorithm. Raises ModelError as above."""
    model_config = read_config(architecture_folder(config), config.model, config)
    with FakeTensorMode():
        return Layout.of(_built(model_config, config), ALGORITHMS[config.algorithm].block_rule(config))


def _built(model_config: Any, config: RunConfig) -> torch.nn.Module:
    build: Any = AutoModelForCausalLM.from_config
    model: torch.nn.Module = build(model_config, dtype=DTYPES[config.dtype], trust_remote_code=config.trust_remote_code)
    return ALGORITHMS[config.algorithm].adapt(model, config).eval()


def _longest(config: RunConfig) -> Batch:
    """A batch of `max_length` tokens a sample, trained on from the second token on."""
    ids = torch.zeros(config.batch_size, config.max_length, dtype=torch.int64)
    batch = Batch(ids, torch.ones_like(ids), ids)
    batch.__dict__["first"] = 1  # fake labels have no values to find it in
    return batch
