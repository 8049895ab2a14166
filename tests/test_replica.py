"""The replica: any path to a state gives the same bits, and a state that cannot be reached changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedtune.coefficients import Coefficients, PoolCoefficients, quantise
from fedtune.directions import Pool
from fedtune.directions.oracle import dense
from fedtune.errors import MismatchError
from fedtune.layout import Layout
from fedtune.models import LanguageModel
from fedtune.replica import Replica

FAMILIES = ("hadamard", "rademacher", "gaussian", "lowrank")


def pools(family: str, count: int, blocks: int) -> list[PoolCoefficients]:
    generator = np.random.default_rng(3)
    return [quantise(Pool(family, n, 32), generator.standard_normal((blocks, 32)) * 1e-3, 8) for n in range(count)]


def bits(replica: Replica) -> list[bytes]:
    return [weight.detach().contiguous().view(torch.uint8).numpy().tobytes() for weight in replica.weights]


@pytest.fixture
def replica(tiny_lm: LanguageModel) -> Replica:
    return Replica(tiny_lm.model, Layout.of(tiny_lm.model, "grouped"))


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
