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
from ... import features, schema
from ...types import AssembleGradients, AssembleInputs, Sizes, sizes_of


def forward(inputs: AssembleInputs) -> Tensor:
    """The tokens, each element written once."""
    tokens = schema.empty_tokens(inputs)
    run_launches(_forward_launches, inputs, tokens)
    return tokens


def backward(grad_tokens: Tensor, sizes: Sizes, gradients: AssembleGradients) -> None:
    """Fill the contiguous gradients that are not ``None``."""
    run_launches(_backward_launches, grad_tokens, sizes, gradients)


def launches(inputs: AssembleInputs) -> list[Launch]:
    """Every kernel that a forward and a full backward of this call would launch, without running any.

    Works on ``meta`` tensors, so kernels can be compiled for GPUs that are not there.
    """
    tokens, sizes = schema.empty_tokens(inputs), sizes_of(*inputs)
    dtypes = (None if t is None else t.dtype for t in inputs[1:4])
    gradients = schema.empty_gradients(tokens, sizes, *dtypes)
    grad_tokens = torch.empty_like(tokens)
    return [*_forward_launches(inputs, tokens), *_backward_launches(grad_tokens, sizes, gradients)]


def _forward_launches(inputs: AssembleInputs, tokens: Tensor) -> list[Launch]:
    from .forward_kernel import forward_launch

    return [forward_launch(inputs, tokens)]


def _backward_launches(grad_tokens: Tensor, sizes: Sizes, gradients: AssembleGradients) -> list[Launch]:
    from .backward_kernel import backward_launch

    return [backward_launch(grad_tokens, sizes, gradients)]


BACKEND = Backend(
    name="triton",
    requirements=requirements.on_triton(features.ALL, not_interpreted=(features.MIXED_BF16,)),
    forward=forward,
    backward=backward,
    opaque=True,
    default=requirements.TRITON_DEFAULT,
    faults=mode.faults,
)
