"""Operations of the op's matrix products, as torch counts those of its own fused attention."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .transforms import Call

_FORWARD, _BACKWARD = 2, 5  # products; the backward makes the logits again


def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None) -> int:
    """Logits, and their product with the values."""
    return _FORWARD * _logits(query.shape, *_packing(rest))


def forward_qkv(qkv: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The same, packed."""
    return _FORWARD * _logits(_unpacked(qkv), *_packing(rest))


def backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The logits again, the gradients of the probabilities and values, and those of queries and keys."""
    return _BACKWARD * _logits(query.shape, *_packing(rest))


def backward_qkv(grad_output: Tensor, qkv: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The same, packed."""
    return _BACKWARD * _logits(_unpacked(qkv), *_packing(rest))


def statistics(query: Tensor, key: Tensor, *rest: Any, out_val: Any = None) -> int:
    """Logits, of the prefix alone where nothing else is asked for."""
    _mask, cu_seqlens, num_prefix_tokens, _scale, outputs = rest
    tokens = query.shape[2]
    whole = _logits(query.shape, cu_seqlens, tokens)
    if outputs == "prefix_attention" and cu_seqlens is None:
        return whole * num_prefix_tokens // tokens
    return whole


def _packing(rest: tuple) -> tuple[Tensor | None, int]:
    call = Call(*rest[: len(Call._fields)])
    return call.cu_seqlens, call.max_seqlen


def _unpacked(qkv: Tensor) -> Sequence[int]:
    batch, tokens, _, heads, head_dim = qkv.shape
    return batch, heads, tokens, head_dim


def _logits(query: Sequence[int], cu_seqlens: Tensor | None, max_seqlen: int) -> int:
    """Of queries of the shape ``[B, H, N, D]`` with as many keys.

    Packed images whose lengths cannot be read, in fake tensors, count as the longest.
    """
    batch, heads, tokens, head_dim = query
    if cu_seqlens is None:
        pairs = batch * tokens**2
    elif is_fake(cu_seqlens) or cu_seqlens.is_meta:
        pairs = (cu_seqlens.shape[0] - 1) * max_seqlen**2
    else:
        pairs = sum((end - start) ** 2 for start, end in pairwise(cu_seqlens.tolist()))
    return 2 * heads * pairs * head_dim
