"""The public function: validate, select a backend, run it."""

from __future__ import annotations

from torch import Tensor

from vitreg_kernels import dispatch
from vitreg_kernels.dispatch import Request
from vitreg_kernels.ops._shared import observers
from vitreg_kernels.ops._shared.arguments import DTYPES, described
from vitreg_kernels.ops._shared.capability import capability

from . import op
from .backends import BACKENDS


def unit_tokens(x: Tensor, *, backend: str | None = None) -> Tensor:
    """Each token at length 1, so that the product of two tokens is their cosine: ``unit @ unit.mT``.

    Args:
        x: ``[B, N, C]``; fp32, fp16, bf16 or fp64, any strides. A token of zeros stays one.
        backend: a backend's name, which then runs or raises; ``None`` takes the default for such a call.

    Returns:
        ``[B, N, C]`` in the dtype of ``x``, under autocast too; contiguous, and differentiable in ``x``.

    Raises:
        TypeError, ValueError: if x is no such tensor; nothing has run then.
        UnsupportedError: if the named backend, or every backend, cannot serve the call.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"x must be a [batch, tokens, channels] tensor, got {described(x)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp32, fp16, bf16 or fp64, got {described(x)}")
    chosen = dispatch.select(BACKENDS, request_of(x), backend)
    return op.unit_tokens(x, chosen.name) if chosen.opaque else chosen.forward(x)


def request_of(x: Tensor) -> Request:
    """What a call needs of a backend. Its features are those that all ops share: which transform or tracer sees it."""
    return Request(
        op="unit_tokens",
        device=x.device.type,
        capability=capability(x.device),
        dtype=x.dtype,
        channels=x.shape[2],
        features=observers.present(),
    )
