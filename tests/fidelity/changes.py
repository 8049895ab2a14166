"""Changes of the weights that a test makes up, where a client's would be."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor


class Made(list[Tensor]):
    """As `fedtune.algorithms.change.Change`, of given tensors."""

    def walk(self) -> Iterator[tuple[int, Tensor]]:
        """(index, delta) in order."""
        return iter(enumerate(self))
