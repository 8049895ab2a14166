"""A fingerprint of a model folder's weights: names, types, shapes and bits of all tensors, however they are cut into files.

It needs no memory for the model and no transformers, so that a node can compare its copy with the server's before
anything starts. (The runtime compares the loaded parameters again, for the dtype of the run.)
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from fedtune.errors import ModelError
from fedtune.regular import ANY, open_regular

CHUNK = 1 << 24  # bytes read at a time
LENGTH = 32  # hexadecimal digits
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


def weights_fingerprint(folder: Path) -> str:
    """The fingerprint in hexadecimal.

    Raises:
        ModelError: no folder, no *.safetensors in it, or one that is cut off or damaged.
    """
    if not folder.is_dir():
        raise ModelError(f"There is no model folder '{folder}': copy the model there, or correct the path.", model=str(folder))
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        raise ModelError(
            f"'{folder}' lacks config.json or *.safetensors: give a folder written by save_pretrained.", model=str(folder)
        )
    tensors = [line for path in files for line in _tensors(path)]
    return hashlib.sha256("\n".join(sorted(tensors)).encode()).hexdigest()[:LENGTH]


def _tensors(path: Path) -> list[str]:
    """One line a tensor: name, type, shape, digest of its bytes."""
    try:
        with open_regular(path, ANY) as file:
            size = int.from_bytes(file.read(8), "little")
            if size > LONGEST_HEADER:
                raise ValueError(f"a header of {size} bytes")
            header = json.loads(file.read(size))
            found = sorted((entry["data_offsets"], name, entry) for name, entry in header.items() if name != "__metadata__")
            return [
                f"{json.dumps(name)} {entry['dtype']} {entry['shape']} {_digest(file, 8 + size + begin, end - begin)}"
                for (begin, end), name, entry in found
            ]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"'{path}' is not a complete safetensors file ({error}): copy it again.", model=str(path)) from None


def _digest(file: BinaryIO, start: int, length: int) -> str:
    file.seek(start)
    digest = hashlib.sha256()
    while length > 0:
        piece = file.read(min(CHUNK, length))
        if not piece:
            raise ValueError("it ends too early")
        digest.update(piece)
        length -= len(piece)
    return digest.hexdigest()
