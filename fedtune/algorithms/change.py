"""What local steps did to the weights: w_end - w_start, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from fedtune.algorithms.base import LocalWork, Start
from fedtune.perturb import LiveWeights, cuts


class Change(Sequence[Tensor]):
    """delta = w_end - w_start in float32, computed tensor by tensor every time that it is asked for, and never kept."""

    def __init__(self, live: LiveWeights, start: Start) -> None:
        self.live, self.start = live, start

    @classmethod
    def of(cls, work: LocalWork) -> Self:
        """From the weights as they are now; they are copied if `work` cannot rebuild them."""
        return cls(work.live, work.start or _copies(work.weights))

    def __len__(self) -> int:
        return len(self.live.parameters)

    @torch.no_grad()
    def __getitem__(self, index: Any) -> Any:
        if index >= len(self):
            raise IndexError(index)
        return self.live.value(index).float() - self.start(index).float()

    def walk(self) -> Iterator[tuple[int, Tensor]]:
        """(index, delta) in order, the values of `self[index]`, each in memory that the next one takes over.

        Fresh memory for every tensor would cost more than the difference (see `cuts`).
        """
        memory: dict[tuple[torch.device, torch.dtype], Tensor] = {}
        for index, weight in enumerate(self.live.parameters):
            value = self.live.value(index)
            start, delta = (self._scratch(memory, weight, dtype) for dtype in (weight.dtype, torch.float32))
            with torch.no_grad():
                self.start(index, start)
                for _, part in cuts(value):
                    torch.sub(value[part].float(), start[part].float(), out=delta[part])
            yield index, delta

    def _scratch(self, memory: dict[tuple[torch.device, torch.dtype], Tensor], like: Tensor, dtype: torch.dtype) -> Tensor:
        """A tensor of the shape of `like`, the same memory for all of one device and dtype."""
        key = like.device, dtype
        if key not in memory:
            most = max(other.numel() for other in self.live.parameters if other.device == like.device)
            memory[key] = torch.empty(most, dtype=dtype, device=like.device)
        return memory[key][: like.numel()].view(like.shape)


def _copies(weights: Sequence[Tensor]) -> Start:
    kept = [weight.detach().clone() for weight in weights]

    def start(index: int, out: Tensor | None = None, /) -> Tensor:
        return kept[index] if out is None else out.copy_(kept[index])

    return start
