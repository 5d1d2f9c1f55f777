"""torch's scaled_dot_product_attention: whichever of its own kernels torch picks for the call.

Serves dropout and additive masks too. Rotation is done before it in torch, packed images run as batches of one length,
and the statistics come from ``statistics.py``.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .....dispatch import Backend
from ...._shared import levels, requirements
from ... import features, statistics
from ...masks import without_hidden_keys
from ...packing import as_batch, runs_of_equal_length
from ...rope import rotate_query_and_key
from ...types import AttentionInputs, AttentionResult
from .kernels import Attend, formula


def _picked_by_torch(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float
) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, mask, dropout_p, scale=scale)


def forward(inputs: AttentionInputs, attend: Attend = _picked_by_torch) -> AttentionResult:
    """A whole call, whose attention proper is by ``attend``."""
    if inputs.rope is not None:
        inputs = rotate_query_and_key(inputs)
    inputs = without_hidden_keys(inputs)
    if inputs.cu_seqlens is not None:
        output = _packed(inputs, attend)
    elif inputs.attn_mask is not None:
        output = _masked(inputs, attend)
    else:
        output = _attend(inputs.query, inputs.key, inputs.value, None, inputs, attend)
    output = _in_bnhd_memory(output)
    return AttentionResult(output, statistics.of_output(inputs, output))


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, inputs: AttentionInputs, attend: Attend
) -> Tensor:
    query, key, value = _unit_stride(query), _unit_stride(key), _unit_stride(value)
    mask = None if mask is None else _unit_stride(mask)
    if _fused_has_no_derivative(query, key, value, mask):
        attend = formula
    return attend(query, key, value, mask, inputs.dropout_p, inputs.scale)


def _unit_stride(x: Tensor) -> Tensor:
    """Neighbours in the last dimension side by side, which every fused kernel of torch's asks for."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _fused_has_no_derivative(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    """Whether a transform asks, or may ask, for one that torch's fused kernels do not have: a second, or the mask's."""
    if mask is not None and mask.is_floating_point() and levels.are_active():
        return True
    return levels.need_more_than_a_gradient((query, key, value))


def _masked(inputs: AttentionInputs, attend: Attend) -> Tensor:
    """A query without a single key gets zeros, and zero gradients: torch's kernels differ there, down to NaN.

    It attends to everything instead and its output is then blanked, so no kernel ever meets such a row.
    """
    mask = inputs.attn_mask
    is_bool = mask.dtype == torch.bool
    fully_masked = ~mask.any(-1, keepdim=True) if is_bool else (mask == -torch.inf).all(-1, keepdim=True)
    mask = mask | fully_masked if is_bool else mask.masked_fill(fully_masked, 0.0)
    return _attend(inputs.query, inputs.key, inputs.value, mask, inputs, attend).masked_fill(fully_masked, 0.0)


def _packed(inputs: AttentionInputs, attend: Attend) -> Tensor:
    outputs = []
    for run in runs_of_equal_length(inputs.cu_seqlens, inputs.query.shape[2]):
        query, key, value = (as_batch(x, *run) for x in (inputs.query, inputs.key, inputs.value))
        output = _attend(query, key, value, None, inputs, attend)  # [images, H, length, D]
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs).unsqueeze(0).transpose(1, 2)


def _in_bnhd_memory(output: Tensor) -> Tensor:
    """The contract's layout: a ``[B, H, N, D]`` view of contiguous ``[B, N, H, D]`` memory.

    torch's kernels lay the output out like the query, so views of a packed projection need no copy here.
    """
    _, heads, _, head_dim = output.shape
    if output.stride()[1:] == (head_dim, heads * head_dim, 1):
        return output
    return output.transpose(1, 2).contiguous().transpose(1, 2)


BACKEND = Backend(
    name="sdpa",
    requirements=requirements.anywhere(features.OF_SDPA),
    forward=forward,
)
