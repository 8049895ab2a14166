"""Reads a model of kilobytes (`delta.py`) that anybody may have made, and refuses whatever docs/delta.md does not allow.

The header's length is checked before the header is read, the sizes that it announces against the size of the file before
the tensors are read, and the digest of the model before it is returned. What `encode` would not have written byte by byte
is refused.
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, get_args

import numpy as np

from fedtune.bits import I64, Whole, packed_length, unpack_integers
from fedtune.bounded import parse_json
from fedtune.coefficients import I32, MAX_EXPONENT, MIN_EXPONENT, PoolCoefficients, summable
from fedtune.config import RunConfig
from fedtune.delta import (
    FEWEST_BITS,
    FORMAT,
    MOST_BITS,
    MOST_COEFFICIENTS,
    VERSION,
    Delta,
    declared,
    encode,
    length_type,
    too_large,
)
from fedtune.directions.base import DISJOINT, MAX_AXES, MAX_POOL, Pool
from fedtune.errors import DeltaMismatchError, MalformedDeltaError, MalformedMessageError
from fedtune.foreign import for_screen
from fedtune.layout import BlockRule
from fedtune.regular import ANY, open_regular
from fedtune.scratch import room

MOST_HEADER = 1 << 22  # bytes of header that are read; one of 10,000 pools has a tenth of it
MOST_BLOCKS = MOST_POOLS = 65536
LONGEST_NAME = 200
KEYS = (
    "format", "version", "fedtune", "base", "dtype", "fingerprint", "tensors", "layout", "block_rule", "block_sizes",
    "family", "rank", "K", "bits", "pool_every", "pools", "round", "digest",
)  # fmt: skip
_CHOICES = {
    "dtype": get_args(RunConfig.model_fields["dtype"].annotation),
    "family": (*get_args(RunConfig.model_fields["family"].annotation), *DISJOINT),
    "block_rule": get_args(BlockRule),
}


def read(path: Path) -> Delta:
    """The delta in the file `path`.

    Raises:
        MalformedDeltaError: there is none, or it is damaged, or something else. DeltaMismatchError: another format version.
    """
    try:
        with open_regular(path, ANY) as file:
            return _decode(file, os.fstat(file.fileno()).st_size, f"'{path}'")
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise MalformedDeltaError(
            f"'{path}' cannot be read ({reason}): give a file that `fedtune export RUN --format delta` wrote.", path=str(path)
        ) from None


def decode(data: bytes, name: str = "The delta") -> Delta:
    """The inverse of `encode`; `name` is what an error calls it. Raises as `read` does."""
    return _decode(io.BytesIO(data), len(data), name)


def _decode(file: BinaryIO, size: int, name: str) -> Delta:
    text = _read_header(file, size, name)
    header = _parse(text, name)
    fields = _Fields(header["__metadata__"], name)
    fields.check_format()
    rest = size - 8 - len(text)
    lengths, start = _read_lengths(file, rest, fields.shape(), name)
    body = start + _read_rest(file, rest - len(start), header, lengths, fields, name)
    delta = fields.delta(*_tensors(body, lengths, fields, name))
    if not all(summable(pool.pool, pool.q, pool.exponents) for pool in delta.pools):
        raise _damaged(name, "the coefficients of a block are too large for exact sums")
    if delta.coefficients.digest(delta.fingerprint) != delta.digest:
        raise _damaged(name, "its coefficients do not lead to its digest")
    if encode(delta) != len(text).to_bytes(8, "little") + text + body:
        raise _damaged(name, "it says what a delta says, but not in the bytes that docs/delta.md prescribes")
    return delta


def _read_header(file: BinaryIO, size: int, name: str) -> bytes:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > size - 8:
        raise _damaged(name, f"it has {size} bytes and announces a header of {length}" if size >= 8 else f"it has {size} bytes")
    if length > MOST_HEADER:
        raise MalformedDeltaError(
            f"{name} announces a header of {length} bytes; a delta has {MOST_HEADER} at most: it is something else.", name=name
        )
    text = file.read(length)
    if len(text) != length:
        raise _damaged(name, "it became shorter while it was read")
    return text


def _parse(text: bytes, name: str) -> dict[str, Any]:
    """The header as JSON with the keys of a delta; the tensors of another safetensors file are named."""
    try:
        header = parse_json(text, object_pairs_hook=_no_twins)
    except ValueError as error:
        raise _damaged(name, f"its header is not JSON: {for_screen(str(error))}") from None
    if not isinstance(header, dict):
        raise _damaged(name, "its header is not an object")
    metadata = header.get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
        raise MalformedDeltaError(
            f"{name} is not a delta of fedtune: give a file that `fedtune export RUN --format delta` wrote.", name=name
        )
    extra = sorted(set(header) - {"__metadata__", "lengths", "exponents", "q"})
    if extra:
        raise _damaged(name, f"it has tensors that a delta does not have ({', '.join(map(ascii, extra[:3]))})")
    return header


def _no_twins(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _read_lengths(file: BinaryIO, rest: int, shape: tuple[int, int, int], name: str) -> tuple[I64, bytes]:
    """`lengths` int64 [pools, L] and their bytes, of the `rest` bytes behind the header."""
    pools, blocks, size = shape
    kind = np.dtype(length_type(size))
    if pools * blocks * (kind.itemsize + 1) > rest:
        raise _damaged(name, f"it has {rest} bytes behind its header, too few for {pools} pools of {blocks} blocks")
    if pools * blocks * size > MOST_COEFFICIENTS:
        raise _damaged(name, f"it has more than {MOST_COEFFICIENTS:,} coefficients")
    start = file.read(pools * blocks * kind.itemsize)
    if len(start) != pools * blocks * kind.itemsize:
        raise _damaged(name, "it became shorter while it was read")
    lengths = np.frombuffer(start, dtype=kind).reshape(pools, blocks)
    if (lengths > size).any():
        raise _damaged(name, f"a block has {int(lengths.max())} coefficients and its pool {size} seeds")
    return lengths.astype(np.int64), start


def _read_rest(file: BinaryIO, rest: int, header: Mapping[str, Any], lengths: I64, fields: _Fields, name: str) -> bytes:
    """What follows the lengths, if the tensors are declared as `encode` does and take the file as it is."""
    size, bits = fields.shape()[2], fields.bits()
    expected = declared(lengths, size, bits)
    for key, one in expected.items():
        if header.get(key) != one:
            raise _damaged(name, f"its tensor {key} is not {one['dtype']} {one['shape']} at {one['data_offsets']}")
    announced = lengths.size + packed_length(int(lengths.sum()), bits)
    if announced != rest:
        raise _damaged(name, f"it has {rest} bytes behind its lengths and announces {announced}")
    if too_large(lengths, size, bits):
        raise _damaged(name, f"its coefficients would take more memory than {rest} bytes of them may")
    body = file.read(rest)
    if len(body) != rest:
        raise _damaged(name, "it became shorter while it was read")
    return body


def _tensors(body: bytes, lengths: I64, fields: _Fields, name: str) -> tuple[list[Whole], I32]:
    """q [L, K] of each pool and exponents int32 [pools, L], if their values are those of a grid."""
    (pools, blocks, size), bits = fields.shape(), fields.bits()
    if not (lengths > 0).any(axis=1).all():
        raise _damaged(name, "a pool has no coefficient")
    start = lengths.size * np.dtype(length_type(size)).itemsize
    exponents = np.frombuffer(body, dtype="<i1", count=lengths.size, offset=start).astype(np.int32).reshape(pools, blocks)
    if (exponents < MIN_EXPONENT).any() or (exponents > MAX_EXPONENT).any():
        raise _damaged(name, f"an exponent is outside {MIN_EXPONENT} .. {MAX_EXPONENT}")
    if (exponents[lengths == 0] != 0).any():
        raise _damaged(name, "a block without coefficients has an exponent")
    try:
        values = unpack_integers(memoryview(body)[start + lengths.size :], int(lengths.sum()), bits)
    except MalformedMessageError:
        raise _damaged(name, "a coefficient is outside its grid, or bits behind the last one are set") from None
    return list(_spread(values, lengths, size)), exponents


def _spread(values: Whole, lengths: I64, size: int) -> Iterator[Whole]:
    """Pool by pool [L, K], the numbers of a block first and zeros behind them."""
    done = 0
    for of_pool in lengths:
        q: Whole = room((len(of_pool), size), values.dtype)
        for row, length in zip(q, of_pool, strict=True):
            row[:length] = values[done : done + length]
            row[length:] = 0
            done += int(length)
        yield q


class _Fields:
    """The metadata of a delta, read field by field; whatever does not have its form is refused by name."""

    def __init__(self, metadata: Mapping[str, Any], name: str) -> None:
        self._metadata, self._name = metadata, name

    def check_format(self) -> None:
        version = self._metadata.get("version")
        if version != str(VERSION):
            wrote = ascii(self._metadata.get("fedtune"))[:20]
            raise DeltaMismatchError(
                f"{self._name} has format {ascii(version)[:20]}, this program reads '{VERSION}': export the run again "
                f"with this program, or use the fedtune that wrote it ({wrote}).",
                version=version,
            )
        wrong = sorted(set(self._metadata) ^ set(KEYS))
        if wrong:
            raise _damaged(self._name, f"its metadata has a field too many or too few ({ascii(wrong[0])[:40]})")

    def text(self, key: str) -> str:
        value = self._metadata[key]
        if not isinstance(value, str) or not value.isprintable() or not 1 <= len(value) <= LONGEST_NAME:
            raise _damaged(self._name, f"its {key} is not a name of 1 to {LONGEST_NAME} characters")
        return value

    def choice(self, key: str) -> Any:
        value = self._metadata[key]
        if value not in _CHOICES[key]:
            raise _damaged(self._name, f"its {key} is {ascii(value)[:40]}, not one of {', '.join(_CHOICES[key])}")
        return value

    def digest(self, key: str) -> bytes:
        value = self._metadata[key]
        if not isinstance(value, str) or not re.fullmatch("[0-9a-f]{32}", value):
            raise _damaged(self._name, f"its {key} is not 32 hexadecimal digits")
        return bytes.fromhex(value)

    def number(self, key: str, least: int, most: int) -> int:
        return self._whole(key, self._metadata[key], least, most)

    def sizes(self, key: str) -> tuple[int, ...]:
        return tuple(self._whole(key, part, 1, 2**48) for part in self._parts(key, MOST_BLOCKS))

    def pools(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Numbers, ascending, and seeds of the pools; none if the model is the base."""
        if self._metadata["pools"] == "":
            return (), ()
        pairs = [part.partition(":")[::2] for part in self._parts("pools", MOST_POOLS)]
        numbers = tuple(self._whole("pools", number, 0, 2**31) for number, _ in pairs)
        if any(after <= before for before, after in pairwise(numbers)):
            raise _damaged(self._name, "its pools are not in order")
        return numbers, tuple(self._whole("pools", seed, 0, 2**64 - 1) for _, seed in pairs)

    def shape(self) -> tuple[int, int, int]:
        """Pools, L, K."""
        return len(self.pools()[0]), len(self.sizes("block_sizes")), self.number("K", 1, self.most())

    def most(self) -> int:
        """The largest K of the family."""
        return MAX_AXES if self.choice("family") in DISJOINT else MAX_POOL

    def bits(self) -> int:
        """Of each coefficient."""
        return self.number("bits", FEWEST_BITS, MOST_BITS)

    def delta(self, q: Sequence[Whole], exponents: I32) -> Delta:
        """The delta with these coefficients, [L, K] of each pool and [pools, L]."""
        family, size = self.choice("family"), self.number("K", 1, self.most())
        rank = self.number("rank", 1, 256 if family == "lowrank" else 1)
        numbers, seeds = self.pools()
        pools = (Pool(family, seed, size, rank=rank) for seed in seeds)
        return Delta(
            base=self.text("base"),
            dtype=self.choice("dtype"),
            fingerprint=self.digest("fingerprint"),
            tensors=self.digest("tensors"),
            layout=self.digest("layout"),
            block_rule=self.choice("block_rule"),
            block_sizes=self.sizes("block_sizes"),
            digest=self.digest("digest"),
            round=self.number("round", 0, 2**31),
            pool_every=self.number("pool_every", 0, 2**31),
            family=family,
            rank=rank,
            size=size,
            numbers=numbers,
            pools=tuple(PoolCoefficients(pool, *pair) for pool, *pair in zip(pools, q, exponents, strict=True)),
            program=self.text("fedtune"),
        )

    def _parts(self, key: str, most: int) -> list[str]:
        value = self._metadata[key]
        if not isinstance(value, str) or value.count(",") >= most:
            raise _damaged(self._name, f"its {key} is not a list of at most {most}")
        return value.split(",")

    def _whole(self, key: str, value: object, least: int, most: int) -> int:
        if not isinstance(value, str) or not re.fullmatch("0|[1-9][0-9]{0,19}", value) or not least <= int(value) <= most:
            raise _damaged(self._name, f"its {key} is {ascii(value)[:40]}, not a whole number of {least} to {most}")
        return int(value)


def _damaged(name: str, what: str) -> MalformedDeltaError:
    return MalformedDeltaError(f"{name} is not a sound delta: {what}. Get the file again, or export it again.", name=name)
