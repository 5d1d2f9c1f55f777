"""This library's Triton kernels, forward and backward. Importing this package does not import triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ....._runtime import triton_mode
from ....._runtime.dispatch import Request, Requirements, unmet
from ....._runtime.launch import Launch, run_all
from ... import features, schema
from ...types import AssembleGradients, AssembleInputs, Sizes, sizes_of

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


def forward(inputs: AssembleInputs) -> Tensor:
    """The tokens, each element written once."""
    from .forward_kernel import forward_launch

    tokens = schema.empty_tokens(inputs)
    run_all([forward_launch(inputs, tokens)], tokens)
    return tokens


def backward(grad_tokens: Tensor, sizes: Sizes, gradients: AssembleGradients) -> None:
    """Fill the contiguous gradients that are not ``None``."""
    from .backward_kernel import backward_launch

    run_all([backward_launch(grad_tokens, sizes, gradients)], grad_tokens)


def launches(inputs: AssembleInputs) -> list[Launch]:
    """Every kernel that a forward and a full backward of this call would launch, without running any.

    Works on ``meta`` tensors, so kernels can be compiled for GPUs that are not there.
    """
    from .backward_kernel import backward_launch
    from .forward_kernel import forward_launch

    tokens, sizes = schema.empty_tokens(inputs), sizes_of(*inputs)
    dtypes = (None if t is None else t.dtype for t in inputs[1:4])
    gradients = schema.empty_gradients(tokens, sizes, *dtypes)
    return [forward_launch(inputs, tokens), backward_launch(torch.empty_like(tokens), sizes, gradients)]
