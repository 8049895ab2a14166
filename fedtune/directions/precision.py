"""Matrix products in full float32, whatever a program allows elsewhere: TF32 and bfloat16 are too coarse for weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CUDA: Any = torch.backends.cuda.matmul
_ONEDNN: Any = torch.backends.mkldnn
_settings = threading.RLock()  # they are the process's: restored by one thread while another multiplies, they would be lost


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside it, float32 products are float32 products; the settings that were there come back afterwards."""
    with _settings:
        cuda, onednn = _CUDA.fp32_precision, _ONEDNN.matmul.fp32_precision
        overall = _overall()
        torch.set_float32_matmul_precision("highest")  # sets the other two as well
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(overall)
            _CUDA.fp32_precision = cuda
            _ONEDNN.matmul.fp32_precision = onednn


def _overall() -> str:
    """The older of torch's settings. It cannot be read where the newer one alone allows TF32; then it is as it began."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return "highest"
