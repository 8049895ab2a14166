"""Which module owns which trainable parameter, and where its perturbed weights stand in the scratch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Module, Parameter

MEMORY_ALIGN = 64  # bytes, so that kernels see the alignment that torch's own allocations have


@dataclass(eq=False)
class Slot:
    """One trainable parameter. `original` is its tensor while it points elsewhere, for `depth` owners at once."""

    index: int
    name: str
    parameter: Parameter
    original: Tensor | None = None
    depth: int = 0

    @property
    def weight(self) -> Tensor:
        """The weight itself, wherever the parameter points at the moment."""
        return self.parameter.data if self.original is None else self.original

    @property
    def room(self) -> int:
        """Bytes of the parameter in the scratch, rounded up to the alignment."""
        size = self.parameter.numel() * self.parameter.element_size()
        return -(-size // MEMORY_ALIGN) * MEMORY_ALIGN

    def point_at(self, target: Tensor) -> None:
        """Have the module see `target`."""
        self.original = self.weight
        self.parameter.data = target

    def point_back(self) -> None:
        """Have the module see the weight again."""
        self.depth = 0
        if self.original is not None:
            self.parameter.data = self.original
            self.original = None


@dataclass(eq=False)
class Owner:
    """A module, the parameters that it owns, and the bytes start..end of the scratch where they are perturbed."""

    module: Module
    slots: list[Slot]
    start: int
    end: int
    views: list[Tensor] = field(default_factory=list)

    def allocate(self, buffers: dict[torch.device, Tensor], devices: Sequence[torch.device]) -> None:
        """Cut the views out of the scratch of each slot's device."""
        start = self.start
        for slot, device in zip(self.slots, devices, strict=True):
            parameter = slot.parameter
            piece = buffers[device][start : start + parameter.numel() * parameter.element_size()]
            self.views.append(piece.view(parameter.dtype).view(parameter.shape))
            start += slot.room


def everything(model: Module, slots: list[Slot]) -> Owner:
    """The model as the one owner of all parameters."""
    return Owner(model, slots, 0, sum(slot.room for slot in slots))


def owners_of(model: Module, slots: list[Slot]) -> list[Owner]:
    """The modules with trainable parameters of their own. Modules that run inside one another get disjoint scratch."""
    by_parameter = {slot.parameter: slot for slot in slots}
    owners: list[Owner] = []
    seen: set[Module] = set()

    def place(module: Module, start: int) -> None:
        if module in seen:
            return
        seen.add(module)
        own = [by_parameter[p] for p in module.parameters(recurse=False) if p in by_parameter]
        end = start + sum(slot.room for slot in own)
        if own:
            owners.append(Owner(module, own, start, end))
        for child in module.children():
            place(child, end)

    place(model, 0)
    return owners


@contextmanager
def pointed(slots: Sequence[Slot], targets: Sequence[Tensor]) -> Iterator[None]:
    """Inside the `with` block the parameters point at `targets`, afterwards where they pointed before."""
    before = [(slot.parameter.data, slot.original) for slot in slots]
    try:
        for slot, target in zip(slots, targets, strict=True):
            slot.point_at(target)
        yield
    finally:
        for slot, (data, original) in zip(slots, before, strict=True):
            slot.parameter.data, slot.original = data, original
