"""Forward passes at w + c z without ever writing w: perturbed weights live in a scratch that modules are pointed at.

A small model (WHOLE_LIMIT) is perturbed at once: every parameter points at the scratch from entering `at` to leaving it.
A larger one is perturbed module by module: just before a module runs, w + c z of the parameters that it owns is written
to a scratch the size of the largest module, its `param.data` point there, and point back when it has run, also if it
raised. The weights themselves are only read, so they need no restoring and nothing drifts.

Module by module is right only if no weight is read outside the forward pass of its owner (torch's MultiheadAttention
reads `out_proj.weight` without calling `out_proj`). So the first perturbed forward pass runs under a dispatch mode that
sees every operator, and an operator that is handed the memory of an original weight raises ModelError. Parameters of a
module that is never called (an unused expert) are never handed to one, and are no error. A read that first happens in a
later pass is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedtune.directions import Directions
from fedtune.errors import ModelError
from fedtune.layout import Layout, trainable

WHOLE_LIMIT = 1 << 26
"""Bytes of trainable weights up to which they are perturbed all at once: a copy of 64 MiB costs less than the hooks."""

MEMORY_ALIGN = 64  # bytes, so that kernels see the alignment that torch's own allocations have


@dataclass(eq=False)
class _Slot:
    """One trainable parameter. `original` is its tensor while it points elsewhere, for `depth` owners at once."""

    index: int
    name: str
    parameter: Parameter
    original: Tensor | None = None
    depth: int = 0


@dataclass(eq=False)
class _Owner:
    """A module, the parameters that it owns, and the bytes start..end of the scratch where they are perturbed."""

    module: Module
    slots: list[_Slot]
    start: int
    end: int
    views: list[Tensor] = field(default_factory=list)


class Perturbation:
    """Runs `model` at w + c z_k.

    >>> with perturbation.at(directions, k=3, c=5e-4):  # doctest: +SKIP
    ...     loss = model(**batch).loss

    Args:
        model: its trainable parameters must be those of `layout`, and stay on their device and in their dtype.
        layout: says which direction belongs to which parameter; tied parameters are one parameter.
        whole_limit: bytes of trainable weights up to which all are perturbed at once.

    Raises:
        ModelError: the model's trainable parameters are not those of the layout.
    """

    def __init__(self, model: Module, layout: Layout, whole_limit: int = WHOLE_LIMIT) -> None:
        named = trainable(model)
        if [(name, tuple(p.shape)) for name, p in named] != [(e.name, e.shape) for e in layout.entries]:
            raise ModelError("The model's trainable parameters are not those of the layout: make the layout from this model.")
        self._slots = [_Slot(i, name, parameter) for i, (name, parameter) in enumerate(named)]
        self.whole = sum(_bytes(slot) for slot in self._slots) <= whole_limit
        self._owners = [_everything(model, self._slots)] if self.whole else _owners(model, self._slots)
        self._active: list[_Owner] = []
        self._at: tuple[Directions, int, float] | None = None
        self._guard: _Guard | None = None
        self._checked = self.whole
        self._handles = [] if self.whole else [handle for owner in self._owners for handle in self._hook(owner)]

    @property
    def scratch_bytes(self) -> int:
        """Memory that perturbing takes on top of the weights; allocated by the first use."""
        return max(owner.end for owner in self._owners)

    @contextmanager
    def at(self, directions: Directions, k: int, c: float) -> Iterator[None]:
        """Inside the `with` block, and without gradients, the model runs at w + c z_k.

        Raises:
            ModelError: entered twice, in inference mode, after the model was moved or cast, or a weight is read outside
                the forward pass of its owner (named; found in the first pass).
        """
        if self._at is not None:
            raise ModelError("The model is perturbed already: leave the first `with` block before entering another.")
        if torch.is_inference_mode_enabled():
            raise ModelError("Perturbed passes swap parameters, which inference mode forbids: use torch.no_grad instead.")
        self._prepare()
        self._at = (directions, k, c)
        self._guard = None if self._checked else _Guard(self._slots)
        ran = False
        try:
            with torch.no_grad(), self._guard or nullcontext():
                if self.whole:
                    self._enter(self._owners[0])
                yield
            ran = self._guard is not None and self._guard.swapped
        finally:
            self._restore()
            self._checked = self._checked or ran
            self._at = self._guard = None

    def close(self) -> None:
        """Remove the hooks and free the scratch. The model is as if it had never been perturbed."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for owner in self._owners:
            owner.views = []

    # ------------------------------------------------------------------ swapping

    def _hook(self, owner: _Owner) -> list[Any]:
        enter = owner.module.register_forward_pre_hook(partial(self._before, owner))
        leave = owner.module.register_forward_hook(partial(self._after, owner), always_call=True)
        return [enter, leave]

    def _before(self, owner: _Owner, *_: object) -> None:
        if self._at is not None:
            with self._guard.paused() if self._guard else nullcontext():
                self._enter(owner)

    def _after(self, owner: _Owner, *_: object) -> None:
        if self._at is not None:
            self._leave(owner)

    def _enter(self, owner: _Owner) -> None:
        """Point the owner's parameters at w + c z; those that point there already (tied, or re-entered) stay."""
        assert self._at is not None
        directions, k, c = self._at
        free = not any(owner.start < other.end and other.start < owner.end for other in self._active)
        self._active.append(owner)
        for slot, view in zip(owner.slots, owner.views, strict=True):
            slot.depth += 1
            if slot.depth == 1:
                original = slot.parameter.data
                target = view if free else torch.empty_like(original)
                directions.perturb(slot.index, original, target, k, c)
                slot.original = original
                slot.parameter.data = target

    def _leave(self, owner: _Owner) -> None:
        if owner in self._active:  # not if entering failed before it
            self._active.remove(owner)
        for slot in owner.slots:
            slot.depth = max(slot.depth - 1, 0)
            if slot.depth == 0:
                _point_back(slot)

    def _restore(self) -> None:
        """Point every parameter at its weights again; needed where torch runs no hook (KeyboardInterrupt)."""
        self._active.clear()
        for slot in self._slots:
            slot.depth = 0
            _point_back(slot)

    # ------------------------------------------------------------------ the scratch

    def _prepare(self) -> None:
        """Allocate the scratch on the first use; afterwards check that it still fits the parameters."""
        if not self._owners[0].views:
            self._allocate()
        for owner in self._owners:
            for slot, view in zip(owner.slots, owner.views, strict=True):
                if slot.parameter.dtype != view.dtype or slot.parameter.device != view.device:
                    raise ModelError(f"Parameter '{slot.name}' was moved or cast: make a new Perturbation for the model.")

    def _allocate(self) -> None:
        devices = {slot.parameter.device for slot in self._slots}
        buffers = {device: torch.empty(self.scratch_bytes, dtype=torch.uint8, device=device) for device in devices}
        for owner in self._owners:
            start = owner.start
            for slot in owner.slots:
                parameter = slot.parameter
                piece = buffers[parameter.device][start : start + parameter.numel() * parameter.element_size()]
                owner.views.append(piece.view(parameter.dtype).view(parameter.shape))
                start += _bytes(slot)


class _Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises when an operator is handed the memory of an original weight while that weight should be perturbed."""

    def __init__(self, slots: list[_Slot]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.swapped = False
        self._paused = False
        self._ranges: dict[int, list[tuple[int, int, str]]] = {}
        for slot in slots:
            data = slot.parameter.data
            self._ranges.setdefault(data.untyped_storage().data_ptr(), []).append((*_span(data), slot.name))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the perturbation itself read the weights."""
        self._paused = self.swapped = True
        try:
            yield
        finally:
            self._paused = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func.overloadpacket.__name__
        shape_only = name.startswith("new_") or name.endswith("_like")
        if not self._paused and not shape_only:
            for value in tree_iter((args, kwargs)):
                if isinstance(value, Tensor):
                    self._check(value, func)
        return func(*args, **kwargs)

    def _check(self, tensor: Tensor, func: Any) -> None:
        for start, end, name in self._ranges.get(tensor.untyped_storage().data_ptr(), ()):
            first, last = _span(tensor)
            if first < end and start < last:
                raise ModelError(
                    f"Parameter '{name}' is read ({func}) outside the forward pass of the module that owns it, so it cannot "
                    "be perturbed module by module: give Perturbation a whole_limit above the size of the weights.",
                    name=name,
                )


def _everything(model: Module, slots: list[_Slot]) -> _Owner:
    return _Owner(model, slots, 0, sum(_bytes(slot) for slot in slots))


def _owners(model: Module, slots: list[_Slot]) -> list[_Owner]:
    """The modules with trainable parameters of their own. Modules that run inside one another get disjoint scratch."""
    by_parameter = {slot.parameter: slot for slot in slots}
    owners: list[_Owner] = []
    seen: set[Module] = set()

    def place(module: Module, start: int) -> None:
        if module in seen:
            return
        seen.add(module)
        own = [by_parameter[p] for p in module.parameters(recurse=False) if p in by_parameter]
        end = start + sum(_bytes(slot) for slot in own)
        if own:
            owners.append(_Owner(module, own, start, end))
        for child in module.children():
            place(child, end)

    place(model, 0)
    return owners


def _point_back(slot: _Slot) -> None:
    if slot.original is not None:
        slot.parameter.data = slot.original
        slot.original = None


def _bytes(slot: _Slot) -> int:
    """Bytes of the parameter in the scratch, rounded up to the alignment."""
    size = slot.parameter.numel() * slot.parameter.element_size()
    return -(-size // MEMORY_ALIGN) * MEMORY_ALIGN


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's memory and the address behind its last element."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size() if tensor.numel() else start
