"""Forward passes at w + c z without ever writing w: perturbed weights live in a scratch that modules are pointed at.

A small model (WHOLE_LIMIT) is perturbed at once: every parameter points at the scratch from entering `at` to leaving it.
A larger one is perturbed module by module: just before a module runs, w + c z of the parameters that it owns is written
to a scratch the size of the largest module, its `param.data` point there, and point back when it has run, also if it
raised. The weights themselves are only read, so they need no restoring and nothing drifts.

Where the weights stay in host memory and the model computes on another device (`device`), the same hooks bring every
module's weights to the scratch on that device, perturbed or plain, so that the device holds one module at a time.

Module by module is right only if no weight is read outside the forward pass of its owner (torch's MultiheadAttention
reads `out_proj.weight` without calling `out_proj`). So the first perturbed forward pass runs under a dispatch mode that
sees every operator, and an operator that is handed the memory of an original weight raises ModelError. Parameters of a
module that is never called (an unused expert) are never handed to one, and are no error. A read that first happens in a
later pass is not seen.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn import Module

from fedtune.directions import Directions
from fedtune.errors import ModelError
from fedtune.layout import Layout, trainable
from fedtune.perturb.guard import Guard
from fedtune.perturb.live import LiveWeights
from fedtune.perturb.owners import Owner, Slot, everything, owners_of
from fedtune.perturb.together import Alone, Points, Together, TogetherPass

WHOLE_LIMIT = 1 << 26
"""Bytes of trainable weights up to which they are perturbed all at once: a copy of 64 MiB costs less than the hooks."""


class Perturbation:
    """Runs `model` at w + c z_k.

    >>> with perturbation.at(directions, k=3, c=5e-4):  # doctest: +SKIP
    ...     loss = model(**batch).loss

    Args:
        model: its trainable parameters must be those of `layout`, and stay on their device and in their dtype.
        layout: says which direction belongs to which parameter; tied parameters are one parameter.
        whole_limit: bytes of trainable weights up to which all are perturbed at once.
        device: where the model computes while its trainable weights stay where they are; None: where the weights are.

    Raises:
        ModelError: the model's trainable parameters are not those of the layout.
    """

    def __init__(
        self, model: Module, layout: Layout, whole_limit: int = WHOLE_LIMIT, device: torch.device | None = None
    ) -> None:
        named = trainable(model)
        if [(name, tuple(p.shape)) for name, p in named] != [(e.name, e.shape) for e in layout.entries]:
            raise ModelError("The model's trainable parameters are not those of the layout: make the layout from this model.")
        self._slots = [Slot(i, name, parameter) for i, (name, parameter) in enumerate(named)]
        self.device = None if device is None else torch.empty(0, device=device).device  # with its number
        self.live = LiveWeights([parameter for _, parameter in named], layout)
        self.whole = device is None and sum(slot.room for slot in self._slots) <= whole_limit
        self._owners = [everything(model, self._slots)] if self.whole else owners_of(model, self._slots)
        self._together = Together(model, self._slots, self.live)
        self._active: list[Owner] = []
        self._at: tuple[Directions, int, float] | None = None
        self._guard: Guard | None = None
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
        self._check_free()
        self._prepare()
        self._at = (directions, k, c)
        self._guard = None if self._checked else Guard(self._slots)
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

    def losses(self, directions: Directions, points: Points, alone: Alone, together: TogetherPass | None = None) -> list[float]:
        """The loss at w + c z_k for every (k, c) in `points`.

        Args:
            alone: runs the model once; called inside `at` for one point after another.
            together: runs the model once on that many copies of the batch, copy by copy along the first dimension, and
                returns their losses. Used where one pass is cheaper than several: for a family of thin directions, and
                where every pass brings the weights to the device. None: never. The first call for thin directions, and
                the first for others, finds out whether the losses are the same; if not, every call goes one by one.
        """
        self._check_free()
        ways = self._together
        if together is not None and self.may_run_together(directions) and ways.works(directions):
            self._prepare()
            found = ways.losses(directions, points, together)
            if ways.compared(directions):
                return found
            expected = [self._one(directions, k, c, alone) for k, c in points]
            ways.compare(directions, found, expected)
            return found if ways.works(directions) else expected
        return [self._one(directions, k, c, alone) for k, c in points]

    def may_run_together(self, directions: Directions) -> bool:
        """Whether one pass for several points can be cheaper than several passes."""
        return directions.family.thin or self.device is not None

    def compared(self, directions: Directions) -> bool:
        """Whether it is known if one pass for several points gives the losses of single passes (see `losses`)."""
        return self._together.compared(directions)

    def close(self) -> None:
        """Remove the hooks and free the scratch. The model is as if it had never been perturbed."""
        self._restore()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for owner in self._owners:
            owner.views = []

    def _one(self, directions: Directions, k: int, c: float, alone: Alone) -> float:
        with self.at(directions, k, c):
            return float(alone())

    def _check_free(self) -> None:
        if self._at is not None:
            raise ModelError("The model is perturbed already: leave the first `with` block before entering another.")
        if torch.is_inference_mode_enabled():
            raise ModelError("Perturbed passes swap parameters, which inference mode forbids: use torch.no_grad instead.")

    # ------------------------------------------------------------------ swapping

    def _hook(self, owner: Owner) -> list[Any]:
        enter = owner.module.register_forward_pre_hook(partial(self._before, owner))
        leave = owner.module.register_forward_hook(partial(self._after, owner), always_call=True)
        return [enter, leave]

    def _before(self, owner: Owner, *_: object) -> None:
        if self._at is None and self.device is None:
            return
        guard = self._guard or self._together.guard
        with guard.paused() if guard else nullcontext():
            if not owner.views:
                self._allocate()
            self._enter(owner)

    def _after(self, owner: Owner, *_: object) -> None:
        if self._at is not None or self.device is not None:
            self._leave(owner)

    def _enter(self, owner: Owner) -> None:
        """Point the owner's parameters at w + c z; those that point there already (tied, or re-entered) stay."""
        free = not any(owner.start < other.end and other.start < owner.end for other in self._active)
        self._active.append(owner)
        for slot, view in zip(owner.slots, owner.views, strict=True):
            slot.depth += 1
            if slot.depth == 1:
                target = view if free else torch.empty_like(view)
                if self._at is None:
                    target.copy_(self.live.current(slot.index, slot.weight), non_blocking=True)
                else:
                    self.live.perturb(slot.index, slot.weight, *self._at, target)
                slot.point_at(target)

    def _leave(self, owner: Owner) -> None:
        if owner in self._active:  # not if entering failed before it
            self._active.remove(owner)
        for slot in owner.slots:
            slot.depth = max(slot.depth - 1, 0)
            if slot.depth == 0:
                slot.point_back()

    def _restore(self) -> None:
        """Point every parameter at its weights again; needed where torch runs no hook (KeyboardInterrupt)."""
        self._active.clear()
        for slot in self._slots:
            slot.point_back()

    # ------------------------------------------------------------------ the scratch

    def _prepare(self) -> None:
        """Allocate the scratch on the first use; afterwards check that it still fits the parameters."""
        if not self._owners[0].views:
            self._allocate()
        for owner in self._owners:
            for slot, view in zip(owner.slots, owner.views, strict=True):
                if slot.weight.dtype != view.dtype or (self.device or slot.weight.device) != view.device:
                    raise ModelError(f"Parameter '{slot.name}' was moved or cast: make a new Perturbation for the model.")

    def _allocate(self) -> None:
        devices = {slot.index: self.device or slot.parameter.device for slot in self._slots}
        buffers = {d: torch.empty(self.scratch_bytes, dtype=torch.uint8, device=d) for d in set(devices.values())}
        for owner in self._owners:
            owner.allocate(buffers, [devices[slot.index] for slot in owner.slots])
