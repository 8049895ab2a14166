"""Losses from a head that runs in pieces: those of the whole, for every architecture, and never with the logits of a batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fedtune import logits
from fedtune.data.batches import IGNORED, Batch, collate
from fedtune.logits import response_logits, token_losses
from tests.test_evaluation import ARCHITECTURES, SMALL, random_samples

CAPPED = {"final_logit_softcapping": 3.0, "sliding_window": 8, "query_pre_attn_scalar": 8}
ALL: dict[str, dict[str, Any]] = {
    **ARCHITECTURES,
    "gemma2": {**SMALL, **CAPPED},
    "cohere": {**SMALL, "logit_scale": 0.5},
    "granite": {**SMALL, "logits_scaling": 4.0},
}


def model_of(kind: str, **changes: Any) -> Any:
    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **ALL[kind], **changes}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)  # logits that a wrong cap or scale would show in
    return model


@torch.no_grad()
def whole(model: Any, batch: Batch) -> torch.Tensor:
    """The oracle: all logits of the batch at once."""
    found = model(batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].double()
    labels = batch.labels[:, 1:]
    return cross_entropy(found[labels != IGNORED], labels[labels != IGNORED], reduction="none")


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("piece", [1, 61 * 3, logits.PIECE])
def test_pieces_are_the_whole(kind: str, piece: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logits, "PIECE", piece)
    model, batch = model_of(kind), collate(random_samples(5), pad_id=0)
    torch.testing.assert_close(token_losses(model, batch).double(), whole(model, batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ALL)
def test_every_architecture_runs_its_head_in_pieces(kind: str) -> None:
    model, batch = model_of(kind), collate(random_samples(2), pad_id=0)
    assert logits._Head.of(model, batch.inputs) is not None
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_model_that_does_something_else_around_its_body_is_run_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = model_of("llama"), collate(random_samples(4), pad_id=0)
    forward = model.forward

    def odd(input_ids: Any, logits_to_keep: int = 0, **options: Any) -> Any:
        """Logits that depend on the tokens besides the hidden states."""
        found = forward(input_ids=input_ids, logits_to_keep=logits_to_keep, **options)
        found.logits = found.logits + input_ids.float().mean()
        found.logits[..., 0] += input_ids.float().sum()
        return found

    monkeypatch.setattr(model, "forward", odd)
    assert logits._Head.of(model, batch.inputs) is None
    expected = []
    for row in range(4):  # one by one, since padding enters this model's logits
        one = Batch(*(tensor[row : row + 1] for tensor in (batch.input_ids, batch.attention_mask, batch.labels)))
        labels = one.targets != IGNORED
        expected.append(cross_entropy(response_logits(model, one)[0][labels], one.targets[labels], reduction="none"))
    torch.testing.assert_close(token_losses(model, batch), torch.cat(expected).detach())


def test_a_diverged_model_is_not_hidden() -> None:
    model, batch = model_of("llama"), collate(random_samples(3), pad_id=0)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert not torch.isfinite(token_losses(model, batch)).any()


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation returned, in elements."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        found = function(*arguments, **(options or {}))
        for tensor in found if isinstance(found, tuple | list) else (found,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return found


def test_logits_of_a_large_vocabulary_are_never_there_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    vocabulary = 150_000
    monkeypatch.setattr(logits, "PIECE", 20 * vocabulary)
    config = LlamaConfig(**{**SMALL, "vocab_size": vocabulary, "hidden_size": 4, "head_dim": 2, "tie_word_embeddings": True})
    model: Any = LlamaForCausalLM(config).eval()
    batch = collate(random_samples(8), pad_id=0)
    with Largest() as largest:
        token_losses(model, batch)
    assert largest.elements == 20 * vocabulary
    assert (batch.labels != IGNORED).sum() > 60
