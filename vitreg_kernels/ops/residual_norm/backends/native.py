"""This library's native CPU kernels: each token is read once and written once, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._runtime import native
from ...._runtime.dispatch import Request, Requirements, unmet
from .. import features
from ..types import NormGradients, NormGradInputs, NormInputs, NormOutputs

NAME = "native"
OPAQUE = True
REQUIREMENTS = Requirements(
    devices=("cpu",), dtypes=(torch.float32, torch.float16, torch.bfloat16), features=features.ALL
)


def not_supported_reasons(request: Request) -> list[str]:
    reasons = unmet(REQUIREMENTS, request)
    if request.device in REQUIREMENTS.devices:
        reasons += native.faults()
    return reasons


def not_default_reasons(request: Request) -> list[str]:
    return []


def forward(inputs: NormInputs) -> NormOutputs:
    """The residual, its norm and the statistics of its tokens."""
    x = inputs.x

    def statistic() -> Tensor:
        return x.new_empty(x.shape[:2], dtype=torch.float32)

    outputs = NormOutputs(
        residual=None if inputs.branch is None else x.new_empty(x.shape),
        normalized=x.new_empty(x.shape, dtype=inputs.dtype),
        token_norms=statistic(),
        mean=None if inputs.rms else statistic(),
        rstd=statistic(),
    )
    torch.ops.vitreg_native.residual_norm_forward(
        _in_rows(x),
        _in_rows(inputs.branch),
        _in_single(inputs.layer_scale),
        _in_single(inputs.drop_path),
        _in_single(inputs.weight),
        _in_single(inputs.bias),
        inputs.eps,
        *outputs,
    )
    return outputs


def backward(inputs: NormGradInputs, gradients: NormGradients) -> None:
    """Fill the contiguous gradients that are not ``None``."""
    torch.ops.vitreg_native.residual_norm_backward(
        _in_rows(inputs.grad_residual),
        _in_rows(inputs.grad_normalized),
        _in_rows(inputs.residual),
        inputs.mean,
        inputs.rstd,
        _in_rows(inputs.branch) if gradients.layer_scale is not None else None,
        _in_single(inputs.layer_scale),
        _in_single(inputs.drop_path),
        _in_single(inputs.weight),
        *gradients,
    )


def _in_rows(x: Tensor | None) -> Tensor | None:
    return None if x is None else native.in_rows(x)


def _in_single(x: Tensor | None) -> Tensor | None:
    """Parameters are small: they come in fp32, whatever they are kept in."""
    return None if x is None else x.to(torch.float32).contiguous()
