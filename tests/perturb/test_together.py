"""Several points in one pass: the losses of one pass for each, on every kind of model, and the weights untouched."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fedtune.algorithms import LocalWork, base
from fedtune.data.batches import Batch
from fedtune.directions import Directions, Pool
from fedtune.errors import ModelError
from fedtune.evaluation import response_loss, response_losses
from fedtune.layout import Layout
from fedtune.perturb import Perturbation
from fedtune.progress import Event, Note, listening
from tests.perturb.test_perturb import CONFIGS, ReadsAnother, assert_untouched, build, state_of

POINTS = [(3, 1e-2), (3, -1e-2), (7, 1e-2), (7, -2e-2)]
IDS = torch.arange(24).reshape(2, 12) * 5 % 97
BATCH = Batch(IDS, torch.ones_like(IDS), IDS)
CPU = torch.device("cpu")
KINDS = {"rank 1": ("lowrank", 1, None), "rank 3": ("lowrank", 3, None), "offloaded": ("hadamard", 1, CPU),
         "offloaded rank 2": ("lowrank", 2, CPU)}  # fmt: skip


def setting(model: nn.Module, kind: str, whole_limit: int = 1 << 26) -> tuple[Directions, Perturbation]:
    family, rank, device = KINDS[kind]
    layout = Layout.of(model)
    return Directions(layout, Pool(family, 5, 16, rank=rank)), Perturbation(model, layout, whole_limit, device)


def together_of(model: nn.Module) -> Callable[[int], Tensor]:
    return lambda copies: response_losses(model, BATCH, copies)


def one_by_one(model: nn.Module, directions: Directions, perturbation: Perturbation) -> list[float]:
    return perturbation.losses(directions, POINTS, lambda: response_loss(model, BATCH))


@pytest.mark.parametrize("whole_limit", [0, 1 << 26], ids=["by module", "whole"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", CONFIGS)
def test_the_losses_are_those_of_one_pass_for_each_point(name: str, kind: str, whole_limit: int) -> None:
    model = build(name)
    directions, perturbation = setting(model, kind, whole_limit)
    expected, before = one_by_one(model, directions, perturbation), state_of(model)
    notes: list[Event] = []
    for _ in range(2):  # the first time they are compared, the second time they are not
        with listening(notes.append):
            found = perturbation.losses(directions, POINTS, lambda: response_loss(model, BATCH), together_of(model))
        assert found == pytest.approx(expected, abs=3e-6)
        assert len(set(found)) == len(POINTS)
        assert_untouched(model, before)
        assert all("forward" not in module.__dict__ for module in model.modules())
    assert not notes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights(dtype: torch.dtype) -> None:
    model = build("llama", dtype)
    directions, perturbation = setting(model, "rank 1")
    expected = one_by_one(model, directions, perturbation)
    found = perturbation.losses(directions, POINTS, lambda: response_loss(model, BATCH), together_of(model))
    assert found == pytest.approx(expected, abs=3e-2)


class Counted(nn.Module):
    """Counts its passes; a batch of ids to the loss of each row."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.middle, self.norm = nn.Embedding(97, 8), nn.Linear(8, 8), nn.LayerNorm(8)
        self.rows: list[int] = []

    def forward(self, ids: Tensor) -> Tensor:
        self.rows.append(len(ids))
        return self.last(self.norm(self.middle(self.embedding(ids)))).square().mean(dim=(1, 2))

    def last(self, x: Tensor) -> Tensor:
        return x


class Mixes(Counted):
    """Lets the rows of a batch see one another, so that copies of a batch do too."""

    def last(self, x: Tensor) -> Tensor:
        return x * (1.0 + x.abs().max())


def losses(model: Counted, perturbation: Perturbation, directions: Directions) -> list[float]:
    return perturbation.losses(
        directions, POINTS, lambda: model(IDS).mean(), lambda copies: model(IDS.repeat(copies, 1)).view(copies, -1).mean(1)
    )


def test_one_pass_is_one_pass() -> None:
    model = Counted()
    directions, perturbation = setting(model, "rank 1")
    first = losses(model, perturbation, directions)
    assert model.rows == [8, 2, 2, 2, 2]
    assert losses(model, perturbation, directions) == first
    assert model.rows[5:] == [8]


def test_a_model_whose_rows_see_one_another_is_evaluated_one_by_one() -> None:
    model = Mixes()
    directions, perturbation = setting(model, "rank 1")
    heard: list[Event] = []
    with listening(heard.append):
        found = losses(model, perturbation, directions)
    assert found == perturbation.losses(directions, POINTS, lambda: model(IDS).mean())
    (note,) = (event.text for event in heard if isinstance(event, Note))
    assert note.startswith("Several points in one pass give other losses than one by one (by ")
    model.rows.clear()
    assert losses(model, perturbation, directions) == found
    assert model.rows == [2, 2, 2, 2]


def test_a_family_without_thin_directions_goes_one_by_one() -> None:
    model = Counted()
    layout = Layout.of(model)
    losses(model, Perturbation(model, layout), Directions(layout, Pool("hadamard", 5, 16)))
    assert model.rows == [2, 2, 2, 2]


@pytest.mark.parametrize("call_it_too", [True, False])
def test_a_weight_read_outside_its_owner_is_named(call_it_too: bool) -> None:
    model = ReadsAnother(call_it_too)
    directions, perturbation = setting(model, "rank 1")
    before = state_of(model)
    ids = torch.tensor([[0], [1], [4]])
    with pytest.raises(ModelError, match=r"'embedding\.weight' is read"):
        perturbation.losses(directions, POINTS, lambda: model(ids).mean(), lambda copies: model(ids.repeat(copies, 1)))
    assert_untouched(model, before)


def test_everything_is_back_when_the_pass_raises() -> None:
    model = build("mixtral")
    directions, perturbation = setting(model, "rank 1")
    before = state_of(model)

    def fails(copies: int) -> Tensor:
        response_losses(model, BATCH, copies)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        perturbation.losses(directions, POINTS, lambda: response_loss(model, BATCH), fails)
    assert_untouched(model, before)
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_an_offloaded_model_runs_unperturbed_too() -> None:
    model = build("llama-tied")
    expected = response_loss(model, BATCH)
    before = state_of(model)
    directions, perturbation = setting(model, "offloaded")
    with torch.no_grad():
        assert torch.equal(response_loss(model, BATCH), expected)
        with perturbation.at(directions, 3, 1e-2):
            moved = response_loss(model, BATCH)
        assert not torch.equal(moved, expected)
        assert torch.equal(response_loss(model, BATCH), expected)
    assert_untouched(model, before)
    assert perturbation.scratch_bytes < sum(value.numel() * 4 for _, value in before)


def test_points_are_divided_over_passes_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    directions, perturbation = setting(model, "rank 1")
    copies: list[int] = []

    def several(model: nn.Module, batch: Batch, count: int) -> Tensor:
        copies.append(count)
        return response_losses(model, batch, count)

    work = LocalWork(model, [], response_loss, iter(()), directions, perturbation, "0", 1, losses=several)
    points = [*POINTS, (1, 1e-2)]
    expected = work.losses_at(BATCH, points)
    for tokens, passes in ((8192, [5]), (4 * IDS.numel(), [4, 1]), (1, [2, 2, 1])):
        copies.clear()
        monkeypatch.setattr(base, "PASS_TOKENS", tokens)
        assert work.losses_at(BATCH, points) == pytest.approx(expected, abs=1e-5)
        assert copies == passes
