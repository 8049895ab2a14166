"""Perturbed forward passes: equal to a model perturbed in place, to the bit, and the weights are never written."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig, MixtralConfig, PhiConfig, Qwen3Config

from fedtune.directions import Directions, Pool
from fedtune.errors import ModelError
from fedtune.layout import Layout
from fedtune.perturb import WHOLE_LIMIT, Perturbation

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 97}
SIZES |= {"max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
HEADS = {"num_key_value_heads": 1, "head_dim": 16}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, num_key_value_heads=1),
    "llama-tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, **HEADS),
    "gpt2": GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=2),
    "mixtral": MixtralConfig(**SIZES, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2),
    "gemma3": Gemma3TextConfig(**SIZES, **HEADS, sliding_window=8),
    "phi": PhiConfig(**SIZES),
}
K, C = 7, 1e-3
WAYS = {"whole": WHOLE_LIMIT, "by module": 0}


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], dtype=dtype).eval()


def directions_of(model: nn.Module) -> Directions:
    return Directions(Layout.of(model), Pool("hadamard", 5, 16))


def loss_of(model: nn.Module) -> Tensor:
    ids = torch.arange(24).reshape(2, 12) * 5 % 97
    with torch.no_grad():
        return model(input_ids=ids, labels=ids).loss


def perturbed_clone_loss(model: nn.Module, directions: Directions) -> Tensor:
    clone = copy.deepcopy(model)
    directions.add([p.data for p in clone.parameters()], K, C)
    return loss_of(clone)


def state_of(model: nn.Module) -> list[tuple[int, Tensor]]:
    return [(p.data_ptr(), p.detach().clone()) for p in model.parameters()]


def assert_untouched(model: nn.Module, before: list[tuple[int, Tensor]]) -> None:
    for parameter, (pointer, value) in zip(model.parameters(), before, strict=True):
        assert parameter.data_ptr() == pointer
        assert torch.equal(parameter, value)


@pytest.mark.parametrize("limit", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_loss_is_that_of_a_model_perturbed_in_place_to_the_bit(name: str, limit: int) -> None:
    model = build(name)
    directions = directions_of(model)
    perturbation = Perturbation(model, directions.layout, limit)
    plain, expected, before = loss_of(model), perturbed_clone_loss(model, directions), state_of(model)
    assert plain != expected
    for _ in range(2):  # the first pass is checked operator by operator, the second is not
        with perturbation.at(directions, K, C):
            assert torch.equal(loss_of(model), expected)
        assert_untouched(model, before)
    assert torch.equal(loss_of(model), plain)


@pytest.mark.parametrize("limit", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_perturbed_in_float32_and_rounded_once(dtype: torch.dtype, limit: int) -> None:
    model = build("llama", dtype)
    directions = directions_of(model)
    before = state_of(model)
    with Perturbation(model, directions.layout, limit).at(directions, K, C):
        assert torch.equal(loss_of(model), perturbed_clone_loss_16(model, directions, before))
    assert_untouched(model, before)


def perturbed_clone_loss_16(model: nn.Module, directions: Directions, weights: list[tuple[int, Tensor]]) -> Tensor:
    clone = build("llama", weights[0][1].dtype)
    wide = [value.float() for _, value in weights]
    directions.add(wide, K, C)
    for parameter, value in zip(clone.parameters(), wide, strict=True):
        parameter.data = value.to(parameter.dtype)
    return loss_of(clone)


class Fails(nn.Module):
    """A model whose inner module raises after its parameters were swapped."""

    def __init__(self, error: type[BaseException]) -> None:
        super().__init__()
        self.first, self.second, self.error = nn.Linear(4, 4), nn.Linear(4, 4), error
        self.second.register_forward_hook(self._fail)

    def _fail(self, *_: object) -> None:
        raise self.error("out of memory, say")

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("limit", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_back_when_the_forward_pass_raises(error: type[BaseException], limit: int) -> None:
    model = Fails(error)
    directions = directions_of(model)
    perturbation = Perturbation(model, directions.layout, limit)
    before = state_of(model)
    with pytest.raises(error, match="out of memory"), perturbation.at(directions, K, C):
        model(torch.ones(2, 4))
    assert_untouched(model, before)


class ReadsAnother(nn.Module):
    """Reads the weight of a module that it does not call: as torch's MultiheadAttention, or an output tied by hand."""

    def __init__(self, call_it_too: bool) -> None:
        super().__init__()
        self.embedding, self.call_it_too = nn.Embedding(5, 4), call_it_too
        self.last = nn.Linear(4, 4)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.embedding(ids) if self.call_it_too else torch.ones(3, 4)
        return nn.functional.linear(self.last(hidden), self.embedding.weight)


@pytest.mark.parametrize("call_it_too", [True, False])
def test_a_weight_read_outside_its_owner_is_named(call_it_too: bool) -> None:
    model = ReadsAnother(call_it_too)
    directions, ids = directions_of(model), torch.tensor([0, 1, 4])
    perturbation = Perturbation(model, directions.layout, whole_limit=0)
    before = state_of(model)
    for _ in range(2):  # it stays refused
        with (
            pytest.raises(ModelError, match=r"'embedding\.weight' is read \(aten.* outside .*whole_limit above") as caught,
            perturbation.at(directions, K, C),
        ):
            model(ids)
        assert caught.value.facts["name"] == "embedding.weight"
        assert_untouched(model, before)
    clone = copy.deepcopy(model)
    directions.add([p.data for p in clone.parameters()], K, C)
    with Perturbation(model, directions.layout).at(directions, K, C):
        assert torch.equal(model(ids), clone(ids))


def test_torch_multihead_attention_is_refused_by_module() -> None:
    model = nn.MultiheadAttention(8, 2)
    directions, x = directions_of(model), torch.ones(3, 1, 8)
    with (
        pytest.raises(ModelError, match=r"out_proj\.(weight|bias)"),
        Perturbation(model, directions.layout, 0).at(directions, K, C),
    ):
        model(x, x, x)


class Nested(nn.Module):
    """Owns a parameter that it uses before and after it calls another owner; a third module is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.inner, self.unused = nn.Parameter(torch.ones(4)), nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros_like(self.unused.weight)  # its shape is used, its values are not
        return self.inner(x * self.scale) * self.scale + zeros[0]


class Borrows(nn.Module):
    """Calls a module that lies elsewhere in the tree, while its own parameters are in use; and ties one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.other = Nested(), nn.Linear(4, 4)
        self.caller = Calls(self.other)
        self.caller.weight = self.block.inner.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.caller(self.block(x))


class Calls(nn.Module):
    def __init__(self, other: nn.Module) -> None:
        super().__init__()
        self.weight: nn.Parameter = nn.Parameter(torch.eye(4))
        self.bias = nn.Parameter(torch.zeros(4))
        self.others = (other,)  # a tuple hides it from the module tree

    def forward(self, x: Tensor) -> Tensor:
        return self.others[0](x @ self.weight + self.bias) @ self.weight + self.bias


@pytest.mark.parametrize("build_model", [Nested, Borrows])
@pytest.mark.parametrize("limit", WAYS.values(), ids=WAYS)
def test_owners_that_run_inside_one_another_do_not_share_scratch(build_model: type[nn.Module], limit: int) -> None:
    torch.manual_seed(0)
    model = build_model()
    directions, x = directions_of(model), torch.ones(2, 4)
    clone = copy.deepcopy(model)
    directions.add([p.data for p in clone.parameters()], K, C)
    perturbation, before = Perturbation(model, directions.layout, limit), state_of(model)
    with perturbation.at(directions, K, C):
        assert torch.equal(model(x), clone(x))
    assert_untouched(model, before)


def test_scratch_is_one_module_or_the_whole_model() -> None:
    model = build("llama")
    layout = Layout.of(model)
    largest = max(entry.numel for entry in layout.entries) * 4
    assert Perturbation(model, layout, 0).scratch_bytes == pytest.approx(largest, abs=64)
    assert Perturbation(model, layout).scratch_bytes == pytest.approx(layout.numel * 4, abs=64 * len(layout.entries))


def test_close_leaves_the_model_without_hooks() -> None:
    model = build("llama")
    directions = directions_of(model)
    perturbation = Perturbation(model, directions.layout, 0)
    assert any(module._forward_pre_hooks for module in model.modules())
    perturbation.close()
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_misuse_is_refused() -> None:
    model = build("llama")
    directions = directions_of(model)
    perturbation = Perturbation(model, directions.layout)
    again = perturbation.at(directions, K, C)
    with perturbation.at(directions, K, C), pytest.raises(ModelError, match="perturbed already: leave the first"):
        again.__enter__()
    in_inference = perturbation.at(directions, K, C)
    with torch.inference_mode(), pytest.raises(ModelError, match=r"use torch\.no_grad instead"):
        in_inference.__enter__()
    model.to(torch.bfloat16)
    moved = perturbation.at(directions, K, C)
    with pytest.raises(ModelError, match=r"'.*' was moved or cast: make a new"):
        moved.__enter__()
    with pytest.raises(ModelError, match="not those of the layout"):
        Perturbation(build("phi"), directions.layout)
