"""This library's native CPU kernels, forward and backward: any strides in place, all statistics from the same pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._runtime import native
from ...._runtime.dispatch import Request, Requirements, unmet
from .. import features
from ..types import AttentionInputs, AttentionOutputs, AttentionResult, empty_output

NAME = "native"
OPAQUE = True
REQUIREMENTS = Requirements(
    devices=("cpu",),
    dtypes=(torch.float32, torch.float16, torch.bfloat16),
    head_dims=(1, 128),
    features=(features.KEY_PADDING_MASK, features.ROPE, features.PACKING, features.PACKING_COMPILED),
)


def not_supported_reasons(request: Request) -> list[str]:
    reasons = unmet(REQUIREMENTS, request)
    if request.device in REQUIREMENTS.devices:
        reasons += native.faults()
    return reasons


def not_default_reasons(request: Request) -> list[str]:
    return []


def forward(inputs: AttentionInputs) -> AttentionResult:
    """The output and the statistics asked for."""
    query, asked = inputs.query, inputs.outputs
    batch, heads, tokens, _ = query.shape
    images = batch if inputs.cu_seqlens is None else inputs.cu_seqlens.shape[0] - 1

    def statistic(name: str, *shape: int) -> Tensor | None:
        return query.new_empty(shape, dtype=torch.float32) if name in asked else None

    output = empty_output(query)
    of_logits = {
        "lse": statistic("lse", batch, heads, tokens),
        "prefix_attention": statistic("prefix_attention", batch, heads, inputs.num_prefix_tokens, tokens),
        "received_attention": statistic("received_attention", batch, heads, tokens),
        "max_logit": statistic("max_logit", images, heads),
    }
    torch.ops.vitreg_native.attention_forward(*_arguments(inputs), output, *of_logits.values())
    norms = torch.linalg.vector_norm(output, dim=(1, 3), dtype=torch.float32) if "token_norms" in asked else None
    return AttentionResult(output, AttentionOutputs(**of_logits, token_norms=norms))


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
    torch.ops.vitreg_native.attention_backward(
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
