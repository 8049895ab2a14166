"""The weights that a client's local steps write: what a step is rounded to, and steps that wait for the next pass.

A zeroth-order step w += c z is not applied at once: it waits until the next perturbed forward pass reads the tensor
anyway, and both are done in one pass over its memory (`Directions.move_and_perturb`). Whoever reads weights in
another way calls `settle` first. The result is that of applying every step at once, to the bit.

Rules for 16-bit weights (float32 weights need none, and all rules are the same for them):

    nearest     w <- round(w + step); a step below half the spacing of a weight is lost
    stochastic  w <- one of the two neighbours of w + step, with E[w] = w + step; random bits from a named stream
    master      a float32 copy of the weights takes the steps, w <- round(copy); costs twice the weights in memory
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from fedtune.directions import Directions
from fedtune.layout import Layout
from fedtune.perturb.parts import Where, cuts
from fedtune.perturb.rounding import round_stochastically

RULES = ("nearest", "stochastic", "master")
PART = 1 << 22  # elements that are float32 at a time where a direction is added and rounded stochastically


@dataclass(frozen=True)
class _Step:
    """w += c z_k, for all tensors."""

    directions: Directions
    k: int
    c: float


class LiveWeights:
    """The trainable tensors of a model while a client works on them.

    Args:
        parameters: in layout order.
        layout: of them.
    """

    def __init__(self, parameters: Sequence[Parameter], layout: Layout) -> None:
        self.parameters, self.layout = tuple(parameters), layout
        self.begin()

    def begin(self, rule: str = "nearest", key: int = 0) -> None:
        """Forget what waits and go on from the weights as they are.

        Args:
            rule: one of RULES.
            key: of the stream of random bits for `stochastic`.
        """
        self.rule, self._key = rule, key
        self._waiting: list[_Step] = []
        self._taken = [0] * len(self.parameters)
        self._draws = [0] * len(self.parameters)
        wide = rule == "master" and any(parameter.dtype != torch.float32 for parameter in self.parameters)
        self._masters = [parameter.detach().float() for parameter in self.parameters] if wide else None

    # ------------------------------------------------------------------ steps along directions

    def move(self, directions: Directions, steps: Sequence[tuple[int, float]]) -> None:
        """w += sum of c z_k over the (k, c) in `steps`, in order, rounded after each; applied when it is needed.

        At once for a family whose directions are drawn as a whole.
        """
        self._waiting += [_Step(directions, k, c) for k, c in steps]
        if directions.family.whole:  # drawn seed by seed: two seeds in turn, tensor by tensor, would be drawn over and over
            self.settle()

    def settle(self) -> None:
        """Apply everything that waits."""
        with torch.no_grad():
            for index, parameter in enumerate(self.parameters):
                self._take(index, parameter.data, len(self._waiting))
        self._waiting.clear()
        self._taken = [0] * len(self.parameters)

    def perturb(self, index: int, weight: Tensor, directions: Directions, k: int, c: float, out: Tensor) -> None:
        """out = w + c z_k for tensor `index`, after the steps that wait for it; `weight` is its tensor."""
        waiting = len(self._waiting) - self._taken[index]
        if waiting and self._masters is None and (self.rule == "nearest" or weight.dtype == torch.float32):
            last = self._waiting[-1]
            if last.directions is directions and out.device == weight.device:
                self._take(index, weight, len(self._waiting) - 1)
                self._taken[index] += 1
                directions.move_and_perturb(index, weight, (last.k, last.c), out, (k, c))
                return
        if waiting:
            self._take(index, weight, len(self._waiting))
        source = weight if self._masters is None else self._masters[index]
        if source.device != out.device:
            source = out.copy_(source) if source.dtype == out.dtype else source.to(out.device)
        directions.perturb(index, source, out, k, c)

    def current(self, index: int, weight: Tensor) -> Tensor:
        """`weight`, the tensor of `index`, after the steps that wait for it."""
        self._take(index, weight, len(self._waiting))
        return weight

    # ------------------------------------------------------------------ other steps

    def value(self, index: int) -> Tensor:
        """Tensor `index` as the steps left it: the master copy where there is one. Not to be written."""
        return self.parameters[index].detach() if self._masters is None else self._masters[index]

    def change(self, index: int, move: Callable[[Where, Tensor], object]) -> None:
        """Tensor `index` as `move` leaves it, rounded by the rule.

        Args:
            index: of the tensor.
            move: called with each part of the tensor in turn, and the part in float32, which it changes in place.
        """
        weight = self.parameters[index].detach()
        source = weight if self._masters is None else self._masters[index]
        for offset, part in cuts(weight):
            wide = source[part].float()  # the memory itself where it is float32
            move(part, wide)
            self._round(index, weight[part], wide, offset)
        self._draws[index] += 1

    def write(self, index: int, make: Callable[[Tensor], object]) -> None:
        """Tensor `index` becomes what `make` writes to the tensor that it is given, rounded by the rule (not master)."""
        weight = self.parameters[index].detach()
        if self.rule != "stochastic" or weight.dtype == torch.float32:
            make(weight)
            return
        wide = torch.empty(weight.shape, device=weight.device)
        make(wide)
        for offset, part in cuts(weight):
            self._round(index, weight[part], wide[part], offset)
        self._draws[index] += 1

    # ------------------------------------------------------------------ rounding

    def _take(self, index: int, weight: Tensor, upto: int) -> None:
        """Apply the steps that wait for tensor `index`, up to number `upto`."""
        for step in self._waiting[self._taken[index] : upto]:
            if self._masters is not None:
                step.directions.perturb(index, self._masters[index], self._masters[index], step.k, step.c)
            elif self.rule == "stochastic" and weight.dtype != torch.float32:
                self._add_stochastically(index, weight, step)
            else:
                step.directions.perturb(index, weight, weight, step.k, step.c)
            self._draws[index] += 1
        if self._masters is not None and self._taken[index] < upto:
            weight.copy_(self._masters[index])
        self._taken[index] = max(upto, self._taken[index])

    def _add_stochastically(self, index: int, weight: Tensor, step: _Step) -> None:
        whole = step.directions.family.whole
        for offset, part in cuts(weight, weight.numel() if whole else PART):
            wide = weight[part].float()
            step.directions.perturb_part(index, offset, wide, wide, step.k, step.c)
            self._round(index, weight[part], wide, offset)

    def _round(self, index: int, out: Tensor, wide: Tensor, offset: int) -> None:
        if self.rule == "stochastic" and out.dtype != torch.float32:
            round_stochastically(out, wide, self.layout.entries[index].origin + offset, self._draws[index], self._key)
        elif out.data_ptr() != wide.data_ptr():
            out.copy_(wide)
