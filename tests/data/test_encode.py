"""Templates word for word, which tokens are trained on, and why rows are dropped."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

from fedtune.data.encode import NO_INSTRUCTION, NO_RESPONSE, PROMPT_TOO_LONG, encode
from fedtune.data.samples import Sample
from fedtune.data.templates import renderer
from fedtune.errors import DataError
from fedtune.models import LanguageModel

ALONE = Sample("Name a colour.", "", "red", "")
PAIRED = Sample("Name one.", "red, green", "red", "")
CHAT = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture
def tokenizer(tiny_lm: LanguageModel) -> Any:
    return tiny_lm.tokenizer


@pytest.mark.parametrize(
    ("template", "alone", "paired"),
    [
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nName a colour.\n\n### Response:",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nName one.\n\n### Input:\nred, green\n\n### Response:",
        ),
        (
            "fedkseed",
            "Below is an instruction that describes a task. Write a response for the task request.\n\n"
            "### Instruction:\nName a colour.\n\n### Response:",
            "Below is an instruction that describes a task, paired with an input that provides further context. "
            "Write a response for the task request.\n\n"
            "### Instruction:\nName one.\n\n### Input:\nred, green\n\n### Response:",
        ),
        ("plain", "Name a colour.\n", "Name one.\nred, green\n"),
    ],
)
def test_the_wording_of_the_templates(tokenizer: Any, template: str, alone: str, paired: str) -> None:
    render = renderer(template, tokenizer)
    assert (render(ALONE).prompt, render(ALONE).response) == (alone, "red</s>")
    assert (render(PAIRED).prompt, render(PAIRED).response) == (paired, "red</s>")


def test_braces_in_the_data_are_text(tokenizer: Any) -> None:
    sample = Sample("Write {instruction} {0}", "{x}", "{y}", "")
    assert "Write {instruction} {0}\n\n### Input:\n{x}" in renderer("alpaca", tokenizer)(sample).prompt


def test_chat_uses_the_tokenizers_template_without_adding_special_tokens_twice(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = CHAT
    (sample,) = encode([PAIRED], tokenizer, "chat", 200).usable
    prompt, response = sample.input_ids[: sample.prompt_length], sample.input_ids[sample.prompt_length :]
    assert tokenizer.decode(prompt) == "<s>user: Name one.\n\nred, green</s>\n<s>assistant: "
    assert tokenizer.decode(response) == "red</s>"


def test_a_chat_template_that_rewrites_the_last_turn_still_gives_a_response(tokenizer: Any) -> None:
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = "{{ messages | length }}{% if add_generation_prompt %} answer:{% endif %}"
    rendered = renderer("chat", tokenizer)(ALONE)
    assert (rendered.prompt, rendered.response) == ("1 answer:", "red</s>")


def test_chat_without_a_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r'template = "chat" needs a chat template, which this tokenizer lacks: use alpaca'):
        renderer("chat", tokenizer)


def test_only_response_and_end_are_trained_on(tokenizer: Any) -> None:
    (sample,) = encode([ALONE], tokenizer, "plain", 200).usable
    assert tokenizer.decode(sample.input_ids) == "<s>Name a colour.\nred</s>"
    assert sample.prompt_length == len("Name a colour.\n") + 1
    assert sample.response_length == len("red") + 1


def test_a_long_response_loses_its_end(tokenizer: Any) -> None:
    whole = encode([ALONE], tokenizer, "plain", 200).usable[0]
    cut = encode([ALONE], tokenizer, "plain", 18)
    assert cut.truncated == 1
    assert cut.usable[0].input_ids == whole.input_ids[:18]
    assert cut.usable[0].response_length == 2
    assert encode([ALONE], tokenizer, "plain", 20).truncated == 0


def test_unusable_rows_are_dropped_with_their_reason_and_rows_keep_their_numbers(tokenizer: Any) -> None:
    samples = [
        Sample("", "", "something", ""),
        Sample("short", "", "yes", ""),
        Sample("short", "", " \n", ""),
        Sample("a prompt that is much too long", "", "yes", ""),
        Sample("", "only an input", "yes", ""),
    ]
    encoded = encode(samples, tokenizer, "plain", 20)
    assert encoded.dropped == {0: NO_INSTRUCTION, 2: NO_RESPONSE, 3: PROMPT_TOO_LONG}
    assert [sample.row for sample in encoded.usable] == [1, 4]


@pytest.mark.parametrize("max_length", range(14, 22))
def test_every_usable_sample_has_a_response_token(tokenizer: Any, max_length: int) -> None:
    encoded = encode([ALONE], tokenizer, "plain", max_length)
    assert bool(encoded.usable) == (max_length > 16)
    assert all(sample.response_length >= 1 and len(sample.input_ids) <= max_length for sample in encoded.usable)


def test_a_tokenizer_that_ends_texts_itself_neither_doubles_nor_masks_the_end(tokenizer: Any) -> None:
    ending = copy.deepcopy(tokenizer)
    ending.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert ending("a")["input_ids"][-1] == 2
    assert encode([ALONE], ending, "plain", 200) == encode([ALONE], tokenizer, "plain", 200)


def test_prompt_and_whole_are_tokenised_separately_as_in_the_official_codes(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "stories260K")
    render = renderer("fedkseed", tokenizer)
    (sample,) = encode([ALONE], tokenizer, "fedkseed", 256).usable
    text = render(ALONE)
    assert list(sample.input_ids) == tokenizer(text.prompt + text.response)["input_ids"]
    assert sample.prompt_length == len(tokenizer(text.prompt)["input_ids"])
