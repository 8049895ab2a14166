"""Batches: labels where the response is, padding nowhere else, each sample once per permutation."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from fedtune.data.batches import IGNORED, client_batches, collate
from fedtune.data.encode import Encoded
from fedtune.errors import EmptyClientError
from fedtune.seeds import Stream

SAMPLES = [Encoded((1, 5, 6, 7, 2), 3, 0), Encoded((1, 8, 9), 2, 1), Encoded((1, 4, 4, 4, 4, 2), 5, 2)]


def test_a_batch_is_padded_on_the_right_and_labelled_on_responses() -> None:
    batch = collate(SAMPLES[:2], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 5, 6, 7, 2], [1, 8, 9, 0, 0]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]
    assert batch.labels.tolist() == [[IGNORED, IGNORED, IGNORED, 7, 2], [IGNORED, IGNORED, 9, IGNORED, IGNORED]]
    assert {batch.input_ids.dtype, batch.attention_mask.dtype, batch.labels.dtype} == {torch.int64}


def test_inputs_and_targets_are_shifted_by_one_from_the_first_response_on() -> None:
    batch = collate(SAMPLES[:2], pad_id=0)
    assert batch.first == 2
    assert batch.inputs.tolist() == [[1, 5, 6, 7], [1, 8, 9, 0]]
    assert batch.targets.tolist() == [IGNORED, 7, 2, 9, IGNORED, IGNORED]


def test_the_first_response_is_also_found_from_the_labels() -> None:
    batch = collate(SAMPLES, pad_id=0)
    assert type(batch)(batch.input_ids, batch.attention_mask, batch.labels).first == batch.first == 2


def test_a_batch_moves_only_if_it_has_to() -> None:
    batch = collate(SAMPLES, pad_id=0)
    assert batch.to(torch.device("cpu")) is batch
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.device.type == "meta"
    assert moved.first == 2


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_every_sample_comes_once_in_each_permutation(batch_size: int) -> None:
    batches = islice(client_batches(SAMPLES, batch_size, Stream(0, "x"), 0), 3 * 20)
    seen = [
        tuple(ids[mask.bool()].tolist())
        for batch in batches
        for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
    ]
    assert len(seen) == 60 * batch_size
    everything = {sample.input_ids for sample in SAMPLES}
    assert all(set(seen[start : start + 3]) == everything for start in range(0, len(seen) - 2, 3))


def test_order_follows_the_stream_and_nothing_else() -> None:
    def order(seed: int) -> list[list[int]]:
        return [batch.input_ids[0].tolist() for batch in islice(client_batches(SAMPLES, 1, Stream(seed, "x"), 0), 30)]

    torch.manual_seed(1)
    first = order(0)
    torch.manual_seed(2)
    assert order(0) == first
    assert order(1) != first


def test_no_samples_no_batches() -> None:
    with pytest.raises(EmptyClientError, match=r"A client without samples cannot train: give it data"):
        client_batches([], 1, Stream(0, "x"), 0)
