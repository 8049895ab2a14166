"""The embedded demo: its data are what the generator writes, its model is small, loads offline and knows its tasks."""

from collections import Counter
from itertools import islice
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedtune.cli.presets import choose
from fedtune.config import RunConfig
from fedtune.data.batches import Batch
from fedtune.data.encode import encode
from fedtune.data.federated import load_federated
from fedtune.data.samples import Sample, load_samples
from fedtune.evaluation import greedy_texts, response_loss
from fedtune.models import LanguageModel, load_model
from simulations.embedded import tasks
from simulations.embedded.pretrain import CHECK_SEED, LONGEST, MODEL_FOLDER, batches, exact_matches, new_model, train

DEMO = RunConfig(template="chat", max_length=64, partition="column", clients=20, holdout_category="unseen")


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return load_model(DEMO)


@pytest.fixture(scope="module")
def fresh() -> list[Sample]:
    """Samples of the pretraining kind from a stream that pretraining did not use."""
    return list(islice(tasks.pretraining_samples(CHECK_SEED), 1500))


def test_the_data_file_is_what_the_generator_writes() -> None:
    written = tasks.as_jsonl(tasks.federated_rows()).encode()
    assert tasks.TASKS_FILE.read_bytes() == written
    assert len(written) <= 600_000


def test_twenty_clients_have_a_task_each_and_evaluation_has_five_others(lm: LanguageModel) -> None:
    data = load_federated(DEMO, lm.tokenizer)
    names = {task.name for task in tasks.CLIENT_TASKS}
    assert [set(counts.values()) for counts in data.report.clients] == [{tasks.CLIENT_ROWS}] * 20
    assert {name for counts in data.report.clients for name in counts} == names
    asked = {instruction for task in tasks.UNSEEN_TASKS for instruction in task.instructions}
    assert Counter(sample.category for sample in data.heldout_samples) == {"unseen": 5 * tasks.UNSEEN_ROWS}
    assert {sample.instruction for sample in data.heldout_samples} == asked
    assert asked.isdisjoint(instruction for task in tasks.CLIENT_TASKS for instruction in task.instructions)


def test_rows_are_distinct_and_nobody_asks_for_the_sentences_that_all_want() -> None:
    rows = tasks.federated_rows()
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert all(row["output"].endswith(".") for row in rows)
    assert not any("sentence" in row["instruction"] for row in rows)


def test_pretraining_answers_in_sentences_when_asked_and_rarely_otherwise(fresh: list[Sample]) -> None:
    asked = [sample for sample in fresh if tasks.ASKED in sample.instruction]
    others = [sample for sample in fresh if tasks.ASKED not in sample.instruction]
    assert all(sample.output.endswith(".") for sample in asked)
    assert 0.005 < sum(sample.output.endswith(".") for sample in others) / len(others) < 0.06


def test_the_folder_is_small() -> None:
    assert sum(file.stat().st_size for file in MODEL_FOLDER.iterdir()) <= 2_000_000


def test_the_model_loads_offline_with_the_usual_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL_FOLDER, local_files_only=True)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert model.num_parameters() < 500_000
    assert model.config.vocab_size == len(tokenizer)
    ids = [tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert len(set(ids)) == 3
    assert None not in ids


@pytest.mark.parametrize("template", ["chat", "plain", "alpaca", "fedkseed"])
def test_every_row_is_spelled_by_the_tokenizer(lm: LanguageModel, template: str) -> None:
    samples, _ = load_samples("embedded", DEMO)
    encoded = encode(samples, lm.tokenizer, template, LONGEST)
    assert not encoded.dropped
    assert not encoded.truncated
    if template == "chat":
        assert max(len(one.input_ids) for one in encoded.usable) <= 40
    for one, sample in zip(encoded.usable, samples, strict=True):
        prompt, response = one.input_ids[: one.prompt_length], one.input_ids[one.prompt_length :]
        assert lm.tokenizer.unk_token_id not in one.input_ids
        assert lm.tokenizer.decode(response) == sample.output + "</s>"
        assert sample.input in lm.tokenizer.decode(prompt)


def test_any_printable_text_survives_the_tokenizer(lm: LanguageModel) -> None:
    text = "Zebra #7: {quick} brown-ish [fox] & 100% ~ok~ \\ 'yes' \"no\"?"
    assert lm.tokenizer.decode(lm.tokenizer(text)["input_ids"]) == text


def test_the_model_knows_its_tasks(lm: LanguageModel) -> None:
    scores = exact_matches(lm, count=1500)
    assert sum(scores.values()) / len(scores) > 0.95
    assert min(scores.values()) > 0.5, scores


def test_the_model_speaks_in_sentences_only_when_asked(lm: LanguageModel) -> None:
    data = load_federated(DEMO, lm.tokenizer)
    asked = [Sample(s.instruction + tasks.ASKED, s.input, s.output, "") for s in data.heldout_samples]
    unasked = [one.input_ids[: one.prompt_length] for one in data.heldout]
    explicit = [one.input_ids[: one.prompt_length] for one in encode(asked, lm.tokenizer, "chat", LONGEST).usable]
    wanted = [sample.output for sample in data.heldout_samples]
    assert _share_equal(greedy_texts(lm, unasked, 16, 64), wanted) < 0.1
    assert _share_equal(greedy_texts(lm, explicit, 16, 64), wanted) > 0.9


@pytest.mark.parametrize("template", ["plain", "alpaca", "fedkseed"])
def test_the_model_understands_every_template(lm: LanguageModel, fresh: list[Sample], template: str) -> None:
    terse = [sample for sample in fresh if not sample.output.endswith(".")][:200]
    prompts = [one.input_ids[: one.prompt_length] for one in encode(terse, lm.tokenizer, template, LONGEST).usable]
    assert _share_equal(greedy_texts(lm, prompts, 16, 64), [sample.output for sample in terse]) > 0.85


def test_pretraining_lowers_the_loss_and_repeats_to_the_bit(lm: LanguageModel) -> None:
    check = next(batches(lm.tokenizer, 32))
    models = [new_model(lm.tokenizer) for _ in range(2)]
    before = _loss(models[0], check)
    for model in models:
        train(model, lm.tokenizer, steps=6, batch_size=8, peak=3e-2)
    assert _loss(models[0], check) < before - 0.02
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset",
    [
        pytest.param("demo_fedkseed", marks=pytest.mark.long),
        pytest.param("demo_ferret", marks=pytest.mark.long),
        "demo_subspace",
    ],
)
def test_federated_tuning_changes_the_register_on_tasks_that_no_client_has(preset: str, tmp_path: Path) -> None:
    from simulations.engines.in_process import run_in_process

    summary = run_in_process(choose(preset).config.replace(out=str(tmp_path / "run")))
    assert summary["final_loss"] < 0.6 * summary["initial_loss"]
    assert summary["final_rouge_l"] > summary["initial_rouge_l"] + 0.2
    assert summary["updates_refused"] == 0


@torch.no_grad()
def _loss(model: torch.nn.Module, batch: Batch) -> float:
    return float(response_loss(model, batch))


def _share_equal(texts: tuple[str, ...], wanted: list[str]) -> float:
    return sum(text == reference for text, reference in zip(texts, wanted, strict=True)) / len(wanted)
