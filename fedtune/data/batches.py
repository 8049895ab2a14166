"""Batches of tokens for training: a client's samples in a random order that everyone can repeat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from fedtune.data.encode import Encoded
from fedtune.errors import EmptyClientError
from fedtune.seeds import Stream

IGNORED = -100
"""The label of tokens that are not trained on (the convention of torch's cross entropy)."""


@dataclass(frozen=True)
class Batch:
    """B samples padded on the right to T tokens.

    input_ids, attention_mask (1 for a token, 0 for padding) and labels (-100 outside the response): int64 [B, T].
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor

    @cached_property
    def first(self) -> int:
        """The first position with a label in any sample, at least 1: what comes before it needs no logits."""
        columns = (self.labels != IGNORED).any(dim=0).nonzero()
        return max(1, int(columns[0]) if len(columns) else self.labels.shape[1] - 1)

    @cached_property
    def inputs(self) -> torch.Tensor:
        """int64 [B, T - 1]: what the model reads. The last token is only predicted, never read."""
        return self.input_ids[:, :-1]

    @cached_property
    def targets(self) -> torch.Tensor:
        """int64 [B * (T - first)]: the labels that the last T - first positions of `inputs` predict, row by row."""
        return self.labels[:, self.first :].reshape(-1)

    def repeat(self, copies: int) -> Batch:
        """So many copies of the batch as one, one after another."""
        repeated = Batch(*(tensor.repeat(copies, 1) for tensor in (self.input_ids, self.attention_mask, self.labels)))
        repeated.__dict__["first"] = self.first
        return repeated

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`, without a copy if it is there already."""
        if self.input_ids.device == device:
            return self
        moved = Batch(*(tensor.to(device, non_blocking=True) for tensor in (self.input_ids, self.attention_mask, self.labels)))
        moved.__dict__["first"] = self.first  # found on the CPU, so that no device has to be waited for
        return moved


def collate(samples: Sequence[Encoded], pad_id: int) -> Batch:
    """One batch of `samples` in their order."""
    length = max(len(sample.input_ids) for sample in samples)
    ids, mask, labels = [], [], []
    for sample in samples:
        gap = length - len(sample.input_ids)
        ids.append([*sample.input_ids, *(pad_id,) * gap])
        mask.append([1] * len(sample.input_ids) + [0] * gap)
        labels.append([IGNORED] * sample.prompt_length + [*sample.input_ids[sample.prompt_length :]] + [IGNORED] * gap)
    batch = Batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(labels))
    batch.__dict__["first"] = max(1, min(sample.prompt_length for sample in samples))
    return batch


def client_batches(encoded: Sequence[Encoded], batch_size: int, stream: Stream, pad_id: int) -> Iterator[Batch]:
    """Batches without end, each of `batch_size` samples, drawn from one permutation after another.

    A batch may span two permutations; every sample comes once in each, so no sample is favoured.

    Raises:
        EmptyClientError: there is no sample to draw from.
    """
    if not encoded:
        raise EmptyClientError("A client without samples cannot train: give it data, or lower the number of clients.")
    return _endless(encoded, batch_size, stream, pad_id)


def _endless(encoded: Sequence[Encoded], batch_size: int, stream: Stream, pad_id: int) -> Iterator[Batch]:
    order: list[int] = []
    while True:
        while len(order) < batch_size:
            order += stream.permutation(len(encoded)).tolist()
        chosen, order = order[:batch_size], order[batch_size:]
        yield collate([encoded[index] for index in chosen], pad_id)
