"""Operations of the op's matrix products, as torch counts those of its own fused attention."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from .transforms import Call

_FORWARD, _BACKWARD = 2, 5  # products; the backward makes the logits again


def forward(query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None) -> int:
    """Logits, and their product with the values."""
    batch, heads, tokens, head_dim = query.shape
    return _FORWARD * _product(batch, heads, tokens, head_dim, Call(*rest[: len(Call._fields)]))


def forward_qkv(qkv: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The same, packed."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return _FORWARD * _product(batch, heads, tokens, head_dim, Call(*rest[: len(Call._fields)]))


def backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The logits again, the gradients of the probabilities and values, and those of queries and keys."""
    batch, heads, tokens, head_dim = query.shape
    return _BACKWARD * _product(batch, heads, tokens, head_dim, Call(*rest[: len(Call._fields)]))


def backward_qkv(grad_output: Tensor, qkv: Tensor, *rest: Any, out_val: Any = None) -> int:
    """The same, packed."""
    batch, tokens, _, heads, head_dim = qkv.shape
    return _BACKWARD * _product(batch, heads, tokens, head_dim, Call(*rest[: len(Call._fields)]))


def statistics(
    query: Tensor,
    key: Tensor,
    attn_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    num_prefix_tokens: int,
    scale: float,
    outputs: str,
    out_val: Any = None,
) -> int:
    """Logits, of the prefix alone where nothing else is asked for."""
    batch, heads, tokens, head_dim = query.shape
    call = Call(None, None, None, False, cu_seqlens, tokens, num_prefix_tokens, scale)
    whole = _product(batch, heads, tokens, head_dim, call)
    if outputs == "prefix_attention" and cu_seqlens is None:
        return whole * num_prefix_tokens // tokens
    return whole


def _product(batch: int, heads: int, tokens: int, head_dim: int, call: Call) -> int:
    """Of ``[N, D]`` with ``[D, N]``, of every image and head; packed images of unknown length count as the longest."""
    if call.cu_seqlens is None:
        pairs = batch * tokens**2
    elif is_fake(call.cu_seqlens) or call.cu_seqlens.is_meta:
        pairs = (call.cu_seqlens.shape[0] - 1) * call.max_seqlen**2
    else:
        pairs = sum((end - start) ** 2 for start, end in pairwise(call.cu_seqlens.tolist()))
    return 2 * heads * pairs * head_dim
