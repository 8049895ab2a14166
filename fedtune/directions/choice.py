"""Which kernels work on the tensors of a device, and why.

numba       on the CPU, in place
triton      on a CUDA device, in place
torch       on any other device, and on CUDA where Triton cannot run: ordinary torch operations there
host        families that torch's own CPU generator draws, and axes, on any other device: chunk by chunk through host memory;
            slow

Of family lowrank the last word is the device's matrix products; triton and torch say what makes its factors.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from functools import lru_cache

import torch

from fedtune.directions.backends import Backend
from fedtune.directions.base import DISJOINT, Family
from fedtune.directions.factors import Fill
from fedtune.directions.host import HostBackend
from fedtune.directions.rows import RowsBackend
from fedtune.errors import DirectionsError

KERNELS = ("numba", "triton", "torch", "host")
COUNTED = ("hadamard", "rademacher", "gaussian", "lowrank")  # families that triton and torch have
OLDEST_TRITON = (3, 6)
OLDEST_DEVICE = (8, 0)  # compute capability, Triton's own bound


def choose_kernels(device: torch.device, family: str) -> tuple[str, str]:
    """(name, reason) of the kernels for tensors on `device`."""
    if device.type == "cpu":
        return "numba", "the tensors are on the CPU"
    if family in DISJOINT:
        return "host", f"family {family} adds a number to each weight, which is not worth kernels of its own"
    if family not in COUNTED:
        return "host", f"family {family} is drawn on the CPU, so tensors go through host memory, slowly"
    missing = _missing_for_triton(device)
    if missing is None:
        return "triton", "the tensors are on a CUDA device"
    return "torch", f"{missing}, so torch operations work on the device, more slowly than kernels"


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
    if name in ("numba", "host"):
        return RowsBackend(family) if family.shaped else HostBackend(family)
    if family.name not in COUNTED:
        raise DirectionsError(
            f"Family '{family.name}' has no {name} kernels, only {', '.join(COUNTED)} have: use 'host'.", family=family.name
        )
    plain = _plain(name, family)
    from fedtune.directions.lowrank import Lowrank
    from fedtune.directions.products import ProductsBackend

    return ProductsBackend(family, plain, _fill(name)) if isinstance(family, Lowrank) else plain


@lru_cache(maxsize=8)
def filler(device: torch.device) -> Fill:
    """What makes the factors of family lowrank on `device`: one call of it is a launch, so the choice is kept."""
    return _fill(choose_kernels(device, "lowrank")[0])


def _plain(name: str, family: Family) -> Backend:
    if name == "torch":
        from fedtune.directions.torch_ops.backend import TorchBackend

        return TorchBackend(family.pool)
    from fedtune.directions.gpu.backend import TritonBackend

    return TritonBackend(family.pool)


def _fill(name: str) -> Fill:
    if name == "triton":
        from fedtune.directions.gpu.factors import fill
    elif name == "torch":
        from fedtune.directions.torch_ops.factors import fill
    else:
        from fedtune.directions.factors import fill
    return fill


def _missing_for_triton(device: torch.device) -> str | None:
    """What keeps Triton from working on `device`; None if nothing does."""
    if device.type != "cuda" or torch.version.cuda is None:
        return f"there are no kernels for {'ROCm' if device.type == 'cuda' else device.type}"
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
