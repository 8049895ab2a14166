"""The training loss against transformers' own, evaluation's independence of batching, and honest reports of divergence."""

from __future__ import annotations

import dataclasses
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fedtune.config import RunConfig
from fedtune.data.batches import collate
from fedtune.data.encode import Encoded
from fedtune.data.federated import FederatedData, load_federated
from fedtune.data.samples import Sample
from fedtune.errors import Interrupted
from fedtune.evaluation import Evaluation, evaluate, generate, greedy_texts, in_turn, response_loss
from fedtune.logits import response_logits
from fedtune.models import LanguageModel, load_model
from fedtune.progress import EvaluationStep, Event, clear_stop, listening, request_stop
from fedtune.seeds import Stream

SMALL = {
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "qwen3": SMALL,
    "mistral": {**SMALL, "sliding_window": 8},
    "mixtral": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {**SMALL, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt2": {"vocab_size": 61, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64},
    "gpt_neox": {**SMALL, "num_attention_heads": 2},
    "opt": {**SMALL, "ffn_dim": 24, "word_embed_proj_dim": 16, "dropout": 0.0},
}


def random_samples(count: int, vocabulary: int = 61, seed: int = 0) -> list[Encoded]:
    """Samples of 4 to 40 tokens whose prompts and responses have at least one token."""
    stream = Stream(seed, "samples")
    samples = []
    for row in range(count):
        length = 4 + int(stream.below(37, 1)[0])
        prompt = 1 + int(stream.below(length - 1, 1)[0])
        samples.append(Encoded(tuple(int(token) for token in stream.below(vocabulary - 3, length) + 3), prompt, row))
    return samples


@pytest.fixture(params=ARCHITECTURES)
def architecture(request: pytest.FixtureRequest, tiny_lm: LanguageModel) -> LanguageModel:
    settings = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **ARCHITECTURES[request.param]}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(request.param, **settings)).eval()
    return dataclasses.replace(tiny_lm, model=model)


@torch.no_grad()
def test_the_loss_is_that_of_transformers_for_every_architecture(architecture: LanguageModel) -> None:
    for sample in random_samples(4):
        batch = collate([sample], pad_id=0)
        expected = architecture.model(batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels).loss
        assert float(response_loss(architecture.model, batch)) == pytest.approx(float(expected), abs=2e-6)


def test_padding_changes_no_loss_for_any_architecture(architecture: LanguageModel) -> None:
    samples = random_samples(12)
    alone = evaluate(architecture, samples, batch_size=1)
    for batch_size in (2, 5, 12):
        together = evaluate(architecture, samples, batch_size)
        assert together.loss == pytest.approx(alone.loss, abs=1e-6)
        assert together.loss_sample_mean == pytest.approx(alone.loss_sample_mean, abs=1e-6)
    assert (alone.tokens, alone.samples) == (sum(sample.response_length for sample in samples), 12)


def test_the_loss_of_a_batch_is_the_mean_over_its_response_tokens(tiny_lm: LanguageModel) -> None:
    samples = random_samples(5, vocabulary=259)
    with torch.no_grad():
        losses = [float(response_loss(tiny_lm.model, collate([sample], 0))) for sample in samples]
        whole = float(response_loss(tiny_lm.model, collate(samples, 0)))
    tokens = [sample.response_length for sample in samples]
    assert whole == pytest.approx(sum(map(math.prod, zip(losses, tokens, strict=True))) / sum(tokens), abs=1e-6)


def test_gradients_are_those_of_transformers(tiny_lm: LanguageModel) -> None:
    batch = collate(random_samples(1, vocabulary=259), 0)
    model: Any = tiny_lm.model
    expected = torch.autograd.grad(model(batch.input_ids, labels=batch.labels).loss, list(model.parameters()))
    found = torch.autograd.grad(response_loss(model, batch), list(model.parameters()))
    for gradient, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, reference, rtol=1e-4, atol=1e-7)


def test_logits_are_only_those_that_predict_responses(tiny_lm: LanguageModel) -> None:
    batch = collate([Encoded((1, 5, 6, 7, 8, 2), 4, 0)], 0)
    logits = response_logits(tiny_lm.model, batch)
    whole = tiny_lm.model(batch.input_ids).logits
    assert logits.shape == (1, 2, 259)
    torch.testing.assert_close(logits, whole[:, 3:5])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_loss_is_float32_whatever_the_weights_are(tiny_folder: Path, dtype: str) -> None:
    lm = load_model(RunConfig.from_mapping({"model": str(tiny_folder), "dtype": dtype, "device": "cpu"}))
    loss = response_loss(lm.model, collate(random_samples(1, vocabulary=259), 0))
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)


def test_evaluation_weighs_tokens_and_samples_apart(tiny_lm: LanguageModel) -> None:
    samples = random_samples(6, vocabulary=259)
    with torch.no_grad():
        losses = [float(response_loss(tiny_lm.model, collate([sample], 0))) for sample in samples]
    tokens = [sample.response_length for sample in samples]
    result = evaluate(tiny_lm, samples, 4)
    by_token = sum(map(math.prod, zip(losses, tokens, strict=True))) / sum(tokens)
    assert result.loss == pytest.approx(by_token, abs=1e-6)
    assert result.perplexity == pytest.approx(math.exp(by_token), rel=1e-6)
    assert result.loss_sample_mean == pytest.approx(sum(losses) / 6, abs=1e-6)
    assert result.finite


def test_the_order_of_samples_changes_nothing(tiny_lm: LanguageModel) -> None:
    samples = random_samples(9, vocabulary=259)
    assert evaluate(tiny_lm, samples[::-1], 1) == evaluate(tiny_lm, samples, 1)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_diverged_model_is_reported_as_such(tiny_lm: LanguageModel, poison: float) -> None:
    rare = 77
    with torch.no_grad():
        tiny_lm.model.get_input_embeddings().weight[rare] = poison
    samples = [*random_samples(3, vocabulary=60), Encoded((1, rare, 5, 2), 2, 3)]
    result = evaluate(tiny_lm, samples, 2)
    assert not result.finite
    assert math.isnan(result.loss)
    assert math.isnan(result.perplexity)
    assert math.isnan(result.loss_sample_mean)
    assert (result.samples, result.tokens) == (4, sum(sample.response_length for sample in samples))


def test_perplexity_beyond_floating_point_is_infinite(tiny_lm: LanguageModel) -> None:
    with torch.no_grad():
        tiny_lm.model.model.norm.weight.fill_(1e6)
    result = evaluate(tiny_lm, random_samples(3, vocabulary=259), 2)
    assert result.finite
    assert result.loss > 1000
    assert result.perplexity == math.inf


def test_evaluation_reports_progress_and_stops_between_batches(tiny_lm: LanguageModel) -> None:
    seen: list[Event] = []
    with listening(seen.append):
        evaluate(tiny_lm, random_samples(5, vocabulary=259), 2)
    assert seen == [EvaluationStep("loss", done, 5) for done in (0, 2, 4, 5)]
    request_stop()
    try:
        with pytest.raises(Interrupted):
            evaluate(tiny_lm, random_samples(5, vocabulary=259), 2)
    finally:
        clear_stop()


def test_an_empty_evaluation_is_refused(tiny_lm: LanguageModel) -> None:
    with pytest.raises(ValueError, match="at least one held-out sample"):
        evaluate(tiny_lm, [], 2)
    with pytest.raises(ValueError, match="at least one held-out sample"):
        generate(tiny_lm, [], [], RunConfig())


# ------------------------------------------------------------------ generation


def echo_lm(lm: LanguageModel) -> LanguageModel:
    """The tiny model changed so that token t is followed by t + 1 up to 12, then by the end of text (2)."""
    model: Any = lm.model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1.0)
        rows, width = model.get_input_embeddings().weight.shape
        embeddings = torch.zeros(rows, width)
        embeddings[:13, :13] = torch.eye(13)
        model.get_input_embeddings().weight.copy_(embeddings)
        head = torch.zeros(rows, width)
        for token in range(3, 12):
            head[token + 1, token] = 1.0
        head[2, 12] = 1.0
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(head)
    return lm


def test_greedy_responses_stop_at_the_end_and_leave_out_the_prompt(tiny_lm: LanguageModel) -> None:
    lm = echo_lm(tiny_lm)
    spell = lm.tokenizer.decode
    prompts = [(1, 10), (1, 3, 4, 5), (1, 5, 11), (1, 12)]
    assert greedy_texts(lm, prompts, 6, 4) == (spell([11, 12]), spell([6, 7, 8, 9, 10, 11]), spell([12]), "")


def test_generation_scores_responses_against_the_texts(tiny_lm: LanguageModel) -> None:
    lm = echo_lm(tiny_lm)
    texts = [lm.tokenizer.decode([11, 12]), lm.tokenizer.decode([12])]
    heldout = [Encoded((1, 10, 9), 2, 0), Encoded((1, 11, 9), 2, 1), Encoded((1, 11, 9), 2, 2)]
    samples = [Sample("", "", text, "") for text in (f" {texts[0]}\n", "something else", "not used")]
    result = generate(lm, heldout, samples, RunConfig(generate_samples=2, eval_batch_size=2))
    assert result.texts == tuple(texts)
    assert (result.samples, result.exact_match) == (2, 0.5)
    assert result.rouge_l_papers == pytest.approx(0.5)
    assert 0.0 <= result.rouge_l <= 1.0


def test_prompts_are_taken_from_each_category_in_turn(tiny_lm: LanguageModel) -> None:
    """A file that is sorted by category does not have its responses judged by the first one alone."""
    assert in_turn(["a", "a", "a", "b", "c", "c"], 4) == [0, 1, 3, 4]
    assert in_turn(["a", "b"], 5) == [0, 1]
    assert in_turn([""] * 4, 2) == [0, 1]
    lm = echo_lm(tiny_lm)
    heldout = [Encoded((1, 10 + number // 2, 9), 2, number) for number in range(4)]
    samples = [Sample("q", "", str(number), "ab"[number // 2]) for number in range(4)]
    result = generate(lm, heldout, samples, RunConfig(generate_samples=2))
    assert (result.references, result.categories) == (("0", "2"), ("a", "b"))
    assert result.texts == (lm.tokenizer.decode([11, 12]), lm.tokenizer.decode([12]))


def test_the_models_own_sampling_settings_do_not_touch_greedy_texts(tiny_lm: LanguageModel) -> None:
    prompts = [sample.input_ids[: sample.prompt_length] for sample in random_samples(4, vocabulary=259)]
    plain = greedy_texts(tiny_lm, prompts, 12, 2)
    own: Any = tiny_lm.model.generation_config
    own.do_sample, own.temperature, own.repetition_penalty = True, 2.0, 3.0
    assert greedy_texts(tiny_lm, prompts, 12, 2) == plain
    assert tiny_lm.model.generation_config is own


def test_responses_end_where_the_models_positions_end(tiny_lm: LanguageModel) -> None:
    tiny_lm.model.config.max_position_embeddings = 16
    events: list[Event] = []
    with listening(events.append):
        texts = greedy_texts(echo_lm(tiny_lm), [(1, 3), (1,) * 11 + (3, 4), (1, 4)], 8, 2)
    decode = tiny_lm.tokenizer.decode
    assert texts == (decode(range(4, 12)), decode([5, 6, 7]), decode(range(5, 13)))
    assert [event.done for event in events if isinstance(event, EvaluationStep)] == [0, 2, 3]


# ------------------------------------------------------------------ a real model


@pytest.fixture(scope="module")
def dolly(shared: Path) -> tuple[LanguageModel, FederatedData]:
    config = RunConfig(
        model=str(shared / "models" / "stories260K"),
        data=str(shared / "data" / "dolly_parity.jsonl"),
        template="fedkseed",
        max_length=256,
        partition="dirichlet",
        holdout_category="open_qa",
        device="cpu",
        threads=1,
    )
    lm = load_model(config)
    return lm, load_federated(config, lm.tokenizer)


def test_the_base_models_loss_is_that_of_the_official_code(dolly: tuple[LanguageModel, FederatedData], shared: Path) -> None:
    recorded = json.loads((shared / "reference" / "fedkseed_official.json").read_text())["eval_curve"][0]
    lm, data = dolly
    results: list[Evaluation] = [evaluate(lm, data.heldout, batch_size) for batch_size in (16, 5)]
    assert results[0].loss_sample_mean == pytest.approx(recorded, abs=1e-4)
    for one, other in pairwise(results):
        assert one.loss == pytest.approx(other.loss, abs=1e-6)


def test_batches_do_not_change_generated_texts(dolly: tuple[LanguageModel, FederatedData]) -> None:
    lm, data = dolly
    prompts = [sample.input_ids[: sample.prompt_length] for sample in data.heldout[:5]]
    assert greedy_texts(lm, prompts, 16, 3) == greedy_texts(lm, prompts, 16, 1)
