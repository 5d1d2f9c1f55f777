"""The specification of the op: what every backend must compute, in plain torch, readable in one sitting.

It holds whole N x N matrices, loops over packed images, and is differentiable by autograd. Run in fp64 it gives what
the accuracy rule takes for exact; run in the inputs' own dtype it is the eager formula a backend's error is held
against.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from .masks import without_hidden_keys
from .types import AttentionInputs, AttentionOutputs, AttentionResult, Rope


def attention(inputs: AttentionInputs, dropout: Callable[[Tensor], Tensor] | None = None) -> AttentionResult:
    """Scaled dot-product attention (Vaswani et al., arXiv 1706.03762, eq. 1) and its statistics.

    Matrix products and the softmax run in the inputs' dtype; the rotation and the statistics in fp32 (fp64 for fp64).

    Args:
        inputs: the call.
        dropout: called with the probabilities ``[B, H, N, N]`` of a call that is not packed, in place of dropping
            ``inputs.dropout_p`` of them: for whoever wants to see them.
    """
    if inputs.cu_seqlens is None:
        output, statistics = _attend(inputs, dropout)
    else:
        output, statistics = _attend_packed(inputs)
    return AttentionResult(_in_bnhd_memory(output), AttentionOutputs(**{k: statistics[k] for k in inputs.outputs}))


def _attend(
    inputs: AttentionInputs, dropout: Callable[[Tensor], Tensor] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    if inputs.rope is not None:
        query, key = (_rotate_patches(x, inputs.rope, inputs.num_prefix_tokens) for x in (inputs.query, inputs.key))
        inputs = inputs._replace(query=query, key=key)
    query, key, value, *_ = inputs = without_hidden_keys(inputs)
    _, probabilities = _softmax(query, key, inputs)
    if dropout is not None:
        probabilities = dropout(probabilities)
    elif inputs.dropout_p:
        probabilities = torch.dropout(probabilities, inputs.dropout_p, train=True)
    output = probabilities @ value
    return output, _statistics(query, key, output, inputs) if inputs.outputs else {}


def _softmax(query: Tensor, key: Tensor, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    logits = query @ key.transpose(-2, -1) * inputs.scale
    if inputs.attn_mask is not None:
        mask = inputs.attn_mask
        logits = logits.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else logits + mask
    # A query all of whose keys are masked attends to nothing: zeros, where a plain softmax says NaN.
    all_masked = (logits == -torch.inf).all(-1, keepdim=True)
    return logits, logits.masked_fill(all_masked, 0.0).softmax(-1).masked_fill(all_masked, 0.0)


def _statistics(query: Tensor, key: Tensor, output: Tensor, inputs: AttentionInputs) -> dict[str, Tensor]:
    """Detached: they carry no gradient, and no tangent of forward mode."""
    query, key, output = query.detach(), key.detach(), output.detach()
    if inputs.attn_mask is not None:
        inputs = inputs._replace(attn_mask=inputs.attn_mask.detach())
    dtype = torch.promote_types(output.dtype, torch.float32)
    logits, probabilities = _softmax(query.to(dtype), key.to(dtype), inputs)
    return {
        "lse": logits.logsumexp(-1),
        "prefix_attention": probabilities[:, :, : inputs.num_prefix_tokens],
        "received_attention": probabilities.mean(-2),
        "max_logit": logits.amax((-2, -1)),
        "token_norms": output.to(dtype).square().sum((1, 3)).sqrt(),
    }


def _attend_packed(inputs: AttentionInputs) -> tuple[Tensor, dict[str, Tensor]]:
    """Each image of a ``[1, H, sum of N, D]`` pack on its own, put back side by side."""
    outputs, statistics = [], []
    prefix = inputs.num_prefix_tokens
    first_patch = 0
    for start, end in pairwise(inputs.cu_seqlens.tolist()):
        rope = inputs.rope
        if rope is not None:
            patches = slice(first_patch, first_patch + end - start - prefix)
            rope = Rope(rope.cos[..., patches, :], rope.sin[..., patches, :], rope.interleaved)
            first_patch = patches.stop
        q, k, v = (x[:, :, start:end] for x in (inputs.query, inputs.key, inputs.value))
        output, stats = _attend(inputs._replace(query=q, key=k, value=v, rope=rope, cu_seqlens=None))
        outputs.append(output)
        statistics.append(stats)
    axis = {"lse": -1, "prefix_attention": -1, "received_attention": -1, "max_logit": 0, "token_norms": -1}
    return torch.cat(outputs, 2), {k: torch.cat([s[k] for s in statistics], axis[k]) for k in inputs.outputs}


def _rotate_patches(x: Tensor, rope: Rope, prefix: int) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (t.to(dtype).unsqueeze(-3) for t in (rope.cos, rope.sin))
    patches = x[:, :, prefix:]
    if rope.interleaved:
        partner = torch.stack((-patches[..., 1::2], patches[..., 0::2]), -1).flatten(-2)
    else:
        first, second = patches.chunk(2, -1)
        partner = torch.cat((-second, first), -1)
    return torch.cat((x[:, :, :prefix], (patches * cos + partner * sin).to(x.dtype)), 2)


def _in_bnhd_memory(output: Tensor) -> Tensor:
    return output.transpose(1, 2).contiguous().transpose(1, 2)
