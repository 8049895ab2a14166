"""The directions of a pool, dense and in float64: slow, short, and plainly what the contract says.

Every fast kernel is tested against this file. It computes one family at a time from the definitions, on whole arrays of
positions, with numpy's arithmetic and the numpy Philox of `fedtune.philox`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from fedtune.directions.base import F64, Pool
from fedtune.directions.counters import COLUMNS, GAUSSIAN, LEFT, RADEMACHER, RIGHT, SIGNS, column_shifts, pool_key, tile_bits
from fedtune.errors import DirectionsError
from fedtune.layout import Entry, Layout
from fedtune.philox import MASK32, philox4x32
from fedtune.seeds import Stream

I64 = npt.NDArray[np.int64]


def dense(pool: Pool, layout: Layout) -> F64:
    """float64 [K, d]: row k is z_k over all trainable elements, tensors joined in layout order."""
    if pool.family in ("torch", "torch-truncated"):
        return _official(pool, layout)
    if pool.family == "axes":
        return np.eye(pool.size, layout.numel)
    if pool.family == "lowrank":
        return np.stack([np.concatenate([lowrank(pool, k, entry) for entry in layout.entries]) for k in range(pool.size)])
    rules: dict[str, Callable[[Pool, int, I64], F64]] = {"hadamard": hadamard, "rademacher": rademacher, "gaussian": gaussian}
    if pool.family not in rules:
        raise DirectionsError(f"The oracle knows no family '{pool.family}'.", family=pool.family)
    positions = np.concatenate([np.arange(e.origin, e.origin + e.numel) for e in layout.entries])
    return np.stack([rules[pool.family](pool, k, positions) for k in range(pool.size)])


def hadamard(pool: Pool, k: int, positions: I64) -> F64:
    """z_k[p] = D[p] * (-1)^popcount(i & pi_t(k)), i = p mod n, t = p // n."""
    n = 1 << tile_bits(pool.size)
    columns = {int(t): column(pool, int(t), k) for t in np.unique(positions // n)}
    parity = [(int(p) % n & columns[int(p) // n]).bit_count() % 2 for p in positions]
    bits: I64 = _sign_bits(pool, SIGNS, 0, positions) ^ np.array(parity)
    return 1.0 - 2.0 * bits.astype(np.float64)


def rademacher(pool: Pool, k: int, positions: I64) -> F64:
    """z_k[p] = -1 where the bit of position p is set, else 1."""
    return 1.0 - 2.0 * _sign_bits(pool, RADEMACHER, k, positions).astype(np.float64)


def lowrank(pool: Pool, k: int, entry: Entry) -> F64:
    """sum_j a_j b_j^T / sqrt(r) for each matrix of the tensor, flat; normals for a vector."""
    if len(entry.shape) < 2:
        return gaussian(pool, k, np.arange(entry.origin, entry.origin + entry.numel))
    height, width = entry.shape[-2:]
    rank, parts = min(pool.rank, height, width), []
    for origin in range(entry.origin, entry.origin + entry.numel, height * width):
        left = gaussian(pool, k, np.arange(origin, origin + rank * height), LEFT).reshape(rank, height)
        right = gaussian(pool, k, np.arange(origin, origin + rank * width), RIGHT).reshape(rank, width)
        parts.append((left.T @ right).reshape(-1) / math.sqrt(rank))
    return np.concatenate(parts)


def gaussian(pool: Pool, k: int, positions: I64, purpose: int = GAUSSIAN) -> F64:
    """Box-Muller on the word pairs (0, 1) and (2, 3) of each block of four positions, with exact functions.

    The first word of a pair gives the radius from u = (word + 1/2) / 2^32, the second the angle in turns; the even
    position takes the cosine, the odd one the sine.
    """
    words = philox4x32(_counters(positions // 4, k, purpose), pool_key(pool)).astype(np.float64)
    rows, pair = np.arange(len(positions)), positions % 4 // 2
    radius: F64 = np.sqrt(-2.0 * np.log((words[rows, 2 * pair] + 0.5) / 2.0**32))
    angle: F64 = 2.0 * math.pi * words[rows, 2 * pair + 1] / 2.0**32
    return radius * np.where(positions % 2 == 0, np.cos(angle), np.sin(angle))


def column(pool: Pool, tile: int, k: int) -> int:
    """pi_t(k): the Walsh-Hadamard column that seed k has in tile t."""
    bits = tile_bits(pool.size)
    words = [int(w) for w in philox4x32(_counters(np.array([tile]), 0, COLUMNS), pool_key(pool))[0]]
    x = (k + words[3]) % (1 << bits)
    for word, shift in zip(words, column_shifts(bits), strict=False):
        x = (x * (word | 1) + (word >> 16)) % (1 << bits)
        x ^= x >> shift
    return x


def _sign_bits(pool: Pool, purpose: int, k: int, positions: I64) -> I64:
    words = philox4x32(_counters(positions // 128, k, purpose), pool_key(pool)).astype(np.int64)
    return words[np.arange(len(positions)), positions % 128 // 32] >> (positions % 32) & 1


def _counters(blocks: I64, k: int, purpose: int) -> npt.NDArray[np.uint32]:
    counters = np.zeros((len(blocks), 4), dtype=np.uint32)
    counters[:, 0], counters[:, 1] = blocks & MASK32, blocks >> 32
    counters[:, 2], counters[:, 3] = k, purpose
    return counters


def _official(pool: Pool, layout: Layout) -> F64:
    """What the official codes draw with torch's global generator, which is left as it was.

    torch: reseed, then one torch.normal per tensor. torch-truncated: per block reseed, then trunc_normal_ over all of it,
    times sqrt(3 d). A block is made of consecutive tensors, so blocks joined are tensors joined.
    """
    literal = pool.candidates or tuple(int(s) for s in Stream(pool.seed, "candidates").below(10**11, pool.size))
    rows = []
    with torch.random.fork_rng(devices=[]):
        for seed in literal:
            torch.manual_seed(seed)
            if pool.family == "torch":
                drawn = [torch.normal(0.0, 1.0, size=e.shape, dtype=torch.float32).reshape(-1) for e in layout.entries]
            else:
                drawn = [_truncated(seed, size) for size in layout.block_sizes]
            rows.append(torch.cat(drawn).double().numpy())
    return np.stack(rows)


def _truncated(seed: int, size: int) -> torch.Tensor:
    torch.manual_seed(seed)
    bound = 1.0 / size**0.5
    return torch.nn.init.trunc_normal_(torch.empty(size), mean=0.0, std=1.0, a=-bound, b=bound).double() * math.sqrt(3.0 * size)
