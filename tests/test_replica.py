"""The replica: any path to a state gives the same bits, and a state that cannot be reached changes nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedtune.coefficients import Coefficients, PoolCoefficients, quantise
from fedtune.directions import Combination, Pool
from fedtune.directions.oracle import dense
from fedtune.errors import MismatchError
from fedtune.layout import Layout
from fedtune.models import LanguageModel
from fedtune.replica import FEW, Replica

FAMILIES = ("hadamard", "rademacher", "gaussian", "lowrank")


def pools(family: str, count: int, blocks: int) -> list[PoolCoefficients]:
    generator = np.random.default_rng(3)
    return [quantise(Pool(family, n, 32), generator.standard_normal((blocks, 32)) * 1e-3, 8) for n in range(count)]


def bits(replica: Replica) -> list[bytes]:
    return [weight.detach().contiguous().view(torch.uint8).numpy().tobytes() for weight in replica.weights]


@pytest.fixture(params=["memory", "files"])
def replica(tiny_lm: LanguageModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Replica:
    """All of it in memory, or what is at rest in files."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layout = Layout.of(tiny_lm.model, "grouped")
    if request.param == "memory":
        return Replica(tiny_lm.model, layout)
    return Replica(tiny_lm.model, layout, tiny_lm.folder, in_memory=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_are_base_plus_coefficients_times_directions(replica: Replica, family: str) -> None:
    """Against the dense float64 oracle."""
    before = torch.cat([weight.detach().reshape(-1).double() for weight in replica.weights])
    chain = pools(family, 3, replica.layout.blocks)
    replica.become(Coefficients(tuple(chain)))
    expected = before.numpy().copy()
    block_of = np.concatenate([np.full(entry.numel, entry.block) for entry in replica.layout.entries])
    for pool in chain:
        z = dense(pool.pool, replica.layout)
        for block in range(replica.layout.blocks):
            mine = block_of == block
            expected[mine] += pool.values[block].astype(np.float64) @ z[:, mine]
    after = torch.cat([weight.detach().reshape(-1).double() for weight in replica.weights]).numpy()
    np.testing.assert_allclose(after, expected, atol=3e-7)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_path_to_a_state_gives_the_same_bits(replica: Replica, family: str) -> None:
    chain = pools(family, 4, replica.layout.blocks)
    replica.become(Coefficients(tuple(chain)))
    direct = bits(replica)
    for stop in (1, 2, 3, 2, 0, 3, 4):
        replica.become(Coefficients(tuple(chain[:stop])))
    assert bits(replica) == direct
    with torch.no_grad():
        for weight in replica.weights:
            weight.mul_(3.0)
    replica.touch()
    replica.become(Coefficients(tuple(chain)))
    assert bits(replica) == direct
    with torch.no_grad():
        replica.weights[0].fill_(7.0)
    replica.touch()
    replica.become(Coefficients(tuple(chain)))
    assert bits(replica) == direct


def summed(replica: Replica, base: list[torch.Tensor], chain: list[PoolCoefficients]) -> list[torch.Tensor]:
    """The definition: w0 + pool 1 + pool 2 ..., pool after pool in float32, rounded to the dtype once."""
    sums = [tensor.float().clone() for tensor in base]
    for pool in chain:
        replica.directions(pool.pool).combine(sums, sums, pool.values)
    return [total.to(weight.dtype) for total, weight in zip(sums, replica.weights, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_many_pools_are_added_one_after_another_in_float32(replica: Replica, family: str) -> None:
    """Bit by bit, on both sides of FEW, growing and shrinking."""
    base = [weight.detach().clone() for weight in replica.weights]
    chain = pools(family, FEW + 3, replica.layout.blocks)
    for stop in (1, FEW, FEW + 1, FEW + 2, FEW + 3, 2, FEW + 3):
        replica.become(Coefficients(tuple(chain[:stop])))
        expected = summed(replica, base, chain[:stop])
        assert all(torch.equal(weight, total) for weight, total in zip(replica.weights, expected, strict=True)), stop


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [0, 1, 3, FEW + 2])
def test_the_start_is_rebuilt_bit_by_bit(replica: Replica, family: str, count: int) -> None:
    """What Ferret measures its update against, after the weights have moved; also when the next client starts there."""
    chain = Coefficients(tuple(pools(family, count, replica.layout.blocks)))
    for _ in range(2):
        replica.become(chain)
        before = [weight.detach().clone() for weight in replica.weights]
        replica.touch()
        with torch.no_grad():
            for weight in replica.weights:
                weight.mul_(2.0)
        assert all(torch.equal(replica.start(index), tensor) for index, tensor in enumerate(before))


def test_a_fold_of_many_pools_widens_a_few_at_a_time(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that joins late gets them all at once: the same bits, and never more than FEW as float32."""
    base = [weight.detach().clone() for weight in replica.weights]
    chain, widened = pools("hadamard", 3 * FEW + 2, replica.layout.blocks), list[int]()
    pairs = Replica._pairs
    monkeypatch.setattr(Replica, "_pairs", lambda self, some: widened.append(len(some)) or pairs(self, some))
    replica.become(Coefficients(tuple(chain)))
    expected = summed(replica, base, chain)
    assert all(torch.equal(weight, total) for weight, total in zip(replica.weights, expected, strict=True))
    assert max(widened) == FEW
    assert sum(widened) == len(chain)


def test_a_fold_that_was_interrupted_starts_again(replica: Replica, monkeypatch: pytest.MonkeyPatch) -> None:
    """An anchor to which a pool was added half is never used."""
    chain = pools("hadamard", FEW + 3, replica.layout.blocks)
    replica.become(Coefficients(tuple(chain)))
    expected = bits(replica)
    replica.become(Coefficients(tuple(chain[:-1])))
    write, calls = Combination.write, 0

    def interrupted(self: Combination, index: int, base: torch.Tensor, out: torch.Tensor) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        write(self, index, base, out)

    longer = Coefficients((*chain, *pools("rademacher", 1, replica.layout.blocks)))
    with monkeypatch.context() as patch:
        patch.setattr(Combination, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            replica.become(longer)
    replica.become(Coefficients(tuple(chain)))
    assert bits(replica) == expected


def test_no_coefficients_are_the_base(replica: Replica) -> None:
    base = bits(replica)
    replica.become(Coefficients(tuple(pools("hadamard", 2, replica.layout.blocks))))
    assert bits(replica) != base
    replica.become(Coefficients(()))
    assert bits(replica) == base


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_weights_are_rounded_once(tiny_lm: LanguageModel, dtype: torch.dtype) -> None:
    """round(w0 + C.z), not a chain of 16-bit additions: the sum over all pools in float32, then one rounding."""
    model = tiny_lm.model.to(dtype)
    replica = Replica(model, Layout.of(model, "grouped"))
    base = [weight.detach().float() for weight in replica.weights]
    chain = pools("hadamard", 5, replica.layout.blocks)
    replica.become(Coefficients(tuple(chain)))
    exact = [tensor.clone() for tensor in base]
    for pool in chain:
        replica.directions(pool.pool).combine(exact, exact, pool.values)
    assert all(torch.equal(weight, full.to(dtype)) for weight, full in zip(replica.weights, exact, strict=True))


def test_another_digest_is_refused_and_changes_nothing(replica: Replica) -> None:
    base = bits(replica)
    with pytest.raises(MismatchError, match="base model or pools differ"):
        replica.become(Coefficients(tuple(pools("hadamard", 1, replica.layout.blocks))), expected=b"x" * 16)
    assert bits(replica) == base
