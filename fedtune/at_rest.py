"""Tensors that are read only now and then, mapped from a file: their pages are clean, and the system may take them back.

The base model is read tensor by tensor when a replica is rebuilt and not in between. It is mapped from the model folder's
own safetensors wherever a file has a tensor of the same name, dtype, shape and bits. What has no such tensor (converted to
another dtype, renamed or merged while loading) is written once to a private file in the user's cache folder. That file
has no name from the moment it is opened (on Windows: until it is closed), so nothing is left of it, however the process
ends. What is smaller than IN_MEMORY stays in memory, where it costs less than a file.
"""

from __future__ import annotations

import json
import mmap
import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn import Parameter

from fedtune.errors import ModelError
from fedtune.scratch import IN_MEMORY, nameless_file

RELEASE = 1 << 20  # bytes from which the pages of a tensor are given back after use; smaller ones are not worth the call
PLACE = 64  # bytes at whose multiples tensors start in a private file
CHUNK = 1 << 24  # elements compared at a time
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # as safetensors names them


class _File:
    """One file, mapped as a whole; `writable`: what is written to its tensors goes to the file."""

    def __init__(self, file: BinaryIO, writable: bool = False) -> None:
        self._file = file
        weakref.finalize(self, file.close)
        self._memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_COPY)
        self._writable, self._stamp = writable, self._seen()

    def tensor(self, start: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.frombuffer(self._memory, dtype=dtype, count=prod(shape), offset=start).view(shape)

    def release(self, start: int, length: int) -> None:
        """Give the pages back; what was written to them is in the file."""
        if hasattr(mmap, "MADV_DONTNEED"):
            first = start // mmap.PAGESIZE * mmap.PAGESIZE
            self._memory.madvise(mmap.MADV_DONTNEED, first, start + length - first)

    def changed(self) -> bool:
        """Whether somebody else wrote to the file since it was opened."""
        return not self._writable and self._seen() != self._stamp

    def _seen(self) -> tuple[int, int]:
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


@dataclass(frozen=True)
class _Place:
    """Where a mapped tensor stands in its file."""

    file: _File
    start: int
    length: int


class AtRest:
    """Tensors in layout order, on the CPU; to be read, and `release`d after use.

    Attributes:
        tensors: as they were when they were stored; written only by the owner of a `blank` one.
    """

    def __init__(self, tensors: Sequence[Tensor], places: Sequence[_Place | None]) -> None:
        self.tensors, self._places = list(tensors), list(places)

    @classmethod
    def copy_of(cls, named: Sequence[tuple[str, Parameter]], folder: Path | None, in_memory: int = IN_MEMORY) -> AtRest:
        """The values that these parameters have now.

        Args:
            named: in layout order, with the names that they have in the model.
            folder: of the model; None if its weights came from no file.
            in_memory: bytes up to which those that are not in the folder stay in memory.

        Raises:
            ModelError: the cache folder has no room, or cannot be written.
        """
        found = _in_folder(named, folder) if folder else {}
        left = [index for index in range(len(named)) if index not in found]
        parameters = [parameter.detach() for _, parameter in named]
        rest = cls.blank([(tuple(parameters[i].shape), parameters[i].dtype) for i in left], in_memory)
        tensors, places = list(parameters), [found[i][1] if i in found else None for i in range(len(named))]
        for number, index in enumerate(left):
            rest.tensors[number].copy_(parameters[index])
            rest.release(number)
            places[index] = rest._places[number]
            tensors[index] = rest.tensors[number]
        for index, (tensor, _) in found.items():
            tensors[index] = tensor
        return cls(tensors, places)

    @classmethod
    def blank(cls, kinds: Sequence[tuple[tuple[int, ...], torch.dtype]], in_memory: int = IN_MEMORY) -> AtRest:
        """Tensors of these shapes and dtypes, to be written. Raises ModelError as `copy_of` does."""
        starts, end = [], 0
        for shape, dtype in kinds:
            starts.append(end)
            end += -(-prod(shape) * dtype.itemsize // PLACE) * PLACE
        if end <= in_memory:
            return cls([torch.empty(shape, dtype=dtype) for shape, dtype in kinds], [None] * len(kinds))
        file = _File(nameless_file(end), writable=True)
        places = [_Place(file, at, prod(shape) * dtype.itemsize) for at, (shape, dtype) in zip(starts, kinds, strict=True)]
        tensors = [_mapped(place, shape, dtype) for place, (shape, dtype) in zip(places, kinds, strict=True)]
        return cls(tensors, places)

    def __len__(self) -> int:
        return len(self.tensors)

    @property
    def in_memory(self) -> int:
        """Bytes of the tensors that are held in memory and not in a file."""
        pairs = zip(self.tensors, self._places, strict=True)
        return sum(tensor.numel() * tensor.element_size() for tensor, place in pairs if place is None)

    def release(self, index: int) -> None:
        """Say that tensor `index` is not needed for a while."""
        place = self._places[index]
        if place is not None and place.length >= RELEASE:
            place.file.release(place.start, place.length)

    def check(self) -> None:
        """Raise ModelError if a file of the model folder was written to since it was mapped."""
        files = {id(place.file): place.file for place in self._places if place is not None}
        if any(file.changed() for file in files.values()):
            raise ModelError(
                "A file of the model folder was changed while its weights are in use, so the base model is lost: "
                "put the file back and start again."
            )


# ---------------------------------------------------------------------------------------------------- the model folder


def _in_folder(named: Sequence[tuple[str, Parameter]], folder: Path) -> dict[int, tuple[Tensor, _Place]]:
    """By index: the parameters that stand in a safetensors file of `folder` with the bits that they have in memory."""
    wanted = {name: (index, parameter.detach()) for index, (name, parameter) in enumerate(named)}
    found: dict[int, tuple[Tensor, _Place]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = path.open("rb")
        try:
            entries = list(_entries(file))
            mapped = _File(file)
        except (ValueError, KeyError, TypeError, AttributeError):  # the loader has read what it needs: it skipped this one
            file.close()
            continue
        for name, shape, dtype, start in entries:
            index, parameter = wanted.get(name, (-1, torch.empty(0)))
            fits = tuple(parameter.shape) == shape and parameter.dtype == dtype and start % dtype.itemsize == 0
            if index >= 0 and index not in found and fits and parameter.numel():
                place = _Place(mapped, start, parameter.numel() * dtype.itemsize)
                tensor = _mapped(place, shape, dtype)
                if _same_bits(tensor, parameter):
                    found[index] = (tensor, place)
                if place.length >= RELEASE:
                    mapped.release(place.start, place.length)
    return found


def _entries(file: BinaryIO) -> Iterator[tuple[str, tuple[int, ...], torch.dtype, int]]:
    """(name, shape, dtype, first byte) of the tensors of a safetensors file whose dtype is one that is tuned."""
    length = int.from_bytes(file.read(8), "little")
    size = os.fstat(file.fileno()).st_size
    if not 0 < length <= size - 8:
        raise ValueError("not a safetensors file")
    for name, entry in json.loads(file.read(length)).items():
        dtype = DTYPES.get(entry.get("dtype", ""))
        if dtype is not None:
            shape, (start, end) = tuple(entry["shape"]), entry["data_offsets"]
            if end - start == prod(shape) * dtype.itemsize and 8 + length + end <= size:
                yield name, shape, dtype, 8 + length + start


def _same_bits(stored: Tensor, live: Tensor) -> bool:
    chunks = zip(torch.split(stored.view(-1), CHUNK), torch.split(live.reshape(-1), CHUNK), strict=True)
    whole = {4: torch.int32, 2: torch.int16}[stored.element_size()]
    return all(torch.equal(one.view(whole), other.cpu().contiguous().view(whole)) for one, other in chunks)


def _mapped(place: _Place, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return place.file.tensor(place.start, shape, dtype) if prod(shape) else torch.empty(shape, dtype=dtype)
