"""This library's Triton kernels, forward and backward. Importing this package does not import triton.

Not here: how a launch reaches a GPU, the interpreter or the offline compiler (``_triton``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....._triton import mode
from ....._triton.launch import Launch
from ....._triton.replay import run_launches
from .....dispatch import Backend
from ...._shared import requirements
from ... import features
from ...types import NormGradients, NormGradInputs, NormInputs, NormOutputs
from .plan import ParameterSums, empty_sums


def forward(inputs: NormInputs) -> NormOutputs:
    """The residual, its norm and the statistics of its tokens."""
    outputs = _allocate(inputs)
    run_launches(_forward_launches, inputs, outputs)
    return outputs


def backward(inputs: NormGradInputs, gradients: NormGradients) -> None:
    """Fill the contiguous gradients that are not ``None``."""
    run_launches(_backward_launches, inputs, gradients, empty_sums(inputs, gradients))


def launches(inputs: NormInputs) -> list[Launch]:
    """Every kernel that a forward and a full backward of this call would launch, without running any.

    Works on ``meta`` tensors, so kernels can be compiled for GPUs that are not there.
    """
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
    sums = empty_sums(grad_inputs, gradients)
    return [*_forward_launches(inputs, outputs), *_backward_launches(grad_inputs, gradients, sums)]


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


def _forward_launches(inputs: NormInputs, outputs: NormOutputs) -> list[Launch]:
    from .forward_kernel import forward_launches

    return forward_launches(inputs, outputs)


def _backward_launches(inputs: NormGradInputs, gradients: NormGradients, sums: ParameterSums) -> list[Launch]:
    from .backward_kernels import backward_launches

    return backward_launches(inputs, gradients, sums)


BACKEND = Backend(
    name="triton",
    requirements=requirements.on_triton(features.ALL, channels=(1, 4096), not_interpreted=(features.MIXED_BF16,)),
    forward=forward,
    backward=backward,
    opaque=True,
    default=requirements.TRITON_DEFAULT,
    faults=mode.faults,
)
