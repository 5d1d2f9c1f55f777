"""This library's C++ kernels for CPUs, forward and backward: any strides in place, statistics from the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._native import library
from ....dispatch import Backend
from ..._shared import requirements
from .. import features
from ..types import NO_STATISTICS, AttentionInputs, AttentionOutputs, AttentionResult, empty_output


def forward(inputs: AttentionInputs) -> AttentionResult:
    """The output and the statistics asked for."""
    query = inputs.query
    output = empty_output(query)
    if not inputs.outputs:
        torch.ops.vitreg_cpu.attention_forward(*_arguments(inputs), output, None, None, None, None)
        return AttentionResult(output, NO_STATISTICS)
    of_logits = _empty_statistics(inputs)
    torch.ops.vitreg_cpu.attention_forward(*_arguments(inputs), output, *of_logits)
    norms = None
    if "token_norms" in inputs.outputs:
        norms = torch.linalg.vector_norm(output, dim=(1, 3), dtype=torch.float32)
    return AttentionResult(output, AttentionOutputs(*of_logits, norms))


def _empty_statistics(inputs: AttentionInputs) -> tuple[Tensor | None, ...]:
    """Room for lse, prefix attention, received attention and the largest logit; ``None`` for what nobody asked for."""
    query, asked = inputs.query, inputs.outputs
    batch, heads, tokens, _ = query.shape
    lse = prefix = received = largest = None
    if "lse" in asked:
        lse = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    if "prefix_attention" in asked:
        prefix = query.new_empty((batch, heads, inputs.num_prefix_tokens, tokens), dtype=torch.float32)
    if "received_attention" in asked:
        received = query.new_empty((batch, heads, tokens), dtype=torch.float32)
    if "max_logit" in asked:
        images = batch if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1
        largest = query.new_empty((images, heads), dtype=torch.float32)
    return lse, prefix, received, largest


def backward(
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor,
    grad_output: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
) -> None:
    """Fill three ``[B, H, N, D]`` gradients of any strides, such as views of one packed gradient.

    Args:
        inputs: the call; its ``outputs`` do not matter.
        output, lse: what the forward gave; ``lse`` is ``[B, H, N]`` fp32.
        grad_output: gradient of the output, any strides.
        grad_query, grad_key, grad_value: written in full.
    """
    torch.ops.vitreg_cpu.attention_backward(
        *_arguments(inputs), output, lse.contiguous(), grad_output, grad_query, grad_key, grad_value
    )


def _arguments(inputs: AttentionInputs) -> tuple[Tensor | float | None, ...]:
    """What both ops take first."""
    query, mask = inputs.query, inputs.attn_mask
    batch, _, tokens, _ = query.shape
    cos, sin, interleaved = inputs.rope or (None, None, False)
    if cos is not None:
        # Small, and with common strides as the kernels read them.
        cos, sin = (t.float().contiguous().expand(batch, *t.shape[-2:]) for t in (cos, sin))
    return (
        query,
        inputs.key,
        inputs.value,
        None if mask is None else mask[:, 0, 0].expand(batch, tokens),
        cos,
        sin,
        interleaved,
        inputs.cu_seqlens,
        inputs.num_prefix_tokens,
        inputs.scale,
    )


BACKEND = Backend(
    name="cpu",
    requirements=requirements.on_cpu(features.OF_OUR_KERNELS, head_dims=(1, 128)),
    forward=forward,
    backward=backward,
    opaque=True,
    faults=library.faults,
)
