"""Values of every family that may never change: a model is coefficients over these directions.

If one of these fails, do not update the number: the mapping from seed to direction has changed, and every ledger, wire
message and exported model made before would mean something else.
"""

from __future__ import annotations

import hashlib

import pytest
import torch

from fedtune.directions import Directions, Pool
from fedtune.directions.counters import pool_key
from fedtune.layout import Layout

LAYOUT = Layout.from_shapes([("a", (2, 3)), ("b", (70_000,))])
SEED = 20240607


def direction(pool: Pool, k: int) -> tuple[list[float], str]:
    """The first tensor's values and a digest of the second's bits."""
    first, second = torch.zeros(2, 3), torch.zeros(70_000)
    Directions(LAYOUT, pool).add([first, second], k, 1.0)
    return first.reshape(-1).tolist(), hashlib.sha256(second.numpy().tobytes()).hexdigest()[:16]


def test_keys_and_identities_of_pools() -> None:
    assert pool_key(Pool("hadamard", SEED, 8)) == (0xBCBA5AF7, 0xCADAE82C)
    assert pool_key(Pool("gaussian", SEED, 4096)) == (0x3715FBD3, 0x0D55BAAF)
    assert Pool("hadamard", SEED, 8).identity.hex() == "8481bdea4f33c596"
    assert Pool("hadamard", SEED, 8, rank=4).identity == Pool("hadamard", SEED, 8).identity  # a rank means lowrank alone


@pytest.mark.parametrize(
    ("family", "size", "k", "values", "digest"),
    [
        ("hadamard", 8, 5, [1, 1, -1, 1, 1, 1], "89b1ee88649ffaad"),
        ("hadamard", 5000, 4999, None, "a9206bfd4294a8c5"),
        ("rademacher", 8, 5, [1, -1, 1, -1, 1, -1], "4ec2f6d8c72e6ca6"),
    ],
)
def test_signs(family: str, size: int, k: int, values: list[float] | None, digest: str) -> None:
    got, bits = direction(Pool(family, SEED, size), k)
    assert values is None or got == values
    assert bits == digest


def test_normals_to_the_bit() -> None:
    values, bits = direction(Pool("gaussian", SEED, 8), 5)
    assert values[:4] == [2.2102603912353516, 0.20718851685523987, -0.0007058081100694835, -0.500527560710907]
    assert bits == "0152dd2ead427fbb"


def test_products_of_normals_to_the_bit() -> None:
    values, bits = direction(Pool("lowrank", SEED, 8), 5)
    assert values == [
        0.24601757526397705,
        -0.15915919840335846,
        -0.18131740391254425,
        0.07025709748268127,
        -0.0454522930085659,
        -0.051780182868242264,
    ]
    assert bits == "91bc35428436463f"
    assert Pool("lowrank", SEED, 8).identity.hex() == "00c3f9017f7092bd"
    assert Pool("lowrank", SEED, 8, rank=4).identity.hex() == "88c1d5fe24f433af"


def test_torchs_draws_for_seed_zero() -> None:
    values, _ = direction(Pool("torch", 0, 1, (0,)), 0)
    assert values == pytest.approx([1.5410, -0.2934, -2.1788, 0.5684, -1.0845, -1.3986], abs=5e-5)
