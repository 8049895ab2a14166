"""Where a loaded model lives: on one device, spread over several, or in host memory while another device computes."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from fedtune.config import RunConfig
from fedtune.errors import ModelError
from fedtune.layout import trainable


def loading_options(config: RunConfig) -> dict[str, Any]:
    """What transformers is told while it loads: how to spread the layers (`device_map`).

    Raises:
        ModelError: accelerate, which spreads them, is not installed.
    """
    if config.device_map == "none":
        return {}
    if importlib.util.find_spec("accelerate") is None:
        raise ModelError(
            f"device_map = {config.device_map} needs accelerate, which is not installed: "
            "pip install 'fedtune[multi-gpu]', or remove device_map."
        )
    return {"device_map": config.device_map}


def place(model: torch.nn.Module, config: RunConfig, device: torch.device) -> tuple[torch.device, str]:
    """Bring a model that was loaded with `loading_options` to where it works.

    Returns:
        The device that its inputs go to, and a line about the choice ("" for one device).

    Raises:
        ModelError: the layers do not fit the GPUs together.
    """
    if config.device_map != "none":
        return _spread(model, config)
    if config.offload and device.type != "cpu":
        _offload(model, device)
        return device, f"offload: weights in host memory, brought to {device} module by module"
    model.to(device)
    return device, "offload: not needed, the device is the CPU" if config.offload else ""


def _spread(model: torch.nn.Module, config: RunConfig) -> tuple[torch.device, str]:
    for name, parameter in trainable(model):
        if parameter.is_meta or (parameter.device.type == "cpu" and torch.cuda.is_available()):
            raise ModelError(
                f"device_map = {config.device_map}: '{name}' does not fit the GPUs. "
                "Use a smaller dtype or more GPUs, or offload = true instead of device_map (fedkseed).",
                name=name,
            )
    places = sorted({str(parameter.device) for parameter in model.parameters()})
    embeddings: Any = model.get_input_embeddings()  # type: ignore[operator]
    return embeddings.weight.device, f"device_map: {config.device_map}, layers on {', '.join(places)}"


def _offload(model: torch.nn.Module, device: torch.device) -> None:
    """Everything that is not trained goes to the device; trained weights stay, where the device can read them directly."""
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
        for parameter in module.parameters(recurse=False):
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(device)
            elif device.type == "cuda" and not parameter.is_pinned():
                parameter.data = parameter.data.pin_memory()
