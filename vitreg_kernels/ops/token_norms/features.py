"""What a call can ask of a backend beyond plain inputs: the vocabulary of ``Requirements`` and of error messages."""

from __future__ import annotations

from torch import Tensor

from ...dispatch import Request, preferences
from .._shared import observers
from .._shared.capability import capability

STATISTICS = "statistics"

ALL = (STATISTICS,)


def norms_request(x: Tensor) -> Request:
    """What the norms of validated tokens ``[B, N, C]`` need of a backend."""
    images, tokens, channels = x.shape
    return _request(x, images, tokens, channels, ())


def statistics_request(norms: Tensor) -> Request:
    """What counting norms ``[B, N]`` needs of a backend."""
    images, tokens = norms.shape
    return _request(norms, images, tokens, None, (STATISTICS,))


def statistics_reasons(request: Request) -> list[str]:
    """Why no backend could count norms on a device, or in a graph."""
    reasons = []
    if STATISTICS in request.features:
        if request.device == "mps":
            reasons.append("statistics add up in fp64, which MPS does not have; move the norms to the CPU")
        if observers.ONNX in request.features:
            reasons.append("an ONNX graph cannot count; remove the monitor before the export")
    return reasons


def _request(x: Tensor, images: int, tokens: int, channels: int | None, features: tuple[str, ...]) -> Request:
    features += observers.present(gradients=False)
    of_gpu = capability(x.device)
    request = Request("token_norms", x.device.type, of_gpu, x.dtype, None, channels, features)
    workload = preferences.workload(request, x.device, tokens, images, ())
    return request if workload is None else request._replace(workload=workload)
