"""This library's Triton kernels, forward and backward. Importing this package does not import triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ....._runtime import triton_mode
from ....._runtime.dispatch import Request, Requirements, unmet
from ....._runtime.launch import Launch, run_all
from ... import features
from ...types import NormGradients, NormGradInputs, NormInputs, NormOutputs

NAME = "triton"
OPAQUE = True
REQUIREMENTS = Requirements(
    # In Triton's interpreter the kernels run on CPU tensors; it holds bf16 as raw bits and computes garbage with it.
    devices=("cpu",) if triton_mode.INTERPRETING else ("cuda",),
    dtypes=(torch.float32, torch.float16)
    if triton_mode.INTERPRETING
    else (torch.float32, torch.float16, torch.bfloat16),
    features=() if triton_mode.INTERPRETING else (features.MIXED_BF16,),
    min_capability=(8, 0),
    channels=(1, 4096),  # a token lies in the registers of one program
)


def not_supported_reasons(request: Request) -> list[str]:
    reasons = unmet(REQUIREMENTS, request)
    if request.device in REQUIREMENTS.devices:
        reasons += triton_mode.faults()
    return reasons


def not_default_reasons(request: Request) -> list[str]:
    if triton_mode.INTERPRETING:
        return ["has not been measured on the interpreter, which is slow; name it to use it"]
    major, minor = request.capability
    return [f"has not been measured on compute capability {major}.{minor} yet; name it to use it"]


def forward(inputs: NormInputs) -> NormOutputs:
    """The residual, its norm and the statistics of its tokens."""
    from .forward_kernel import forward_launches

    outputs = _allocate(inputs)
    run_all(forward_launches(inputs, outputs), inputs.x)
    return outputs


def backward(inputs: NormGradInputs, gradients: NormGradients) -> None:
    """Fill the contiguous gradients that are not ``None``."""
    from .backward_kernels import backward_launches

    run_all(backward_launches(inputs, gradients), inputs.residual)


def launches(inputs: NormInputs) -> list[Launch]:
    """Every kernel that a forward and a full backward of this call would launch, without running any.

    Works on ``meta`` tensors, so kernels can be compiled for GPUs that are not there.
    """
    from .backward_kernels import backward_launches
    from .forward_kernel import forward_launches

    outputs = _allocate(inputs)
    residual = inputs.x if outputs.residual is None else outputs.residual
    grad_inputs = NormGradInputs(
        None if inputs.branch is None else torch.empty_like(residual),
        torch.empty_like(outputs.normalized),
        residual,
        outputs.mean,
        outputs.rstd,
        inputs.branch,
        inputs.layer_scale,
        inputs.drop_path,
        inputs.weight,
    )
    given = (inputs.x, inputs.branch, inputs.layer_scale, inputs.weight, inputs.bias)
    gradients = NormGradients(*(None if x is None else x.new_empty(x.shape) for x in given))
    return [*forward_launches(inputs, outputs), *backward_launches(grad_inputs, gradients)]


def _allocate(inputs: NormInputs) -> NormOutputs:
    x = inputs.x

    def statistic() -> Tensor:
        return x.new_empty(x.shape[:2], dtype=torch.float32)

    return NormOutputs(
        None if inputs.branch is None else x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=inputs.dtype),
        statistic(),
        None if inputs.rms else statistic(),
        statistic(),
    )
