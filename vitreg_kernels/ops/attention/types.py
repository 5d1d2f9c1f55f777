"""What goes into an attention call and what comes out of it. Everything here is plain data.

Symbols used throughout the op: B batch, H heads, N tokens, D head dim, P prefix tokens (CLS and registers), M = N - P
patches, S packed images.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

MaskKind = Literal["key_padding", "bool", "additive"]

OUTPUT_NAMES: tuple[str, ...] = ("lse", "prefix_attention", "received_attention", "max_logit", "token_norms")


class Rope(NamedTuple):
    """Rotary position embedding of the patch tokens; the P prefix tokens of every image are never rotated.

    A channel ``d`` and its partner ``d'`` turn together: ``x[d] * cos[d] -+ x[d'] * sin[d]`` (minus for the first of
    the pair). ``interleaved=False`` pairs ``d`` with ``d + D/2`` (DINOv3, Hugging Face, timm's ``rotate_half``);
    ``interleaved=True`` pairs ``2i`` with ``2i + 1`` (timm's default, EVA).

    Attributes:
        cos, sin: ``[M, D]``, ``[1, M, D]`` or ``[B, M, D]``, of any floating dtype on the query's device, a row a
            patch; with ``cu_seqlens``, ``[sum of M, D]``: the patches of all images one after another. They carry no
            gradient.
        interleaved: which channels form a pair.

    Source: Su et al., "RoFormer" (arXiv 2104.09864), eq. 34; on patches only as in DINOv3.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


class AttentionOutputs(NamedTuple):
    """The statistics a call asked for with ``outputs=``; what was not asked for is ``None``.

    All are fp32 (fp64 for fp64 inputs), detached from the graph, and describe the softmax before dropout. With
    ``cu_seqlens`` B is 1 and N is the total number of tokens, each image attending to itself alone.

    Attributes:
        lse: ``[B, H, N]``, natural log of the sum of exp of the scaled logits; -inf for a query all of whose keys are
            masked.
        prefix_attention: ``[B, H, P, N]``, attention probabilities of the CLS and register queries over all tokens
            (packed: column n belongs to the prefix of n's own image).
        received_attention: ``[B, H, N]``, attention each key receives, averaged over the queries of its image
            (padding among them); sums to 1 over the keys of an image, less the share of queries that see no key.
        max_logit: ``[B, H]`` (packed: ``[S, H]``), the largest scaled logit that is not masked; -inf if all are.
        token_norms: ``[B, N]``, L2 norm of each output token over all heads and channels.
    """

    lse: Tensor | None = None
    prefix_attention: Tensor | None = None
    received_attention: Tensor | None = None
    max_logit: Tensor | None = None
    token_norms: Tensor | None = None


NO_STATISTICS = AttentionOutputs()

ROPE_IS_CONSTANT = "rope.cos and rope.sin carry no gradient; detach them, or rotate query and key before the call"


class AttentionInputs(NamedTuple):
    """A validated call. Every backend takes exactly this.

    Attributes:
        query, key, value: ``[B, H, N, D]``, any strides, one dtype and device. With ``cu_seqlens``, B is 1.
        attn_mask: ``None`` or 4-d, broadcastable to ``[B, H, N, N]``; bool (True takes part) or additive.
        dropout_p: probability of dropping an attention weight.
        scale: factor on the logits.
        num_prefix_tokens: P, the leading tokens of every image.
        rope: rotation of the patch tokens.
        cu_seqlens: ``[S + 1]`` int32 on the query's device: where each packed image starts, and the end.
        max_seqlen: longest packed image; 0 without ``cu_seqlens``.
        outputs: the statistics asked for, a subset of ``OUTPUT_NAMES``.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    scale: float = 1.0
    num_prefix_tokens: int = 0
    rope: Rope | None = None
    cu_seqlens: Tensor | None = None
    max_seqlen: int = 0
    outputs: tuple[str, ...] = ()


class AttentionResult(NamedTuple):
    """A backend's answer.

    Attributes:
        output: ``[B, H, N, D]``, a view of contiguous ``[B, N, H, D]`` memory, in the query's dtype.
        statistics: what ``inputs.outputs`` asked for.
    """

    output: Tensor
    statistics: AttentionOutputs


def empty_output(query: Tensor) -> Tensor:
    """Uninitialised output for a ``[B, H, N, D]`` query: such a view of contiguous ``[B, N, H, D]`` memory."""
    _, heads, tokens, head_dim = query.shape
    return query.new_empty_strided(query.shape, (tokens * heads * head_dim, head_dim, heads * head_dim, 1))


def unpack_qkv(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``[B, N, 3, H, D]`` -> query, key and value as ``[B, H, N, D]`` views."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def mask_kind(attn_mask: Tensor | None) -> MaskKind | None:
    """``"key_padding"`` is a bool mask ``[B or 1, 1, 1, N]``: the same keys for every head and query."""
    if attn_mask is None:
        return None
    if attn_mask.dtype != torch.bool:
        return "additive"
    return "key_padding" if attn_mask.shape[1] == 1 and attn_mask.shape[2] == 1 else "bool"
