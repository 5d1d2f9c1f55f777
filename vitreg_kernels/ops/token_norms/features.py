"""What a call can ask of a backend beyond plain inputs: the vocabulary of ``REQUIREMENTS`` and of error messages."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._runtime.dispatch import Request

STATISTICS = "statistics"

ALL = (STATISTICS,)


def norms_request(x: Tensor) -> Request:
    """What the norms of validated tokens ``[B, N, C]`` need of a backend."""
    return Request(x.device.type, _capability(x), x.dtype, channels=x.shape[-1])


def statistics_request(norms: Tensor) -> Request:
    """What counting norms ``[B, N]`` needs of a backend."""
    return Request(norms.device.type, _capability(norms), norms.dtype, features=(STATISTICS,))


def statistics_reasons(request: Request) -> list[str]:
    """Why no backend could count norms on a device."""
    no_double = request.device == "mps" and STATISTICS in request.features
    return ["statistics add up in fp64, which MPS does not have; move the norms to the CPU"] if no_double else []


def _capability(x: Tensor) -> tuple[int, int]:
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (0, 0)
