"""Finds weights that are read where they cannot be perturbed, by watching the operators of one forward pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from fedtune.errors import ModelError
from fedtune.perturb.owners import Slot


class Guard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises when an operator is handed the memory of an original weight while that weight should be perturbed."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.swapped = False
        self._paused = False
        self._ranges: dict[int, list[tuple[int, int, str]]] = {}
        for slot in slots:
            weight = slot.weight
            self._ranges.setdefault(weight.untyped_storage().data_ptr(), []).append((*_span(weight), slot.name))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Let the perturbation itself read the weights."""
        before, self._paused, self.swapped = self._paused, True, True
        try:
            yield
        finally:
            self._paused = before

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


def _span(tensor: Tensor) -> tuple[int, int]:
    """First address of a tensor's memory and the address behind its last element."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size() if tensor.numel() else start
