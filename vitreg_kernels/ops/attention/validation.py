"""Arguments of a call -> ``AttentionInputs``, or one sentence: what was given, what was expected, what to do.

Reads shapes and dtypes only; values only where that takes no device synchronisation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor

from ..._symbolic import known
from .._shared.arguments import DTYPES, autocast_dtype, described, refuse_nested
from .._shared.distributed import is_distributed
from .._shared.levels import is_mapped
from .packing import lengths
from .types import OUTPUT_NAMES, ROPE_IS_CONSTANT, AttentionInputs, Rope

_INTS = (int, torch.SymInt)
_NUMBERS = (float, torch.SymFloat, *_INTS)


def autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors as autocast would hand them to a matrix product: floating ones, fp64 excepted, in its dtype."""
    dtype = autocast_dtype(tensors[0])
    if dtype is None:
        return tensors
    castable = (torch.float32, torch.float16, torch.bfloat16)
    return tuple(t.to(dtype) if isinstance(t, Tensor) and t.dtype in castable else t for t in tensors)


def validated(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    num_prefix_tokens: int,
    attn_mask: Tensor | None,
    dropout_p: float,
    scale: float | None,
    rope: Rope | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int | None,
    outputs: Sequence[str],
) -> AttentionInputs:
    """The call as every backend takes it.

    Raises:
        TypeError, ValueError: for arguments that do not fit together.
    """
    query, key, value, attn_mask = autocast(query, key, value, attn_mask)
    if not (
        isinstance(query, Tensor)
        and isinstance(key, Tensor)
        and isinstance(value, Tensor)
        and not query.is_nested
        and len(shape := query.shape) == 4
        and shape == key.shape == value.shape
        and (dtype := query.dtype) is key.dtype is value.dtype
        and query.device == key.device == value.device
        and dtype in DTYPES
    ):
        _refuse_qkv(query, key, value)
    _, heads, tokens, head_dim = shape
    if not (heads and tokens and head_dim):
        raise ValueError(f"there must be at least one head, token and channel, got query {described(query)}")

    if not isinstance(num_prefix_tokens, _INTS) or num_prefix_tokens < 0 or known(num_prefix_tokens > tokens):
        raise ValueError(f"num_prefix_tokens must be an int from 0 to the {tokens} tokens, got {num_prefix_tokens!r}")
    if not isinstance(dropout_p, _NUMBERS) or not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be a number of at least 0 and below 1, got {dropout_p!r}")
    if scale is None:
        scale = head_dim**-0.5
    elif not isinstance(scale, _NUMBERS) or not math.isfinite(scale):
        raise ValueError(f"scale must be a finite number, got {scale!r}; leave it out for 1 / sqrt(head dim)")
    if outputs != ():
        outputs = _checked_outputs(outputs)
    if attn_mask is not None:
        attn_mask = _checked_mask(attn_mask, query, cu_seqlens)
    if cu_seqlens is not None:
        cu_seqlens, max_seqlen = _checked_packing(cu_seqlens, max_seqlen, query, num_prefix_tokens)
    elif max_seqlen is not None:
        raise ValueError("max_seqlen was given without cu_seqlens; it belongs to packed images only")
    if rope is not None:
        _check_rope(rope, query, num_prefix_tokens, cu_seqlens)
    return AttentionInputs(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        float(scale),
        num_prefix_tokens,
        rope,
        cu_seqlens,
        max_seqlen or 0,
        outputs,
    )


def _refuse_qkv(query: Tensor, key: Tensor, value: Tensor) -> NoReturn:
    """Says which condition on query, key and value failed; the way that every call takes only learns that one did."""
    for name, x in (("query", query), ("key", key), ("value", value)):
        refuse_nested(name, x)
        if not isinstance(x, Tensor) or x.ndim != 4:
            raise ValueError(f"{name} must be a [batch, heads, tokens, head dim] tensor, got {described(x)}")
    if any(x.shape != query.shape or x.dtype != query.dtype or x.device != query.device for x in (key, value)):
        raise ValueError(
            "query, key and value must have one shape, dtype and device (self-attention, as many key as query heads), "
            f"got {described(query)}, {described(key)} and {described(value)}"
        )
    raise TypeError(f"query, key and value must be fp32, fp16, bf16 or fp64, got {described(query)}")


def _checked_outputs(outputs: Sequence[str]) -> tuple[str, ...]:
    if not isinstance(outputs, Sequence) or isinstance(outputs, str):
        raise TypeError(f'outputs must be a tuple of names such as ("lse",), got {outputs!r}')
    for name in outputs:
        if name not in OUTPUT_NAMES:
            raise ValueError(f"unknown output {name!r}: expected any of {', '.join(map(repr, OUTPUT_NAMES))}")
    return tuple(dict.fromkeys(outputs))


def _checked_mask(mask: Tensor, query: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    batch, heads, tokens, _ = query.shape
    if cu_seqlens is not None:
        raise ValueError("attn_mask and cu_seqlens exclude each other: packed images are already kept apart")
    if not isinstance(mask, Tensor) or mask.dtype not in (torch.bool, query.dtype) or mask.device != query.device:
        dtype = str(query.dtype).removeprefix("torch.")
        raise TypeError(f"attn_mask must be a bool or {dtype} tensor on {query.device}, got {described(mask)}")
    full = (batch, heads, tokens, tokens)
    fits = 2 <= mask.ndim <= 4 and all(m in (1, f) for m, f in zip(reversed(mask.shape), reversed(full), strict=False))
    if not fits:
        raise ValueError(
            f"attn_mask must broadcast to [batch, heads, tokens, tokens] = {list(full)}, got {list(mask.shape)}; "
            f"write a key-padding mask as [batch, 1, 1, tokens]"
        )
    return mask[(None,) * (4 - mask.ndim)]


def _checked_packing(
    cu_seqlens: Tensor, max_seqlen: int | None, query: Tensor, num_prefix_tokens: int
) -> tuple[Tensor, int]:
    batch, _, tokens, _ = query.shape
    if is_distributed(cu_seqlens):
        cu_seqlens = cu_seqlens.full_tensor()  # whose values can be read
    if isinstance(cu_seqlens, Tensor) and not torch.compiler.is_compiling() and is_mapped(cu_seqlens):
        raise ValueError("cu_seqlens cannot be mapped by torch.vmap, only packs that are cut alike; make them one pack")
    if (
        not isinstance(cu_seqlens, Tensor)
        or cu_seqlens.ndim != 1
        or cu_seqlens.shape[0] < 2
        or cu_seqlens.dtype not in (torch.int32, torch.int64)
        or cu_seqlens.device != query.device
    ):
        raise ValueError(
            f"cu_seqlens must be an int32 tensor [images + 1] on {query.device} with at least one image, "
            f"got {described(cu_seqlens)}"
        )
    if cu_seqlens.device.type == "meta":
        raise ValueError("cu_seqlens on the meta device says nothing of where images begin; give a batch there")
    if batch != 1:
        raise ValueError(
            f"with cu_seqlens all images stand in one batch row, got a batch of {batch}; reshape to batch 1"
        )
    if max_seqlen is not None and not isinstance(max_seqlen, _INTS):
        raise TypeError(f"max_seqlen must be an int, got {max_seqlen!r}")
    if torch.compiler.is_compiling():
        # Values cannot be read while tracing; all tokens are a safe bound on the longest image.
        return _as_kernels_read_it(cu_seqlens), tokens if max_seqlen is None else max_seqlen
    if cu_seqlens.device.type == "cpu" or max_seqlen is None:
        each = lengths(cu_seqlens, tokens)
        if min(each) < num_prefix_tokens:
            raise ValueError(
                f"every packed image must have its {num_prefix_tokens} prefix tokens, cu_seqlens gives one {min(each)} "
                f"tokens; lower num_prefix_tokens or leave that image out"
            )
        if max_seqlen is None:
            max_seqlen = max(each)
        elif max_seqlen < max(each):
            raise ValueError(f"max_seqlen is {max_seqlen} but the longest packed image has {max(each)} tokens")
    return _as_kernels_read_it(cu_seqlens), max_seqlen


def _as_kernels_read_it(cu_seqlens: Tensor) -> Tensor:
    return cu_seqlens.to(torch.int32).contiguous()


def _check_rope(rope: Rope, query: Tensor, num_prefix_tokens: int, cu_seqlens: Tensor | None) -> None:
    batch, _, tokens, head_dim = query.shape
    if not isinstance(rope, Rope) or not isinstance(rope.cos, Tensor) or not isinstance(rope.sin, Tensor):
        raise TypeError(f"rope must be a vitreg_kernels.Rope of two tensors, got {described(rope)}")
    cos, sin = rope.cos, rope.sin
    images = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    patches = tokens - images * num_prefix_tokens
    shapes = [patches, head_dim], [batch, patches, head_dim], [1, patches, head_dim]
    if (
        cos.shape != sin.shape
        or list(cos.shape) not in shapes
        or cos.device != query.device
        or sin.device != query.device
    ):
        raise ValueError(
            f"rope.cos and rope.sin must be {shapes[0]} or {shapes[1]} on {query.device}, a row for each patch and "
            f"none for the prefix, got {described(cos)} and {described(sin)}"
        )
    if not cos.is_floating_point() or not sin.is_floating_point():
        raise TypeError(f"rope.cos and rope.sin must be floating point, got {described(cos)} and {described(sin)}")
    if head_dim % 2:
        raise ValueError(f"rope turns pairs of channels and needs an even head dim, got {head_dim}")
    if cos.requires_grad or sin.requires_grad:
        raise ValueError(ROPE_IS_CONSTANT)
