"""This library's C++ kernels for CPUs: each number is read once and written once, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._native import library
from ....dispatch import Backend
from ..._shared import requirements
from ..._shared.arguments import in_rows
from .. import features, schema
from ..types import AssembleGradients, AssembleInputs, Sizes


def forward(inputs: AssembleInputs) -> Tensor:
    """The tokens."""
    patches, *parameters, dtype = inputs
    # Neighbours in memory are a patch's channels, or the patches of a channel, as a convolution leaves them.
    readable = 1 in patches.stride()[1:]
    tokens = schema.empty_tokens(inputs)
    torch.ops.vitreg_cpu.assemble_forward(
        patches if readable else patches.contiguous(),
        *(None if t is None else t.to(dtype).contiguous() for t in parameters),
        tokens,
    )
    return tokens


def backward(grad_tokens: Tensor, sizes: Sizes, gradients: AssembleGradients) -> None:
    """Fill the contiguous gradients that are not ``None``."""
    torch.ops.vitreg_cpu.assemble_backward(
        in_rows(grad_tokens), sizes.cls_tokens, sizes.registers, sizes.prefix_rows or 0, *gradients
    )


BACKEND = Backend(
    name="cpu",
    requirements=requirements.on_cpu(features.ALL),
    forward=forward,
    backward=backward,
    opaque=True,
    faults=library.faults,
)
