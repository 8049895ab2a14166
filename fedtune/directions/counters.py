"""Which Philox counter names which random words of a direction: shared by every kernel, on any device, and the oracle.

Counter words 0 and 1 are a block number (low, high), word 2 is the seed k or 0, word 3 says what the block is for. The
key is the pool's. Nothing else enters a direction, so these numbers must never change.
"""

from __future__ import annotations

from fedtune.directions.base import Pool
from fedtune.philox import MASK32
from fedtune.seeds import stream_key

SIGNS = 1  # hadamard: block = position // 128, bit 32*w + b of the block is the sign at position % 128
COLUMNS = 2  # hadamard: block = tile number, the constants of the tile's column permutation
RADEMACHER = 3  # block = position // 128, word 2 = k
GAUSSIAN = 4  # block = position // 4, word 2 = k; also the vectors of lowrank
LEFT = 5  # lowrank, as GAUSSIAN: factor a_j of a matrix [out, in] at origin o has positions o + j * out + (0 .. out - 1)
RIGHT = 6  # lowrank, as GAUSSIAN: factor b_j has positions o + j * in + (0 .. in - 1)
ROUNDING = 7  # not of directions: stochastic rounding of weights, block = position // 8, word 2 = number of the rounding

SMALLEST_TILE = 12
"""log2 of the tile of a pool with at most 4096 seeds."""


def pool_key(pool: Pool) -> tuple[int, int]:
    """The two 32-bit key words of `pool`; different for every family and pool seed."""
    key = stream_key("directions", pool.family, pool.seed)
    return key & MASK32, key >> 32


def tile_bits(size: int) -> int:
    """log2 of the hadamard tile n for a pool of `size` seeds: n = 4096, or the next power of two >= size."""
    return max(SMALLEST_TILE, (size - 1).bit_length())


def column_shifts(bits: int) -> tuple[int, int, int]:
    """Right shifts of the three rounds of the column permutation of a tile of 2^bits.

    Round r is x = (x * odd_r + add_r) mod n, then x ^= x >> shift_r: each step is a bijection. Equal shifts leave a bias
    of several per cent in which columns of a pair share their low bits; these three do not (tests/directions/).
    """
    return bits // 2 - 1, bits // 2 + 1, bits // 2
