"""What local steps did to the weights: w_end - w_start, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Self

import torch

from fedtune.algorithms.base import LocalWork
from fedtune.perturb import LiveWeights


class Change(Sequence[torch.Tensor]):
    """delta = w_end - w_start in float32, computed tensor by tensor every time that it is asked for, and never kept."""

    def __init__(self, live: LiveWeights, start: Callable[[int], torch.Tensor]) -> None:
        self.live, self.start = live, start

    @classmethod
    def of(cls, work: LocalWork) -> Self:
        """From the weights as they are now; they are copied if `work` cannot rebuild them."""
        return cls(work.live, work.start or [weight.detach().clone() for weight in work.weights].__getitem__)

    def __len__(self) -> int:
        return len(self.live.parameters)

    @torch.no_grad()
    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return self.live.value(index).float() - self.start(index).float()
