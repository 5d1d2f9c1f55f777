"""This library's native CPU kernels: each number is read once and written once, forward and backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._runtime import native
from ...._runtime.dispatch import Request, Requirements, unmet
from .. import features, schema
from ..types import AssembleGradients, AssembleInputs, Sizes

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


def forward(inputs: AssembleInputs) -> Tensor:
    """The tokens."""
    patches, *parameters, dtype = inputs
    # Neighbours in memory are a patch's channels, or the patches of a channel, as a convolution leaves them.
    readable = 1 in patches.stride()[1:]
    tokens = schema.empty_tokens(inputs)
    torch.ops.vitreg_native.assemble_forward(
        patches if readable else patches.contiguous(),
        *(None if t is None else t.to(dtype).contiguous() for t in parameters),
        tokens,
    )
    return tokens


def backward(grad_tokens: Tensor, sizes: Sizes, gradients: AssembleGradients) -> None:
    """Fill the contiguous gradients that are not ``None``."""
    torch.ops.vitreg_native.assemble_backward(
        native.in_rows(grad_tokens), sizes.cls_tokens, sizes.registers, sizes.prefix_rows or 0, *gradients
    )
