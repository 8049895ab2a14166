"""Several points w + c z in one forward pass, over a batch that holds one copy of the samples for each of them.

Thin directions (family lowrank) need no perturbed weights at all. For a matrix W with z = sum_j a_j b_j^T

    x (W + c z)^T = x W^T + c sum_j (x b_j) a_j^T

so a linear layer runs once on all copies and each copy's rows get a product of rank r added; an embedding likewise. A
module of another kind (norms, experts, embeddings with arithmetic of their own) is run on one copy after another, its
parameters pointed at w + c z of that copy. As in EGGROLL (arXiv 2511.16652), with the exact weights of any dtype.

Directions that are not thin are worked off copy by copy in every module: that pays where bringing a module's weights to
the device costs more than running it twice (as ZO2 does, arXiv 2503.12668).

A module that is run copy by copy must treat the first dimension of what it is given as the batch. The first time, for thin
directions and for others, the losses are compared with those of one pass for each point; where they differ, one pass for
each point it is from then on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Module
from torch.utils._pytree import tree_iter, tree_map
from transformers.pytorch_utils import Conv1D

from fedtune.directions import Directions
from fedtune.perturb.guard import Guard
from fedtune.perturb.live import LiveWeights
from fedtune.perturb.owners import Owner, Slot, owners_of, pointed
from fedtune.progress import Note, emit

Points = Sequence[tuple[int, float]]
"""Pairs (k, c): the points w + c z_k."""

Alone = Callable[[], Tensor]
TogetherPass = Callable[[int], Tensor]

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Nats that losses of the two ways may differ by: rounding of activations, and of w + c z to 16 bits in one of them."""


class Together:
    """Runs a model at several points in one pass.

    Attributes:
        guard: watches the first pass.
    """

    def __init__(self, model: Module, slots: list[Slot], live: LiveWeights) -> None:
        self._right: dict[bool, bool] = {}  # thin directions or others -> whether the losses were those of single passes
        self._slots, self._live = slots, live
        self._owners = owners_of(model, slots)
        self._inside = False
        self.guard: Guard | None = None

    def compared(self, directions: Directions) -> bool:
        """Whether losses along such directions were compared with those of single passes."""
        return directions.family.thin in self._right

    def works(self, directions: Directions) -> bool:
        """False once the losses along such directions differed."""
        return self._right.get(directions.family.thin, True)

    def losses(self, directions: Directions, points: Points, together: TogetherPass) -> list[float]:
        """The loss at each point. Raises ModelError for a weight that is read outside the module that owns it."""
        self._live.settle()
        self.guard = None if self.compared(directions) else Guard(self._slots)
        pass_ = _Pass(directions, points)
        try:
            with torch.no_grad(), self._wrapped(pass_), self.guard or nullcontext():
                return [float(loss) for loss in together(len(points))]
        finally:
            self.guard, self._inside = None, False

    def compare(self, directions: Directions, found: Sequence[float], expected: Sequence[float]) -> None:
        """Hold the losses of one pass against those of single passes."""
        allowed = max(TOLERANCE[slot.weight.dtype] for slot in self._slots)
        apart = [abs(one - other) / max(1.0, abs(other)) for one, other in zip(found, expected, strict=True)]
        right = self._right[directions.family.thin] = all(distance <= allowed for distance in apart)  # not where one is NaN
        if not right:
            emit(
                Note(
                    f"Several points in one pass give other losses than one by one (by {max(apart):.2g}), so this model is "
                    "evaluated one by one, more slowly.",
                    warning=True,
                )
            )

    # ------------------------------------------------------------------ modules

    @contextmanager
    def _wrapped(self, pass_: _Pass) -> Iterator[None]:
        """Inside the `with` block the owners' forward passes go through `_forward`."""
        with ExitStack() as stack:
            for owner in self._owners:
                attributes = owner.module.__dict__
                had, before = "forward" in attributes, owner.module.forward
                attributes["forward"] = partial(self._forward, owner, before, pass_)
                stack.callback(_put_back, attributes, before if had else None)
            yield

    def _forward(self, owner: Owner, forward: Callable[..., Any], pass_: _Pass, *args: Any, **kwargs: Any) -> Any:
        if self._inside:
            return self._at_copy(owner, forward, pass_, args, kwargs)
        with self.guard.paused() if self.guard else nullcontext():
            rule = thin_rule(owner) if pass_.directions.family.thin and pass_.holds_copies((args, kwargs)) else None
            if rule:
                return rule(owner, pass_, forward(*args, **kwargs), *args, *kwargs.values())
            return self._copy_by_copy(owner, forward, pass_, args, kwargs)

    def _copy_by_copy(self, owner: Owner, forward: Callable[..., Any], pass_: _Pass, args: Any, kwargs: Any) -> Any:
        """Each copy of the inputs through the module at that copy's point."""
        self._inside = True
        outputs = []
        try:
            for copy in range(len(pass_.points)):
                pass_.copy = copy
                outputs.append(self._at_copy(owner, forward, pass_, *pass_.part((args, kwargs))))
        finally:
            self._inside = False
        return _join(outputs, None if pass_.holds_copies((args, kwargs)) else pass_.rows)

    def _at_copy(self, owner: Owner, forward: Callable[..., Any], pass_: _Pass, args: Any, kwargs: Any) -> Any:
        """The module at the point of the copy in hand."""
        k, c = pass_.points[pass_.copy]
        targets = []
        with self.guard.paused() if self.guard else nullcontext():
            for slot in owner.slots:
                here = slot.parameter.data  # on the device where the module runs
                source = here if here.device != slot.weight.device else self._live.value(slot.index)
                targets.append(torch.empty_like(here))
                pass_.directions.perturb(slot.index, source, targets[-1], k, c)
        with pointed(owner.slots, targets):
            return forward(*args, **kwargs)


class _Pass:
    """One pass: its points, and the copy that is worked on where copies are worked on one by one."""

    def __init__(self, directions: Directions, points: Points) -> None:
        self.directions, self.points, self.copy = directions, points, 0
        self.rows = 0
        """Rows of one copy of the batch; known from the first module that sees the batch."""
        self._seeds = sorted({k for k, _ in points})
        self._which = [self._seeds.index(k) for k, _ in points]
        self._steps: dict[torch.device, Tensor] = {}

    def holds_copies(self, inputs: Any) -> bool:
        """Whether a module is given the copies, and not what they share (positions, say)."""
        return any(self._rows(value) for value in tree_iter(inputs))

    def part(self, inputs: Any) -> Any:
        """The rows of the copy in hand in all tensors that hold copies."""

        def cut(value: Any) -> Any:
            rows = self._rows(value)
            return value[self.copy * rows : (self.copy + 1) * rows] if rows else value

        return tree_map(cut, inputs)

    def _rows(self, value: Any) -> int:
        """Rows of each copy in a tensor that holds copies, else 0."""
        count = len(self.points)
        if not isinstance(value, Tensor) or value.dim() == 0 or value.shape[0] % (count * max(1, self.rows)):
            return 0
        self.rows = self.rows or value.shape[0] // count
        return value.shape[0] // count

    def factors(self, slot: Slot, like: Tensor) -> tuple[Tensor, Tensor]:
        """(c a_j) [copies, r, out] and b_j [copies, r, in] of a matrix for every copy, in the dtype of `like`."""
        family: Any = self.directions.family
        left, right = (self._each(part) for part in family.factors(slot.index, self._seeds, like.device))
        return (left * self._scales(like)).to(like.dtype), right.to(like.dtype)

    def vector(self, slot: Slot, like: Tensor) -> Tensor:
        """c z [copies, n] of a vector for every copy, in the dtype of `like`."""
        family: Any = self.directions.family
        found: Tensor = family.vector(slot.index, self._seeds, like.device)
        return (self._each(found) * self._scales(like)[:, 0]).to(like.dtype)

    def _each(self, of_seeds: Tensor) -> Tensor:
        """For every copy what its seed has."""
        if len(self._seeds) == 1:
            return of_seeds.expand(len(self.points), *of_seeds.shape[1:])
        return of_seeds.index_select(0, torch.tensor(self._which, device=of_seeds.device))

    def _scales(self, like: Tensor) -> Tensor:
        """float32 [copies, 1, 1]: the c of every copy."""
        if like.device not in self._steps:
            self._steps[like.device] = torch.tensor([c for _, c in self.points], device=like.device)[:, None, None]
        return self._steps[like.device]


# ---------------------------------------------------------------------------------------------------- thin directions

Rule = Callable[..., Any]


def thin_rule(owner: Owner) -> Rule | None:
    """How a module's output changes with thin directions of its parameters; None: only by running it at other weights."""
    module = owner.module
    if type(module) is nn.Linear or type(module) is Conv1D:
        return _linear
    if type(module) is nn.Embedding and module.max_norm is None:
        return _embedding
    return None


def _linear(owner: Owner, pass_: _Pass, output: Tensor, x: Tensor) -> Tensor:
    """x W^T + b (or x W + b, Conv1D) plus each copy's c (x b_j) a_j^T and c z_b, added in place."""
    copies, module = len(pass_.points), owner.module
    rows = output.view(copies, -1, output.shape[-1])
    inner, outer = [], []
    for slot in owner.slots:
        if slot.parameter.dim() == 1:
            inner.append(rows.new_ones(()).expand(copies, rows.shape[1], 1))
            outer.append(pass_.vector(slot, rows)[:, None, :])
        else:
            left, right = pass_.factors(slot, rows)
            a, b = (left, right) if type(module) is nn.Linear else (right, left)
            inner.append(torch.bmm(x.reshape(copies, -1, x.shape[-1]), b.transpose(1, 2)))
            outer.append(a)
    rows.baddbmm_(_joined(inner, 2), _joined(outer, 1))
    return output


def _embedding(owner: Owner, pass_: _Pass, output: Tensor, ids: Tensor) -> Tensor:
    """W[ids] plus each copy's c a_j[ids] b_j."""
    copies = len(pass_.points)
    rows, flat = output.view(copies, -1, output.shape[-1]), ids.reshape(copies, 1, -1)
    (slot,) = owner.slots
    left, right = pass_.factors(slot, rows)
    inner = torch.gather(left, 2, flat.expand(-1, left.shape[1], -1))
    rows.baddbmm_(inner.transpose(1, 2), right)
    return output


def _joined(parts: list[Tensor], dimension: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dimension)


def _join(outputs: list[Any], rows: int | None) -> Any:
    """The outputs of all copies as one, along the first dimension.

    `rows`: of a copy of the batch, if the module saw nothing of it: an output of one row then stands for all of them.
    """
    first = outputs[0]
    if isinstance(first, Tensor):
        if rows is not None and first.shape[0] == 1:
            outputs = [output.expand(rows, *output.shape[1:]) for output in outputs]
        return torch.cat(outputs) if first.dim() else first
    if isinstance(first, tuple | list):
        return type(first)(_join([output[i] for output in outputs], rows) for i in range(len(first)))
    return first


def _put_back(attributes: dict[str, Any], forward: Callable[..., Any] | None) -> None:
    if forward is None:
        attributes.pop("forward", None)
    else:
        attributes["forward"] = forward
