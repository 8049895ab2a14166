"""FedIT: low-rank adapters beside frozen weights, trained to first order and averaged.

Sources: Hu et al., "LoRA", arXiv 2106.09685; Zhang et al., "Towards Building the Federated GPT: Federated Instruction Tuning",
ICASSP 2024, arXiv 2305.05644. A linear layer W [out, in] becomes

    W x + (lora_alpha / lora_rank) B A x,    A [rank, in] uniform in +-1/sqrt(in), B [out, rank] zero at the start

and A and B are the trainable parameters: the rest is FedAvg over them, each averaged for itself (the mean of the products is
another matrix). A comes from a named stream, so that all parties have the same one without a message.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from fedtune.algorithms.fedavg import FEDAVG
from fedtune.config import RunConfig
from fedtune.errors import ModelError
from fedtune.seeds import Stream

_A, _B = ".lora_A.", ".lora_B."


def adapt(model: torch.nn.Module, config: RunConfig) -> torch.nn.Module:
    """`model` with adapters in place of its linear layers; only they are trainable.

    Raises:
        ModelError: peft is not installed, or no layer has a name of `lora_targets`.
    """
    peft = _peft()
    targets: Any = "all-linear" if config.lora_targets == "auto" else [n.strip() for n in config.lora_targets.split(",")]
    asked = peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=targets, lora_dropout=0.0)
    with _undisturbed():
        try:
            adapted: torch.nn.Module = peft.inject_adapter_in_model(asked, model)
        except ValueError as error:
            raise ModelError(
                f"No layer takes an adapter with lora_targets = {config.lora_targets} ({str(error).splitlines()[0]}): "
                "give names of linear layers, such as q_proj,v_proj.",
                targets=config.lora_targets,
            ) from None
    _start(adapted, config.seed)
    return adapted.eval()


@torch.no_grad()
def _start(model: torch.nn.Module, seed: int) -> None:
    """A from the stream (seed, "adapter", name), B zero."""
    for name, parameter in model.named_parameters():
        if _B in name:
            parameter.zero_()
        elif _A in name:
            bound = 1.0 / float(np.sqrt(parameter.shape[1]))
            drawn = (2.0 * Stream(seed, "adapter", name).uniform(parameter.numel()) - 1.0) * bound
            parameter.copy_(torch.from_numpy(drawn).reshape(parameter.shape))


@torch.no_grad()
def merge(model: torch.nn.Module) -> torch.nn.Module:
    """Add the products to the layers and take the adapters out, in place: the architecture of the base again."""
    from peft.tuners.lora import LoraLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    return model


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise ModelError("algorithm = lora needs peft, which is not installed: pip install 'fedtune[lora]'.") from None
    return peft


@contextmanager
def _undisturbed() -> Iterator[None]:
    """peft draws initial values, which are replaced: torch's global generator stays as it was."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


LORA = replace(FEDAVG, name="lora", adapt=adapt, merge=merge)
