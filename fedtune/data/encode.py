"""From text to tokens: which tokens a sample has, which of them are trained on, and why a sample is left out.

As in the official codes of FedKSeed and Ferret, the prompt and the prompt with its response are tokenised separately,
and the prompt's length is masked. The whole is cut after `max_length` tokens, so a long response loses its end; a
sample of which no response token is left is dropped and counted, never trained on with an undefined loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fedtune.data.samples import Sample
from fedtune.data.templates import Rendered, renderer

NO_INSTRUCTION = "no instruction"
NO_RESPONSE = "empty response"
PROMPT_TOO_LONG = "prompt fills max_length"


@dataclass(frozen=True)
class Encoded:
    """A sample in tokens: prompt, then response, at most max_length. `row` is its row in the file, from 0."""

    input_ids: tuple[int, ...]
    prompt_length: int
    row: int

    @property
    def response_length(self) -> int:
        """Tokens that are trained on, at least 1."""
        return len(self.input_ids) - self.prompt_length


@dataclass(frozen=True)
class EncodedSamples:
    """What is usable (in row order), the reason for each dropped row, and how many responses were cut."""

    usable: tuple[Encoded, ...]
    dropped: dict[int, str]
    truncated: int


def encode(samples: Sequence[Sample], tokenizer: Any, template: str, max_length: int) -> EncodedSamples:
    """Tokenise `samples`; rows are numbered by position. Raises DataError if the template does not fit the tokenizer."""
    render = renderer(template, tokenizer)
    dropped = {row: NO_INSTRUCTION for row, sample in enumerate(samples) if not (sample.instruction or sample.input).strip()}
    dropped |= {row: NO_RESPONSE for row, sample in enumerate(samples) if not sample.output.strip()}
    rows = [row for row in range(len(samples)) if row not in dropped]
    usable, truncated = [], 0
    for row, (prompt, whole) in zip(rows, tokenise([render(samples[row]) for row in rows], tokenizer), strict=True):
        if len(prompt) >= min(len(whole), max_length):
            dropped[row] = PROMPT_TOO_LONG if len(prompt) >= max_length else NO_RESPONSE
            continue
        truncated += len(whole) > max_length
        usable.append(Encoded(tuple(whole[:max_length]), len(prompt), row))
    return EncodedSamples(tuple(usable), dict(sorted(dropped.items())), truncated)


def tokenise(texts: Sequence[Rendered], tokenizer: Any) -> Iterable[tuple[list[int], list[int]]]:
    """For each text the tokens of its prompt and those of prompt and response together, both from the start."""
    if not texts:
        return []
    special = texts[0].special_tokens
    options = {"add_special_tokens": special, "truncation": False, "padding": False, "verbose": False}
    prompts = tokenizer([text.prompt for text in texts], **options)["input_ids"]
    wholes = tokenizer([text.prompt + text.response for text in texts], **options)["input_ids"]
    if special and _adds_end(tokenizer):  # T5-like tokenizers: the added end would be masked inside, or doubled
        prompts, wholes = [ids[:-1] for ids in prompts], [ids[:-1] for ids in wholes]
    return zip(prompts, wholes, strict=True)


def _adds_end(tokenizer: Any) -> bool:
    """Whether the tokenizer itself ends every text with its end-of-text token."""
    with_special = tokenizer("a", add_special_tokens=True)["input_ids"]
    without = tokenizer("a", add_special_tokens=False)["input_ids"]
    end = tokenizer.eos_token_id
    return bool(with_special[-1] == end and without[-1] != end)
