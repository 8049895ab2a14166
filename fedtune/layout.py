"""The trainable parameters of a model in canonical order: names, shapes, blocks, positions, fingerprint.

A position numbers an element of the model for the directions. Every tensor starts at a multiple of ALIGN, so that a
tensor's directions depend on its place in the order and on nothing else (not on how the others are cut up or placed).
The gaps are positions that no element has. Tied tensors are one parameter and have one place.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch

from fedtune.errors import DirectionsError, ModelError

ALIGN = 65536  # the largest tile of any family, so a tile never spans two tensors

BlockRule = Literal["one", "grouped", "tensor"]


@dataclass(frozen=True)
class Entry:
    """One trainable tensor: its name, shape, number of elements, first position and block."""

    name: str
    shape: tuple[int, ...]
    numel: int
    origin: int
    block: int


@dataclass(frozen=True)
class Layout:
    """Trainable tensors in canonical order (that of `named_parameters`, tied ones once)."""

    entries: tuple[Entry, ...]

    @classmethod
    def of(cls, model: torch.nn.Module, blocks: BlockRule = "one") -> Layout:
        """Lay out `model`. Raises ModelError if nothing is trainable or a trainable tensor is not floating point."""
        named = trainable(model)
        return cls.from_shapes([(name, tuple(p.shape)) for name, p in named], blocks)

    @classmethod
    def from_shapes(cls, shapes: Sequence[tuple[str, tuple[int, ...]]], blocks: BlockRule = "one") -> Layout:
        """Lay out tensors of the given names and shapes, in the given order."""
        sizes = [_numel(shape) for _, shape in shapes]
        rule = {"one": _one_block, "grouped": _grouped_blocks, "tensor": _block_per_tensor}
        if blocks not in rule:
            raise DirectionsError(f"There is no block rule '{blocks}': use one of {', '.join(rule)}.")
        origin = 0
        entries = []
        for (name, shape), size, block in zip(shapes, sizes, rule[blocks](sizes), strict=True):
            entries.append(Entry(name, shape, size, origin, block))
            origin += -(-size // ALIGN) * ALIGN
        return cls(tuple(entries))

    @cached_property
    def numel(self) -> int:
        """d: the number of trainable parameters."""
        return sum(entry.numel for entry in self.entries)

    @cached_property
    def block_sizes(self) -> tuple[int, ...]:
        """d_l for each block l."""
        sizes = [0] * (1 + max(entry.block for entry in self.entries))
        for entry in self.entries:
            sizes[entry.block] += entry.numel
        return tuple(sizes)

    @property
    def blocks(self) -> int:
        """L: the number of blocks."""
        return len(self.block_sizes)

    @cached_property
    def digest(self) -> bytes:
        """16 bytes over names, shapes and blocks: equal on two machines if and only if coefficients mean the same."""
        text = "\n".join(f"{e.name} {'x'.join(map(str, e.shape))} {e.origin} {e.block}" for e in self.entries)
        return hashlib.sha256(text.encode()).digest()[:16]

    @cached_property
    def tensors(self) -> bytes:
        """16 bytes over names and shapes alone, whatever the blocks: equal if and only if the architectures are."""
        text = "\n".join(f"{e.name} {'x'.join(map(str, e.shape))}" for e in self.entries)
        return hashlib.sha256(text.encode()).digest()[:16]


def trainable(model: torch.nn.Module) -> list[tuple[str, torch.nn.Parameter]]:
    """Names and parameters that are tuned, in canonical order.

    Raises:
        ModelError: no trainable parameter, or one that is not fp32, bf16 or fp16 (a quantised model, say).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        raise ModelError("The model has no trainable parameter: load it without quantisation and without frozen weights.")
    for name, parameter in named:
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ModelError(f"Parameter '{name}' is {parameter.dtype}: fedtune tunes float32, bfloat16 and float16 weights.")
    return named


def base_size(model: torch.nn.Module) -> int:
    """Parameters of the base model: the frozen ones where adapters are tuned, else those that are tuned."""
    frozen = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    return frozen or sum(parameter.numel() for _, parameter in trainable(model))


def fingerprint(model: torch.nn.Module) -> bytes:
    """16 bytes over the names, shapes, dtypes and bits of the trainable parameters: which base model this is.

    Frozen parameters, which adapters stand beside, follow the trainable ones.

    Raises:
        ModelError: a weight is NaN or infinite; names the first tensor with one, and how many there are. The pass over the
            weights that names them is the one that checks them.
    """
    state = hashlib.sha256()
    lost: dict[str, tuple[torch.nn.Parameter, int]] = {}
    frozen = [(name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad]
    for name, parameter in (*trainable(model), *frozen):
        state.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        flat = parameter.detach().reshape(-1)
        count = 0
        for chunk in torch.split(flat, 1 << 24):
            here = chunk.cpu().contiguous()
            state.update(here.view(torch.uint8).numpy().data)
            count += _not_finite(here)
        if count:
            lost[name] = (parameter, count)
    if lost:
        raise _not_numbers(lost)
    return state.digest()[:16]


def _not_finite(values: torch.Tensor) -> int:
    """How many of `values` are NaN or infinite. Costs a fifth of the hash: `aminmax` is NaN if one of them is."""
    if not values.is_floating_point() or not values.numel():
        return 0
    least, most = (float(value) for value in torch.aminmax(values))
    return 0 if math.isfinite(least) and math.isfinite(most) else int((~torch.isfinite(values)).sum())


def _not_numbers(lost: dict[str, tuple[torch.nn.Parameter, int]]) -> ModelError:
    """What is wrong with the weights, by name: parameter and number of those of its elements that are not finite."""
    name, (parameter, count) = next(iter(lost.items()))
    others = f", and {len(lost) - 1} more tensors have such" if len(lost) > 1 else ""
    largest = torch.finfo(parameter.dtype).max
    overflow = (
        f", or set dtype = float32 if they were finite before they became {parameter.dtype} (up to {largest:.6g})"
        if parameter.dtype is not torch.float32
        else ""
    )
    return ModelError(
        f"The base model cannot be used: {count:,} of {parameter.numel():,} weights of '{name}' are NaN or infinite{others}. "
        f"Nothing can be learned from there. Get the weights again{overflow}.",
        tensors={tensor: number for tensor, (_, number) in lost.items()},
    )


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def _one_block(sizes: Sequence[int]) -> list[int]:
    return [0] * len(sizes)


def _block_per_tensor(sizes: Sequence[int]) -> list[int]:
    return list(range(len(sizes)))


def _grouped_blocks(sizes: Sequence[int]) -> list[int]:
    """Join consecutive tensors as long as a block stays within 0.9 of the median tensor size (Ferret's official grouping)."""
    threshold = 0.9 * statistics.median(sizes)
    blocks: list[int] = []
    block, filled = 0, 0
    for size in sizes:
        if filled and filled + size > threshold:
            block, filled = block + 1, 0
        blocks.append(block)
        filled += size
    return blocks
