"""Arguments of a call -> ``NormInputs``, or one sentence: what was given, what was expected, what to do.

Reads shapes and dtypes only.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._shared.arguments import DTYPES, autocast_dtype, described
from .types import DROP_PATH_IS_CONSTANT, NormInputs


def validated(
    x: Tensor,
    branch: Tensor | None,
    *,
    layer_scale: Tensor | None,
    drop_path: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    rms: bool,
) -> NormInputs:
    """The call as every backend takes it.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"x must be a [batch, tokens, channels] tensor, got {described(x)}")
    if x.dtype not in DTYPES:
        raise TypeError(f"x must be fp32, fp16, bf16 or fp64, got {described(x)}")
    batch, tokens, channels = x.shape
    if not (tokens and channels):
        raise ValueError(f"there must be at least one token and channel, got x {described(x)}")
    if branch is None:
        for name, factor in (("layer_scale", layer_scale), ("drop_path", drop_path)):
            if factor is not None:
                raise ValueError(f"{name} was given without the branch it multiplies; give branch, or leave it out")
    else:
        _check("branch", branch, x, (batch, tokens, channels), "x's shape")
    _check("weight", weight, x, (channels,), "one number a channel")
    if bias is not None:
        _check("bias", bias, x, (channels,), "one number a channel")
    if layer_scale is not None:
        _check("layer_scale", layer_scale, x, (channels,), "one number a channel")
    if drop_path is not None:
        _check("drop_path", drop_path, x, (batch,), "one factor a sample")
        if drop_path.requires_grad:
            raise ValueError(DROP_PATH_IS_CONSTANT)
    if not isinstance(rms, bool):
        raise TypeError(f"rms must be True for RMSNorm or False for LayerNorm, got {rms!r}")
    if rms and bias is not None:
        raise ValueError("RMSNorm has no bias; leave bias out, or take rms=False for LayerNorm")
    if isinstance(eps, bool) or not isinstance(eps, float | int) or not 0.0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}")
    return NormInputs(x, branch, layer_scale, drop_path, weight, bias, float(eps), rms, _normalized_dtype(x))


def _check(name: str, tensor: Tensor, x: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.shape != shape or tensor.device != x.device:
        raise ValueError(f"{name} must be {list(shape)} on {x.device}, {meaning}, got {described(tensor)}")
    if tensor.dtype not in DTYPES or (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        wanted = "fp64, as x is" if x.dtype == torch.float64 else "fp32, fp16 or bf16, since x is not fp64"
        raise TypeError(f"{name} must be {wanted}, got {described(tensor)}")


def _normalized_dtype(x: Tensor) -> torch.dtype:
    """Under autocast the matrix product that comes next would cast what it takes; so it is written that way at once."""
    dtype = autocast_dtype(x)
    return x.dtype if dtype is None or x.dtype == torch.float64 else dtype
