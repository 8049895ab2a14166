"""Which kernels work on the tensors of a device, and why.

numba       on the CPU, in place
triton      on a CUDA device, in place: hadamard, rademacher and gaussian
host        on anything else: chunk by chunk through host memory, with the kernels of the CPU; slow
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil

import torch

from fedtune.directions.backends import Backend
from fedtune.directions.base import Family
from fedtune.directions.host import HostBackend
from fedtune.directions.rows import RowsBackend
from fedtune.errors import DirectionsError

KERNELS = ("numba", "triton", "host")
IN_TRITON = ("hadamard", "rademacher", "gaussian")
OLDEST_TRITON = (3, 6)
OLDEST_DEVICE = (8, 0)  # compute capability, Triton's own bound


def choose_kernels(device: torch.device, family: str) -> tuple[str, str]:
    """(name, reason) of the kernels for tensors on `device`."""
    if device.type == "cpu":
        return "numba", "the tensors are on the CPU"
    missing = _missing_for_triton(device, family)
    if missing is None:
        return "triton", "the tensors are on a CUDA device"
    return "host", f"{missing}, so tensors go through host memory, slowly"


def kernels_note(device: torch.device, family: str) -> str:
    """The choice in one line, as the notes of a run have it."""
    name, reason = choose_kernels(device, family)
    return f"kernels: {name} ({reason})"


def make_backend(name: str, family: Family) -> Backend:
    """The backend called `name`; Triton is imported here, by the first tensor that it works on.

    Raises:
        DirectionsError: no such kernels, or none of that name for the family.
    """
    if name not in KERNELS:
        raise DirectionsError(f"There are no kernels called '{name}': use one of {', '.join(KERNELS)}.", name=name)
    if name != "triton":
        return RowsBackend(family) if family.shaped else HostBackend(family)
    if family.name not in IN_TRITON:
        raise DirectionsError(
            f"Family '{family.name}' has no Triton kernels, only {', '.join(IN_TRITON)} have: use 'host'.", family=family.name
        )
    from fedtune.directions.gpu.backend import TritonBackend

    return TritonBackend(family.pool)


def _missing_for_triton(device: torch.device, family: str) -> str | None:  # noqa: PLR0911 - one reason each
    """What keeps Triton from working on `device`; None if nothing does."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"there are no kernels for {'ROCm' if device.type == 'cuda' else device.type}"
    if family not in IN_TRITON:
        return f"family {family} has no kernels for CUDA"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_DEVICE:
        return f"the device has compute capability {_dotted(capability)} and Triton needs {_dotted(OLDEST_DEVICE)}"
    try:
        version = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return f"Triton is not installed (pip install 'triton>={_dotted(OLDEST_TRITON)}')"
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TRITON:
        return f"Triton {version} is older than {_dotted(OLDEST_TRITON)}"
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "Triton needs a C compiler and there is no gcc or clang"
    return None


def _dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"
