"""The logits of a few positions: never those of a whole batch, whose vocabulary can take more memory than the model.

    response_logits   of the positions that predict a batch's responses: what a training step needs, and its gradient
    token_losses      -log p of every label, and of other tokens in their place, without a gradient: the body runs once, the
                      head on PIECE logits at a time

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
    return _last_logits(model, batch.inputs, batch.input_ids.shape[1] - batch.first)


def _last_logits(model: torch.nn.Module, inputs: Tensor, keep: int) -> Tensor:
    options = {"logits_to_keep": keep} if _can_keep(model) else {}
    logits: Tensor = model(input_ids=inputs, use_cache=False, **options).logits
    return logits[:, -keep:]


@dataclass(frozen=True)
class Asked:
    """Tokens whose losses are wanted: int64 [n] each. Token `targets` is the one after position `columns` of `rows`."""

    rows: Tensor
    columns: Tensor
    targets: Tensor

    @classmethod
    def labels(cls, batch: Batch) -> Self:
        """Every label of `batch`, row by row, left to right."""
        rows, columns = (batch.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)  # position t predicts the token at t + 1
        return cls(rows, columns, batch.labels[rows, columns + 1])

    def and_also(self, more: Asked) -> Asked:
        """These, and then `more`."""
        return Asked(*(torch.cat([getattr(self, key), getattr(more, key)]) for key in ("rows", "columns", "targets")))


@torch.no_grad()
def token_losses(model: torch.nn.Module, batch: Batch, more: Asked | None = None) -> Tensor:
    """float32 [labels]: -log p(label | what is before it) for every label of `batch`, row by row, left to right.

    With `more` those of its tokens follow, in its order; they change nothing in the losses of the labels.
    """
    asked = [Asked.labels(batch), *([more] if more else [])]
    head = _Head.of(model, batch.inputs)
    if head is None:
        return _row_by_row(model, batch.inputs, asked[0].and_also(asked[1]) if more else asked[0])
    size = max(1, PIECE // _vocabulary(model))
    return torch.cat([losses for one in asked for losses in head.losses(one, size)])


def _row_by_row(model: torch.nn.Module, inputs: Tensor, asked: Asked) -> Tensor:
    """float32 [n]: from the logits of one row at a time, all that it needs at once."""
    losses = torch.empty(len(asked.rows), device=inputs.device)
    for row in sorted(set(asked.rows.tolist())):
        here = asked.rows == row
        columns = asked.columns[here]
        first = int(columns.min())
        logits = _last_logits(model, inputs[row : row + 1], inputs.shape[1] - first)[0]
        losses[here] = cross_entropy(logits[columns - first].float(), asked.targets[here], reduction="none")
    return losses


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

    def losses(self, asked: Asked, size: int) -> Iterator[Tensor]:
        """float32 [n] in pieces of `size`."""
        for at in range(0, len(asked.rows), size):
            rows, columns, targets = (part[at : at + size] for part in (asked.rows, asked.columns, asked.targets))
            yield cross_entropy(self(self.hidden[rows, columns]), targets, reduction="none")

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
