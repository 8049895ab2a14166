"""A client's first-order steps: the optimiser works inside the backward pass, so that gradients do not pile up.

As soon as the gradient of a tensor is complete, that tensor is updated and the gradient is freed: besides activations a
step needs the largest gradient and not all of them. Two settings need all gradients of a step at once, a copy of the
weights in size: `clip_norm` (the norm is that of all) and `accumulate` above 1 (gradients are summed over batches). And
where all of them are small, as those of adapters, they are gathered: a hook for each of hundreds costs more than it saves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.adamw import adamw

from fedtune.algorithms.base import LocalWork
from fedtune.config import RunConfig
from fedtune.perturb import LiveWeights, Where
from fedtune.progress import ClientStep, check_stop, emit

Move = Callable[[Where, Tensor], object]
"""Changes a part of a tensor, which it is given in float32."""

BETAS = (0.9, 0.999)  # AdamW's, its usual ones
EPSILON = 1e-8  # AdamW's
GATHERED = 16 << 20  # bytes of all gradients up to which they are gathered
FUSED = ("cpu", "cuda")  # devices where torch has AdamW in one pass over memory


class Optimizer:
    """`config.optimizer` without weight decay; its state is float32, begins at zero and is dropped with it.

    sgd:       w <- w - lr g
    momentum:  b <- local_momentum b + g,  w <- w - lr b
    adamw:     m <- 0.9 m + 0.1 g,  v <- 0.999 v + 0.001 g^2,  w <- w - lr m' / (sqrt(v') + 1e-8), m', v' without bias

    momentum and adamw do what torch.optim.SGD and AdamW do (adamw with weight_decay 0).
    """

    def __init__(self, config: RunConfig, live: LiveWeights) -> None:
        self.live = live
        self.rule, self.lr, self.momentum = config.optimizer, config.lr, config.local_momentum
        self._state: dict[int, tuple[Tensor, ...]] = {}
        self._steps: dict[int, int] = {}

    @torch.no_grad()
    def step(self, index: int, weight: Parameter, gradient: Tensor, scale: float = 1.0) -> None:
        """Move `weight`, tensor `index` of the model, once, with `scale` times `gradient`; rounded to its dtype once."""
        if self.rule == "sgd" and self.live.rule == "nearest":
            weight.add_(gradient, alpha=-self.lr * scale)  # in float32 and rounded once, without a float32 copy
            return
        moves = {"sgd": self._sgd, "momentum": self._momentum, "adamw": self._adamw}
        self.live.change(index, moves[self.rule](index, weight, gradient, scale))

    def _sgd(self, index: int, weight: Tensor, gradient: Tensor, scale: float) -> Move:
        return lambda part, wide: wide.add_(gradient[part], alpha=-self.lr * scale)

    def _momentum(self, index: int, weight: Tensor, gradient: Tensor, scale: float) -> Move:
        (velocities,) = self._zeros(index, weight, 1)

        def move(part: Where, wide: Tensor) -> None:
            velocity = velocities[part]
            velocity.mul_(self.momentum).add_(gradient[part], alpha=scale)
            wide.add_(velocity, alpha=-self.lr)

        return move

    def _adamw(self, index: int, weight: Tensor, gradient: Tensor, scale: float) -> Move:
        means, squares = self._zeros(index, weight, 2)
        done = self._steps.get(index, 0)
        self._steps[index] = done + 1
        count = torch.tensor(0.0, device=weight.device)
        fused = weight.device.type in FUSED

        def move(part: Where, wide: Tensor) -> None:
            now = gradient[part].float()
            if scale != 1.0:
                now = now * scale
            count.fill_(done)  # which torch adds 1 to
            adamw(
                [wide], [now], [means[part]], [squares[part]], [], [count],
                lr=self.lr, beta1=BETAS[0], beta2=BETAS[1], eps=EPSILON, weight_decay=0.0,
                amsgrad=False, maximize=False, fused=fused,
            )  # fmt: skip

        return move

    def _zeros(self, index: int, weight: Tensor, count: int) -> tuple[Tensor, ...]:
        if index not in self._state:
            self._state[index] = tuple(torch.zeros_like(weight, dtype=torch.float32) for _ in range(count))
        return self._state[index]


def gathers(config: RunConfig, size: int) -> bool:
    """Whether all gradients of a step are there at once; `size` is their bytes."""
    return config.accumulate > 1 or config.clip_norm > 0 or size <= GATHERED


def is_finite(gradient: Tensor) -> bool:
    """Whether all of it is, and the sum of its squares too; in one pass, without a copy in another dtype."""
    if gradient.dtype == torch.float16 and gradient.numel():  # a norm above 65,504 would not fit the dtype that it comes in
        return bool(torch.stack(torch.aminmax(gradient)).isfinite().all())
    return math.isfinite(float(torch.linalg.vector_norm(gradient)))


def descend(work: LocalWork, config: RunConfig) -> tuple[list[float], bool]:
    """T = `client_steps` steps on the weights: (the loss of each, whether all was finite)."""
    with FirstOrder(work, config) as steps:
        return repeated(work, config, steps.take)


def repeated(work: LocalWork, config: RunConfig, take: Callable[[], float | None]) -> tuple[list[float], bool]:
    """T = `client_steps` calls of `take`, a step that gives its loss, or None if something is not finite, which ends them.

    Returns (the loss of each step, whether all was finite). After the deadline no further step is begun.
    """
    losses: list[float] = []
    for step in range(config.client_steps):
        check_stop()
        if not work.in_time(step):
            break
        loss = take()
        if loss is None:
            return losses, False
        losses.append(loss)
        emit(ClientStep(work.client, step + 1, config.client_steps, loss))
    return losses, True


def backward(work: LocalWork, batches: int) -> float | None:
    """The mean loss over so many batches, whose gradients are added up; None if it is not finite."""
    total = 0.0
    for _ in range(batches):
        loss = work.loss(work.model, next(work.batches)) / batches
        total += float(loss.detach())
        if not math.isfinite(total):
            return None
        loss.backward()  # type: ignore[no-untyped-call]
    return total


@contextmanager
def each_gradient(weights: Sequence[Parameter], arrived: Callable[[int, Tensor], None] | None) -> Iterator[None]:
    """Inside the `with` block `arrived` takes each gradient (index, gradient) in the backward pass, when it is complete.

    That is when all uses of a tied tensor are in; it is the weight's no longer. None: gradients stay where they are. No
    weight has a gradient before or after the block.
    """
    handles: list[Any] = []

    def hand_over(index: int, weight: Parameter) -> None:
        gradient, weight.grad = weight.grad, None
        if gradient is not None and arrived is not None:
            arrived(index, gradient)

    for index, weight in enumerate(weights):
        weight.grad = None
        if arrived is not None:
            handles.append(weight.register_post_accumulate_grad_hook(partial(hand_over, index)))  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for weight in weights:
            weight.grad = None


class FirstOrder:
    """Takes the steps of a client on its own weights; hooks are there only inside the `with` block.

    >>> with FirstOrder(work, config) as steps:  # doctest: +SKIP
    ...     loss = steps.take()
    """

    def __init__(self, work: LocalWork, config: RunConfig) -> None:
        self.work, self.config = work, config
        self.optimizer = Optimizer(config, work.live)
        self.at_once = not gathers(config, sum(weight.numel() * weight.element_size() for weight in work.weights))
        self._finite = True
        self._gradients = each_gradient(work.weights, self._arrived if self.at_once else None)

    def __enter__(self) -> Self:
        self._gradients.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._gradients.__exit__(kind, error, trace)

    def take(self) -> float | None:
        """One step over `accumulate` batches: its mean loss, or None if a loss or gradient is not finite.

        A loss that is not finite leaves the weights as they were; so does a gradient, except that with `at_once` the
        tensors before it in the backward pass have moved. Do not go on after None.
        """
        loss = backward(self.work, self.config.accumulate)
        if loss is not None and not self.at_once:
            self._apply_all()
        return loss if self._finite else None

    def _arrived(self, index: int, gradient: Tensor) -> None:
        if self._finite:
            self._finite = is_finite(gradient)
            if self._finite:
                self.optimizer.step(index, self.work.weights[index], gradient)

    def _apply_all(self) -> None:
        gradients = [weight.grad for weight in self.work.weights if weight.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        self._finite = math.isfinite(norm)
        if not self._finite:
            return
        scale = min(1.0, self.config.clip_norm / norm) if self.config.clip_norm and norm else 1.0
        for index, weight in enumerate(self.work.weights):
            if weight.grad is not None:
                self.optimizer.step(index, weight, weight.grad, scale)
                weight.grad = None
