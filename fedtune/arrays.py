"""Named arrays as bytes in the format of safetensors: written piece by piece, read without a copy.

The arrays of a state can be as large as the model, so nothing here makes a second one. What is read may come from anybody:
the head is bounded, and the arrays must follow each other and end with the data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtune.bounded import BadJsonError, parse_json
from fedtune.pieces import Buffer, pieces

Array = npt.NDArray[np.floating[Any]]
DTYPES: dict[str, type[np.floating[Any]]] = {"F32": np.float32, "F64": np.float64}
LONGEST_HEAD = 1 << 16  # bytes; a state has a handful of arrays


def written(arrays: Mapping[str, Array]) -> Iterator[Buffer]:
    """The bytes of `arrays`, in the order of their names, a few megabytes at a time.

    >>> b"".join(written({"a": np.zeros((1, 2), dtype=np.float32)})).hex()[:16]
    '3800000000000000'
    """
    names = {np.dtype(kind): name for name, kind in DTYPES.items()}
    head, end = {}, 0
    for name in sorted(arrays):
        array = arrays[name]
        head[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [end, end + array.nbytes]}
        end += array.nbytes
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the arrays stand where their type may stand
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(arrays):
        for piece in pieces(np.ascontiguousarray(arrays[name]).reshape(-1)):
            yield piece.astype(piece.dtype.newbyteorder("<"), copy=False).view(np.uint8).data


def read(data: Buffer) -> dict[str, Array]:
    """The arrays in `data`, which they share. Raises ValueError for what `written` never writes."""
    length = int.from_bytes(data[:8], "little")
    if not 8 <= length + 8 <= len(data) or length > LONGEST_HEAD:
        raise ValueError(f"its head would have {length} bytes")
    try:
        head = parse_json(bytes(data[8 : 8 + length]))
    except BadJsonError as error:
        raise ValueError(f"its head is not JSON: {error}") from None
    if not isinstance(head, dict):
        raise ValueError("its head is no object")
    found: dict[str, Array] = {}
    end = 0
    for name, entry in head.items():
        kind, shape, size = _kind(entry)
        if entry["data_offsets"] != [end, end + size]:
            raise ValueError("its arrays do not follow each other")
        if 8 + length + end + size > len(data):
            raise ValueError("it ends within an array")
        found[name] = np.frombuffer(data, dtype=kind, count=prod(shape), offset=8 + length + end).reshape(shape)
        end += size
    if 8 + length + end != len(data):
        raise ValueError("it goes on after its last array")
    return found


def _kind(entry: object) -> tuple[np.dtype[Any], tuple[int, ...], int]:
    """(type, shape, bytes) of an array, from its entry in the head."""
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"} or entry["dtype"] not in DTYPES:
        raise ValueError("its head does not describe arrays of float32 or float64")
    shape = entry["shape"]
    if not isinstance(shape, list) or len(shape) > 2 or not all(type(size) is int and 0 <= size < 2**40 for size in shape):
        raise ValueError("its head has a shape that no array has")
    kind = np.dtype(DTYPES[entry["dtype"]]).newbyteorder("<")
    return kind, tuple(shape), prod(shape) * kind.itemsize
