"""Bits of the numbers in messages: whole numbers of b bits, scalars one by one, and coordinates block by block.

    whole numbers   b bits each, lowest bit first, plus 2^(b-1)
    scalars         32: float32. 16: its upper half (bfloat16). 8: the upper half of a float16 (1 sign, 5 exponent and 2
                    fraction bits), so within 1/8 of the value. All rounded to the nearest, halves to the even neighbour
    blocks          32, 16: as scalars. 8, 4: a unit for each block, and whole numbers of so many bits in that unit.
                    2, 1: odd numbers of units, +-1 and +-3 or +-1, the unit being what leaves the least error

A scalar is rounded on its own, before it is used, so a client's path is what its message says. The coordinates of a block
are measured together, and share a unit. What is read takes a small multiple of the bytes that it is read from.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.directions.base import F32
from fedtune.errors import MalformedMessageError
from fedtune.pieces import Buffer, joined, pieces
from fedtune.scratch import room

I64 = npt.NDArray[np.int64]
Whole = npt.NDArray[np.signedinteger[Any]]
LARGEST_8 = 57344.0
"""The largest scalar of 8 bits; what is larger is sent as this."""
UNIT_BITS = 16
ODD_BITS = (1, 2)  # so few that no level is spent on zero
LLOYD_STEPS = 12  # from the unit of one bit; the error changes by less than a thousandth then
AT_ONCE = 1 << 14  # numbers, a multiple of 8, whose bits are spread at a time
WHOLE_BYTES = {8: "<u1", 16: "<u2", 32: "<u4"}  # widths whose bit planes are numbers of numpy


def packed_length(count: int, bits: int) -> int:
    """Bytes of `count` numbers of `bits` bits."""
    return (count * bits + 7) // 8


class Reader:
    """Takes bytes from the front of a message and refuses to run past its end."""

    def __init__(self, data: Buffer) -> None:
        self._data, self._at, self._spent = memoryview(data), 0, 0

    def take(self, length: int) -> memoryview:
        """The next `length` bytes, where they are. Raises MalformedMessageError."""
        if length > len(self._data) - self._at:
            raise MalformedMessageError(
                f"The message ends after {len(self._data)} bytes; {self._at + length} were announced.",
                length=len(self._data),
            )
        taken = self._data[self._at : self._at + length]
        self._at += length
        return taken

    def unpack(self, layout: struct.Struct) -> tuple[Any, ...]:
        """The next fields."""
        return layout.unpack(self.take(layout.size))

    def spend(self, size: int, most: int) -> None:
        """Count `size` bytes of memory that the message takes besides its own; raises MalformedMessageError above `most`."""
        self._spent += size
        if self._spent > most:
            raise MalformedMessageError(
                f"The message would take {self._spent:,} bytes of memory when it is read; {most:,} are the most.",
                bytes=self._spent,
            )

    def finish(self) -> None:
        """Raises MalformedMessageError if anything is left."""
        if self._at != len(self._data):
            raise MalformedMessageError(f"The message has {len(self._data)} bytes; {self._at} were announced.")


# ---------------------------------------------------------------------------------------------------- whole numbers


def pack_integers(q: Whole, bits: int) -> bytes:
    """Whole numbers [n], each in -2^(bits-1)+1 .. 2^(bits-1)-1, to ceil(n * bits / 8) bytes, lowest bit first."""
    return joined(integers_packed(q, bits))


def integers_packed(q: Whole, bits: int) -> Iterator[bytes]:
    """`pack_integers`, piece by piece."""
    if bits in WHOLE_BYTES:
        return (_flipped(piece.astype(WHOLE_BYTES[bits]), bits).tobytes() for piece in pieces(q))
    return (_planes(piece, bits) for piece in pieces(q, AT_ONCE))


def _planes(q: Whole, bits: int) -> bytes:
    shifted = (q.astype(np.int64) + (1 << (bits - 1))).astype(np.uint32)
    planes = ((shifted[:, None] >> np.arange(bits, dtype=np.uint32)) & 1).astype(np.uint8)
    return np.packbits(planes.reshape(-1), bitorder="little").tobytes()


def unpack_integers(data: Buffer, count: int, bits: int) -> Whole:
    """The inverse of `pack_integers`, of the narrowest type. Raises MalformedMessageError for what it never writes.

    Besides what is returned it takes a few hundred kilobytes, however long `data` is.
    """
    if bits in WHOLE_BYTES:
        raw, found = np.frombuffer(data, dtype=WHOLE_BYTES[bits])[:count], room((count,), narrowest(bits))
        for part, piece in zip(pieces(found), pieces(raw), strict=True):
            if not piece.all():
                raise MalformedMessageError("A coefficient is outside its grid.")
            part[:] = _flipped(piece, bits).view(part.dtype)
        return found
    packed, found = np.frombuffer(data, dtype=np.uint8), np.empty(count, dtype=narrowest(bits))
    for start in range(0, count, AT_ONCE):
        part = found[start : start + AT_ONCE]
        _fill(part, packed[start * bits // 8 : packed_length(start + len(part), bits)], bits)
    return found


def _fill(part: Whole, packed: npt.NDArray[np.uint8], bits: int) -> None:
    flat = np.unpackbits(packed, bitorder="little")
    if flat[len(part) * bits :].any():
        raise MalformedMessageError("Padding bits are set.")
    planes = flat[: len(part) * bits].reshape(len(part), bits)
    values = np.zeros(len(part), dtype=np.int32)
    for bit in range(bits):
        values |= planes[:, bit].astype(np.int32) << bit
    if len(values) and int(values.min()) == 0:
        raise MalformedMessageError("A coefficient is outside its grid.")
    part[:] = values - (1 << (bits - 1))


def narrowest(bits: int) -> type[np.signedinteger[Any]]:
    """The type for whole numbers of so many bits."""
    return np.int8 if bits <= 8 else np.int16 if bits <= 16 else np.int32


def _flipped(values: npt.NDArray[Any], bits: int) -> npt.NDArray[Any]:
    """With the highest bit changed, which adds or takes 2^(bits-1)."""
    flipped: npt.NDArray[Any] = values ^ np.dtype(WHOLE_BYTES[bits]).type(1 << (bits - 1))
    return flipped


# ---------------------------------------------------------------------------------------------------- scalars


def round_scalars(values: F32, bits: int) -> F32:
    """The float32 values that survive the wire at `bits` per scalar; one that is not finite stays so."""
    return unpack_scalars(pack_scalars(values, bits), bits)


def pack_scalars(values: F32, bits: int) -> bytes:
    """float32 [n] to n * bits / 8 bytes; `bits` is 32, 16 or 8."""
    return joined(scalars_packed(values, bits))


def scalars_packed(values: F32, bits: int) -> Iterator[bytes]:
    """`pack_scalars`, piece by piece."""
    return (_pack_scalars(piece, bits) for piece in pieces(values))


def _pack_scalars(values: F32, bits: int) -> bytes:
    plain = np.ascontiguousarray(values, dtype="<f4")
    if bits == 32:
        return plain.tobytes()
    if bits == 8:
        finite = np.isfinite(plain)
        inside = np.where(finite, np.clip(plain, -LARGEST_8, LARGEST_8), plain)
        raw = inside.astype("<f2").view("<u2").astype(np.uint32)
        upper = np.where(finite, (raw + 0x7F + ((raw >> 8) & 1)) >> 8, np.where(np.isnan(plain), 0x7E, raw >> 8))
        return upper.astype(np.uint8).tobytes()
    wide = plain.view("<u4").astype(np.uint64)
    rounded = (wide + 0x7FFF + ((wide >> 16) & 1)) >> 16
    quiet = (wide >> 16) | 0x40  # a NaN whose lower bits are set would be rounded up to a zero, or down to an infinity
    return np.where(np.isnan(plain), quiet, rounded).astype("<u2").tobytes()


def unpack_scalars(data: Buffer, bits: int) -> F32:
    """The inverse of `pack_scalars`; at 32 bits they may share `data`."""
    if bits == 32:
        return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
    if bits == 8:
        return (np.frombuffer(data, dtype=np.uint8).astype(np.uint16) << 8).view(np.float16).astype(np.float32)
    return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)


# ---------------------------------------------------------------------------------------------------- blocks


def pack_blocks(values: F32, counts: I64, bits: int) -> bytes:
    """float32 [sum of counts], block by block, to bytes; `bits` is 32, 16, 8, 4, 2 or 1.

    At 8 and 4 bits a number is q * unit, |q| <= 2^(bits-1) - 1, and the unit is the smallest bfloat16 that holds the
    block's largest number. At 2 and 1 bits it is (2 q + 1) * unit, -2^(bits-1) <= q < 2^(bits-1). Numbers that are not
    finite make the unit so.
    """
    if bits >= UNIT_BITS:
        return pack_scalars(values, bits)
    if bits in ODD_BITS:
        return _pack_odd(values, counts, bits)
    limit = 2 ** (bits - 1) - 1
    largest = np.zeros(len(counts), dtype=np.float32)
    owner = np.repeat(np.arange(len(counts)), counts)
    with np.errstate(invalid="ignore"):  # a signalling NaN makes the unit NaN as any other does
        np.maximum.at(largest, owner, np.abs(values, dtype=np.float32))
        units = _rounded_up(largest / np.float32(limit))
    each = units[owner]
    usable = np.isfinite(each) & (each > 0)
    quotients = np.divide(values, each, out=np.zeros(len(values), np.float32), where=usable)
    q = np.clip(np.rint(quotients), -limit, limit).astype(np.int32)
    return pack_scalars(units, UNIT_BITS) + pack_integers(q, bits)


def unpack_blocks(reader: Reader, counts: I64, bits: int) -> F32:
    """The inverse of `pack_blocks`, from the front of a message. Raises MalformedMessageError."""
    total = int(counts.sum())
    if bits >= UNIT_BITS:
        return unpack_scalars(reader.take(packed_length(total, bits)), bits)
    units = unpack_scalars(reader.take(2 * len(counts)), UNIT_BITS)
    if (units < 0).any():
        raise MalformedMessageError("A block's unit is negative.")
    if bits in ODD_BITS:
        codes = _codes(reader.take(packed_length(total, bits)), total, bits)
        odd = (2 * codes - (2**bits - 1)).astype(np.float32)
        with np.errstate(invalid="ignore"):
            return np.asarray(odd * np.repeat(units, counts), dtype=np.float32)
    q = unpack_integers(reader.take(packed_length(total, bits)), total, bits)
    with np.errstate(invalid="ignore"):  # 0 times infinity: the caller refuses what is not finite
        return np.asarray(q.astype(np.float32) * np.repeat(units, counts), dtype=np.float32)


def _pack_odd(values: F32, counts: I64, bits: int) -> bytes:
    """Lloyd's rule for the unit u of a block: numbers to their nearest level s u, s odd, then u = sum |x| s / sum s^2."""
    owner, sizes = np.repeat(np.arange(len(counts)), counts), np.abs(values, dtype=np.float64)
    levels = np.ones(len(values))
    unit = np.zeros(len(counts))
    for _ in range(LLOYD_STEPS if bits > 1 else 1):
        weight = np.bincount(owner, levels * levels, len(counts))
        with np.errstate(invalid="ignore"):
            unit = np.bincount(owner, sizes * levels, len(counts)) / np.maximum(weight, 1.0)
        each = unit[owner]
        usable = np.isfinite(each) & (each > 0)
        quotients = np.divide(sizes, 2 * each, out=np.zeros(len(values)), where=usable)
        levels = 2 * np.minimum(np.floor(quotients), 2 ** (bits - 1) - 1) + 1
    odd = np.where(np.signbit(values), -levels, levels).astype(np.int64)
    codes = (odd + 2**bits - 1) // 2
    units = pack_scalars(unit.astype(np.float32), UNIT_BITS)
    return units + _planes(codes - (1 << (bits - 1)), bits)


def _codes(data: Buffer, count: int, bits: int) -> npt.NDArray[np.int64]:
    """The numbers 0 .. 2^bits - 1 that are packed. Raises MalformedMessageError."""
    flat = np.unpackbits(np.frombuffer(data, dtype=np.uint8), bitorder="little")
    if flat[count * bits :].any():
        raise MalformedMessageError("Padding bits are set.")
    planes = flat[: count * bits].reshape(count, bits).astype(np.int64)
    return np.asarray(planes @ (1 << np.arange(bits)))


def _rounded_up(values: F32) -> F32:
    """The smallest bfloat16 not below each value, as float32; values are not negative."""
    raw = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    upper = (raw.astype(np.uint64) + 0xFFFF) >> 16
    finite = np.isfinite(values)
    kept = np.where(finite, upper, raw >> 16 | np.where(np.isnan(values), 1, 0)).astype(np.uint32)
    return (kept << 16).view(np.float32)
