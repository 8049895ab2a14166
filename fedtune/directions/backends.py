"""What the engine asks of the code that does the arithmetic on a device: three operations on one tensor."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from fedtune.directions.base import F32, F64, Bools

Move = tuple[int, float]
"""(k, c): a step or a perturbation c z_k."""


class Backend(ABC):
    """The operations of a family on tensors of one shape, float32, bfloat16 or float16, with any strides.

    Every backend gives the values of `Family`; p0 is the position of a tensor's first element.
    """

    @abstractmethod
    def add(self, out: Tensor, base: Tensor, p0: int, k: int, c: float) -> None:
        """out = round(float32(base) + c * z_k); out may be base."""

    def move_and_add(self, weight: Tensor, out: Tensor, p0: int, move: Move, add: Move) -> None:
        """weight = round(weight + c1 z_k1), then out = round(weight + c2 z_k2); pairs are (k, c).

        A backend that can do both in one pass over the memory does so; the values are those of two calls of `add`.
        """
        self.add(weight, weight, p0, *move)
        self.add(out, weight, p0, *add)

    @abstractmethod
    def combine(self, out: Tensor, base: Tensor, p0: int, coefficients: F32) -> None:
        """out = round(float32(base) + sum_k coefficients[k] * z_k), coefficients float32 [K]; out may be base."""

    @abstractmethod
    def project(self, sums: F64, delta: Tensor, p0: int, wanted: Bools | None) -> None:
        """sums[k] += <z_k, delta> for every k that is `wanted` (bool [K]; None: all); sums is float64 [K]."""
