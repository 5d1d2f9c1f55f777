"""torch's own addcmul, layer_norm or rms_norm, and vector_norm, one after another.

torch's backward of layer_norm loses digits where the mean of a token is a hundred times its standard deviation or more.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional

from ....dispatch import Backend
from ..._shared import levels, requirements
from ..._shared.arguments import without_autocast
from .. import features
from ..types import NormInputs, ResidualNorm


def forward(inputs: NormInputs) -> ResidualNorm:
    with without_autocast(inputs.x):  # which would normalize, and answer, in fp32
        residual = inputs.x if inputs.branch is None else _added(inputs).to(inputs.x.dtype).contiguous()
        normalized = _normalized(residual, inputs).to(inputs.dtype).contiguous()
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return ResidualNorm(residual, normalized, torch.linalg.vector_norm(residual.detach(), dim=-1, dtype=dtype))


def _added(inputs: NormInputs) -> Tensor:
    branch, factor = inputs.branch, inputs.layer_scale
    if inputs.drop_path is not None:
        each = inputs.drop_path[:, None, None]
        # Not into one factor [B, 1, C], whose gradient would be rounded image by image on its way to layer_scale's.
        branch, factor = (branch, each) if factor is None else (branch * each, factor)
    return inputs.x + branch if factor is None else torch.addcmul(inputs.x, branch, factor)


def _normalized(residual: Tensor, inputs: NormInputs) -> Tensor:
    """torch's kernels want one dtype for the tokens and the parameters: the widest that was given.

    At least fp32 on a CPU, where layer_norm adds up the gradients of the parameters in the dtype of the tokens.
    """
    given = [residual.dtype, inputs.weight.dtype]
    given += [] if inputs.bias is None else [inputs.bias.dtype]
    given += [torch.float32] if residual.device.type == "cpu" else []
    dtype = functools.reduce(torch.promote_types, given)
    if levels.need_more_than_a_gradient([residual]):
        return _by_formula(residual.to(dtype), inputs)
    tokens, weight, bias = (None if t is None else t.to(dtype) for t in (residual, inputs.weight, inputs.bias))
    if inputs.rms:
        return functional.rms_norm(tokens, weight.shape, weight, inputs.eps)
    return functional.layer_norm(tokens, weight.shape, weight, bias, inputs.eps)


def _by_formula(tokens: Tensor, inputs: NormInputs) -> Tensor:
    """Where more than a gradient is asked for: forward mode within forward mode loses terms of torch's layer_norm."""
    centred = tokens if inputs.rms else tokens - tokens.mean(-1, keepdim=True)
    normalized = centred * (centred.square().mean(-1, keepdim=True) + inputs.eps).rsqrt() * inputs.weight
    return normalized if inputs.bias is None else normalized + inputs.bias


BACKEND = Backend(
    name="composite",
    requirements=requirements.anywhere(features.ALL),
    forward=forward,
)
