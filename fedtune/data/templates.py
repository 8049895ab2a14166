"""How a sample becomes text: the prompt the model reads and the response it is trained on.

alpaca    Ferret, arXiv 2409.06277, Table 8 (the wording of Stanford Alpaca)
fedkseed  the same with the sentence of FedKSeed's official code for Dolly-15K
chat      the tokenizer's own chat template: one user turn, one assistant turn
plain     the instruction, the input on the next line, a line break, the response
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from fedtune.data.samples import Sample
from fedtune.errors import DataError

_ALONE = "Below is an instruction that describes a task. {request}\n\n### Instruction:\n{instruction}\n\n### Response:"
_PAIRED = (
    "Below is an instruction that describes a task, paired with an input that provides further context. {request}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
_REQUESTS = {
    "alpaca": "Write a response that appropriately completes the request.",
    "fedkseed": "Write a response for the task request.",
}

_MARK = "\ue000"  # a private character, which no template writes


@dataclass(frozen=True)
class Rendered:
    """The text of a sample. `response` ends with the end-of-text token.

    `special_tokens`: whether the tokenizer is to add its own (a chat template has written them already).
    """

    prompt: str
    response: str
    special_tokens: bool = True


def renderer(template: str, tokenizer: Any) -> Callable[[Sample], Rendered]:
    """The function that renders a sample with `template`.

    Raises:
        DataError: `chat` with a tokenizer that has no chat template.
    """
    if template == "chat":
        if not getattr(tokenizer, "chat_template", None):
            raise DataError(
                'template = "chat" needs a chat template, which this tokenizer lacks: use alpaca, fedkseed or plain.'
            )
        return lambda sample: _chat(sample, tokenizer)
    return lambda sample: Rendered(_prompt(sample, template), sample.output + str(tokenizer.eos_token))


def answer_only(render: Callable[[Sample], Rendered], example: Sample) -> Callable[[Sample], Rendered]:
    """`render` without what it writes after a response: the end-of-text token, or what closes a turn.

    Args:
        example: any sample; what closes a response is found by rendering it with a mark as its output.
    """
    _, _, end = render(replace(example, output=_MARK)).response.rpartition(_MARK)

    def bare(sample: Sample) -> Rendered:
        whole = render(sample)
        return replace(whole, response=whole.response.removesuffix(end))

    return bare


def _prompt(sample: Sample, template: str) -> str:
    if template == "plain":
        return "".join(f"{part}\n" for part in (sample.instruction, sample.input) if part)
    form = _PAIRED if sample.input else _ALONE
    return form.format(request=_REQUESTS[template], instruction=sample.instruction, input=sample.input)


def _chat(sample: Sample, tokenizer: Any) -> Rendered:
    user = "\n\n".join(part for part in (sample.instruction, sample.input) if part)
    turns = [{"role": "user", "content": user}]
    prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": sample.output}], tokenize=False))
    # Some templates write the last turn of a finished conversation differently from the prompt for one.
    response = whole[len(prompt) :].rstrip("\n") if whole.startswith(prompt) else sample.output + str(tokenizer.eos_token)
    return Rendered(prompt, response, special_tokens=False)
