"""This library's C++ kernels for CPUs: each token is read once and written once, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._native import library
from ....dispatch import Backend
from ..._shared import requirements
from ..._shared.arguments import in_rows
from .. import features
from ..types import NormGradients, NormGradInputs, NormInputs, NormOutputs


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
    torch.ops.vitreg_cpu.residual_norm_forward(
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
    torch.ops.vitreg_cpu.residual_norm_backward(
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
    return None if x is None else in_rows(x)


def _in_single(x: Tensor | None) -> Tensor | None:
    """Parameters are small: they come in fp32, whatever they are kept in."""
    return None if x is None else x.to(torch.float32).contiguous()


BACKEND = Backend(
    name="cpu",
    requirements=requirements.on_cpu(features.ALL),
    forward=forward,
    backward=backward,
    opaque=True,
    faults=library.faults,
)
