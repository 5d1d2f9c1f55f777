"""Statistics that need a second look at the logits, with the log-sum-exp of the forward.

Programs own keys: the attention a key receives is then a sum inside one program, where a forward, whose programs own
queries, would have to add to it from many at once.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....._runtime.launch import Launch
from ...types import AttentionInputs
from . import plan
from .primitives import (
    Rope,
    Rows,
    load_lse,
    load_rotated,
    locate,
    own,
    probabilities,
    rope_offset,
    rows_of,
    signed,
    statistic_of,
    sweep,
    takes_part,
)


class Statistics(NamedTuple):
    """What a program looks at its keys with."""

    query: Rows
    key: Rows
    rope: Rope
    key_mask: Any
    mask_stride: Any
    lse: Any
    normalizer: Any
    received_attention: Any
    prefix_attention: Any
    prefix_stride: Any
    place: Any
    scale: Any
    D: Any
    BLOCK_D: Any
    BLOCK_M: Any
    BLOCK_N: Any
    TAIL: Any
    PREFIX: Any
    PRECISION: Any


@triton.jit
def _from_queries(key, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[W, M] probabilities of the owned keys for queries first to first + WIDTH; 0 for queries from `end` on.

    Queries are the rows, as in the forward: then each logit is summed in the same order, and the normalizer fits.
    """
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    logits = tl.dot(signed(query, ctx.scale), tl.trans(key), input_precision=ctx.PRECISION)
    normalizer = tl.load(ctx.normalizer + tokens, mask=tokens < end, other=0.0)
    return probabilities(logits, load_lse(ctx.lse, tokens, end)[:, None], ctx.scale) * normalizer[:, None]


@triton.jit
def _receive(received, key, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return received + tl.sum(_from_queries(key, ctx, first, end, WIDTH, MASKED), 0)


@triton.jit
def _statistics_of_keys(ctx, first, end, WIDTH: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    inside = tokens < end
    valid = takes_part(ctx.key_mask, ctx.mask_stride, tokens, end)
    key = load_rotated(ctx.key, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, True)
    if ctx.received_attention is not None:
        received = sweep(_receive, tl.zeros([WIDTH], tl.float32), key, ctx) / ctx.place.num_tokens
        tl.store(ctx.received_attention + tokens, tl.where(valid, received, 0.0), mask=inside)
    if ctx.prefix_attention is not None:
        for prefix in range(0, ctx.place.num_prefix, 16):
            p = _from_queries(key, ctx, prefix, ctx.place.num_prefix, 16, True)
            queries = prefix + tl.arange(0, 16)
            cells = queries.to(tl.int64)[:, None] * ctx.prefix_stride + tokens[None, :]
            exists = (queries < ctx.place.num_prefix)[:, None] & inside[None, :]
            tl.store(ctx.prefix_attention + cells, tl.where(valid[None, :], p, 0.0), mask=exists)


@triton.jit
def _statistics_fwd_kernel(
    query,  # [B, H, N, D]
    key,
    lse,  # [B, H, N] fp32
    normalizer,  # [B, H, N] fp32
    received_attention,  # [B, H, N] fp32 or None
    prefix_attention,  # [B, H, P, N] fp32 or None
    key_mask,  # [B, N] uint8 or None
    cos,  # [B, M, D] or None
    sin,
    cu_seqlens,  # [images + 1] int32 or None
    query_stride_b,
    query_stride_h,
    query_stride_n,
    query_stride_d,
    key_stride_b,
    key_stride_h,
    key_stride_n,
    key_stride_d,
    mask_stride_b,
    mask_stride_n,
    rope_stride_b,
    rope_stride_m,
    num_programs,
    num_heads,
    num_tokens,
    num_prefix,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PREFIX: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, place = locate(num_programs, num_heads, num_tokens, num_prefix, cu_seqlens)
    if cos is not None:
        offset = rope_offset(place, rope_stride_b, rope_stride_m)
        cos += offset
        sin += offset
    if key_mask is not None:
        key_mask += place.batch * mask_stride_b + place.start * mask_stride_n
    if received_attention is not None:
        received_attention = statistic_of(received_attention, place, num_heads, num_tokens)
    if prefix_attention is not None:
        prefix_attention += (place.batch * num_heads + place.head) * num_prefix * num_tokens + place.start
    own(
        _statistics_of_keys,
        Statistics(
            rows_of(query, place, query_stride_b, query_stride_h, query_stride_n, query_stride_d),
            rows_of(key, place, key_stride_b, key_stride_h, key_stride_n, key_stride_d),
            Rope(cos, sin, rope_stride_m, num_prefix, INTERLEAVED),
            key_mask,
            mask_stride_n,
            statistic_of(lse, place, num_heads, num_tokens),
            statistic_of(normalizer, place, num_heads, num_tokens),
            received_attention,
            prefix_attention,
            num_tokens,
            place,
            scale,
            D,
            BLOCK_D,
            BLOCK_M,
            BLOCK_N,
            TAIL,
            PREFIX,
            PRECISION,
        ),
        tile,
    )


def statistics_launches(
    inputs: AttentionInputs,
    lse: Tensor,
    normalizer: Tensor,
    received_attention: Tensor | None,
    prefix_attention: Tensor | None,
    arch: int,
) -> list[Launch]:
    """The second look as launches.

    Args:
        inputs: the call.
        lse, normalizer: ``[B, H, N]`` fp32, contiguous, of the forward.
        received_attention: ``[B, H, N]`` fp32, contiguous, or ``None``.
        prefix_attention: ``[B, H, P, N]`` fp32, contiguous, or ``None``.
        arch: compute capability times ten.
    """
    work = plan.of(inputs, "statistics", arch)
    arguments = {
        "query": inputs.query,
        "key": inputs.key,
        "lse": lse,
        "normalizer": normalizer,
        "received_attention": received_attention,
        "prefix_attention": prefix_attention,
        **plan.strides(query=inputs.query, key=inputs.key),
        **work.arguments,
    }
    return [Launch(_statistics_fwd_kernel, work.grid, arguments, work.constants, work.num_warps, work.num_stages)]
