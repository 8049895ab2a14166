"""The logits of a few positions: never those of a whole batch, whose vocabulary can take more memory than the model.

    response_logits   of the positions that predict a batch's responses: what a training step needs, and its gradient
    token_losses      -log p of every label, without a gradient: the body runs once, the head on PIECE logits at a time

A head is more than its matrix (some models cap or scale what comes out of it), so it is run through the model's own `forward`,
whose body answers with hidden states that it has computed before. Whether that gives the model's own logits is checked in every
batch on the positions that the first pass had to compute anyway; a model for which it does not is run as it is, row by row.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedtune.data.batches import IGNORED, Batch

PIECE = 1 << 24
"""Logits at a time, 64 MiB of float32: 341 tokens of a vocabulary of 49,152, 110 of 152,064."""

_SAME = 1e-2  # of the largest logit: how far the rounding of two shapes of one product may be apart, in 16 bits


def response_logits(model: torch.nn.Module, batch: Batch) -> Tensor:
    """[B, T - first, vocabulary]: the logits that predict tokens first .. T-1, in the model's dtype."""
    keep = batch.input_ids.shape[1] - batch.first
    options = {"logits_to_keep": keep} if _can_keep(model) else {}
    logits: Tensor = model(input_ids=batch.inputs, use_cache=False, **options).logits
    return logits[:, -keep:]


@torch.no_grad()
def token_losses(model: torch.nn.Module, batch: Batch) -> Tensor:
    """float32 [labels]: -log p(label | what is before it) for every label of `batch`, row by row, left to right."""
    rows, columns = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # position t predicts the token at t + 1
    targets = batch.labels[rows, columns + 1]
    head = _Head.of(model, batch.inputs)
    if head is None:
        return torch.cat([_losses_of_row(model, batch, row) for row in range(len(batch.labels))])
    size = max(1, PIECE // _vocabulary(model))
    pieces = zip(torch.split(head.hidden[rows, columns], size), torch.split(targets, size), strict=True)
    return torch.cat([cross_entropy(head(states), wanted, reduction="none") for states, wanted in pieces])


def _losses_of_row(model: torch.nn.Module, batch: Batch, row: int) -> Tensor:
    """float32 [labels of the row]: from the logits of its response, all at once."""
    one = Batch(batch.input_ids[row : row + 1], batch.attention_mask[row : row + 1], batch.labels[row : row + 1])
    labels = one.targets != IGNORED
    return cross_entropy(response_logits(model, one)[0][labels].float(), one.targets[labels], reduction="none")


@dataclass(frozen=True)
class _Head:
    """What a causal model does after its body. `hidden` [B, T, width] is what the body gave, as a `kind` of output."""

    model: Any
    body: Any
    kind: Any
    hidden: Tensor

    @classmethod
    def of(cls, model: Any, inputs: Tensor) -> Self | None:
        """After one pass of the body over `inputs` [B, T]; None if what is made of its answer is not the model's own logits."""
        if not _can_keep(model):
            return None
        seen: list[tuple[Any, Any]] = []
        handles = [body.register_forward_hook(lambda body, _, output: seen.append((body, output))) for body in _bodies(model)]
        try:
            last = model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[:, -1].float()
        finally:
            for handle in handles:
                handle.remove()
        body, output = seen[-1] if seen else (None, None)  # the outermost ends last
        hidden = getattr(output, "last_hidden_state", None)
        if hidden is None or hidden.shape[:2] != inputs.shape:
            return None
        head = cls(model, body, type(output), hidden)
        return head if _close(head(hidden[:, -1]), last) else None

    def __call__(self, states: Tensor) -> Tensor:
        """float32 [n, vocabulary]: the logits after the hidden states [n, width]."""
        ids = torch.zeros((1, len(states)), dtype=torch.int64, device=states.device)
        with self._answering(states[None]):
            logits: Tensor = self.model(input_ids=ids, use_cache=False).logits[0]
        return logits.float()

    @contextmanager
    def _answering(self, states: Tensor) -> Iterator[None]:
        """Inside the `with` block the body computes nothing and answers with `states`."""
        own = self.body.__dict__.get("forward")
        self.body.forward = lambda *arguments, **options: self.kind(last_hidden_state=states)
        try:
            yield
        finally:
            if own is None:
                del self.body.forward
            else:
                self.body.forward = own


def _bodies(model: Any) -> list[Any]:
    """What may compute the hidden states: the base model, or the decoder in it."""
    base = getattr(model, "base_model", None)
    found = [base, getattr(base, "decoder", None)]
    return [body for body in found if isinstance(body, torch.nn.Module) and body is not model]


def _close(found: Tensor, expected: Tensor) -> bool:
    """Whether two computations of the same logits agree; NaN agrees with NaN, so that a diverged model is not hidden."""
    scale = expected.nan_to_num(0.0, 0.0, 0.0).abs().amax() * _SAME
    return bool(((found - expected).abs() <= scale).logical_or(~expected.isfinite() & ~found.isfinite()).all())


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _can_keep(model: Any) -> bool:
    kind: Any = type(model)
    return _keeps_logits(kind)


@cache
def _keeps_logits(kind: Any) -> bool:
    """Whether models of this class can leave out the logits of earlier positions."""
    return "logits_to_keep" in inspect.signature(kind.forward).parameters
