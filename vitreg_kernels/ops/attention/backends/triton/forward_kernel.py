"""Forward: softmax(scale * Q K^T) V by an online softmax in base 2, fp32 statistics and accumulation.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867); tiling as in Dao,
"FlashAttention-2" (arXiv 2307.08691), algorithm 1.
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
    FLOOR,
    Rope,
    Rows,
    base_2,
    exponent_scale,
    load_rotated,
    load_tokens,
    locate,
    own,
    rope_of,
    rows_of,
    signed,
    statistic_of,
    store_tokens,
    sweep,
    takes_part,
)


class Forward(NamedTuple):
    """What a program attends with."""

    query: Rows
    key: Rows
    value: Rows
    output: Rows
    rope: Rope
    key_mask: Any
    mask_stride: Any
    lse: Any
    normalizer: Any
    max_logit: Any
    square_norm: Any
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
def _attend_to_keys(state, owned, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    acc, total, peak = state  # [M, BLOCK_D], [M], [M]; peak is in units of raw logits
    query, scale = owned
    tokens = first + tl.arange(0, WIDTH)
    key = load_rotated(ctx.key, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    logits = tl.dot(query, tl.trans(key), input_precision=ctx.PRECISION)  # [M, W]
    if MASKED or ctx.key_mask is not None:
        valid = takes_part(ctx.key_mask, ctx.mask_stride, tokens, end)
        logits = tl.where(valid[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    p = tl.exp2(tl.fma(logits, scale, -(new_peak * scale)[:, None]))
    decay = tl.exp2((peak - new_peak) * scale)
    total = total * decay + tl.sum(p, 1)
    value = load_tokens(ctx.value, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision=ctx.PRECISION)
    return acc, total, new_peak


@triton.jit
def _attend_from_queries(ctx, first, end, WIDTH: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, True)
    scale = exponent_scale(ctx.scale)
    nothing = (
        tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32),
        tl.zeros([WIDTH], tl.float32),
        tl.full([WIDTH], FLOOR, tl.float32),
    )
    acc, total, peak = sweep(_attend_to_keys, nothing, (signed(query, ctx.scale), scale), ctx)
    sees_a_key = total != 0.0  # NaN does see keys, and shows
    acc = acc * (1.0 / tl.where(sees_a_key, total, 1.0))[:, None]
    store_tokens(ctx.output, acc, tokens, end, ctx.D)
    inside = tokens < end
    if ctx.lse is not None:
        lse = tl.where(sees_a_key, peak * tl.abs(ctx.scale) + tl.log(total), float("-inf"))
        tl.store(ctx.lse + tokens, lse, mask=inside)
        if ctx.normalizer is not None:
            # Of the probabilities that the stored, rounded lse will give: of exp2(logits - lse), not of p.
            normalizer = tl.exp2(base_2(lse) - peak * scale) / total
            tl.store(ctx.normalizer + tokens, tl.where(sees_a_key, normalizer, 1.0), mask=inside)
    if ctx.square_norm is not None:
        tl.store(ctx.square_norm + tokens, tl.sum(acc * acc, 1), mask=inside)
    if ctx.max_logit is not None:
        logit = tl.where(inside & sees_a_key, peak * tl.abs(ctx.scale), float("-inf"))
        # As rows of a matrix: triton 3.7 does not compile the reduction of a vector to a scalar here for sm_100. Plus
        # 0, or NaN if a query's softmax is, which a maximum by itself passes over.
        largest = tl.max(tl.reshape(logit, (1, WIDTH)), 1)
        nothing_or_nan = 0.0 * tl.sum(tl.reshape(tl.where(inside, total, 0.0), (1, WIDTH)), 1)
        tl.store(ctx.max_logit + tl.arange(0, 1), largest + nothing_or_nan)


@triton.jit
def _attention_fwd_kernel(
    query,  # [B, H, N, D]
    key,
    value,
    output,
    lse,  # [B, H, N] fp32 or None
    normalizer,  # [B, H, N] fp32 or None; not without lse
    max_logit,  # [images, H, tiles] fp32 or None
    square_norm,  # [B, H, N] fp32 or None
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
    value_stride_b,
    value_stride_h,
    value_stride_n,
    value_stride_d,
    output_stride_b,
    output_stride_h,
    output_stride_n,
    output_stride_d,
    mask_stride_b,
    mask_stride_n,
    rope_stride_b,
    rope_stride_m,
    num_tiles,
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
    tile, place = locate(num_tiles, num_heads, num_tokens, num_prefix, cu_seqlens)
    if lse is not None:
        lse = statistic_of(lse, place, num_heads, num_tokens)
    if normalizer is not None:
        normalizer = statistic_of(normalizer, place, num_heads, num_tokens)
    if square_norm is not None:
        square_norm = statistic_of(square_norm, place, num_heads, num_tokens)
    if max_logit is not None:
        max_logit += tl.program_id(0)
    if key_mask is not None:
        key_mask += place.batch * mask_stride_b + place.start * mask_stride_n
    own(
        _attend_from_queries,
        Forward(
            rows_of(query, place, query_stride_b, query_stride_h, query_stride_n, query_stride_d),
            rows_of(key, place, key_stride_b, key_stride_h, key_stride_n, key_stride_d),
            rows_of(value, place, value_stride_b, value_stride_h, value_stride_n, value_stride_d),
            rows_of(output, place, output_stride_b, output_stride_h, output_stride_n, output_stride_d),
            rope_of(cos, sin, place, rope_stride_b, rope_stride_m, INTERLEAVED),
            key_mask,
            mask_stride_n,
            lse,
            normalizer,
            max_logit,
            square_norm,
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


def forward_launches(
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor | None,
    normalizer: Tensor | None,
    max_logit: Tensor | None,
    square_norm: Tensor | None,
    arch: int,
) -> list[Launch]:
    """The forward as launches.

    Args:
        inputs: the call.
        output: ``[B, H, N, D]``, any strides.
        lse: ``[B, H, N]`` fp32, contiguous, or ``None``.
        normalizer: ``[B, H, N]`` fp32, contiguous, or ``None``; what ``statistics_launches`` needs beside the lse.
        max_logit: ``[images, H, tiles]`` fp32, where ``tiles`` is ``plan.of(inputs, "forward", arch).num_tiles``; the
            largest logit of each program. Programs without queries, which only packing has, leave theirs as it is.
        square_norm: ``[B, H, N]`` fp32: sum of squares of each head of each output token, or ``None``.
        arch: compute capability times ten.
    """
    work = plan.of(inputs, "forward", arch)
    launch = Launch(
        kernel=_attention_fwd_kernel,
        grid=work.grid,
        arguments={
            "query": inputs.query,
            "key": inputs.key,
            "value": inputs.value,
            "output": output,
            "lse": lse,
            "normalizer": normalizer,
            "max_logit": max_logit,
            "square_norm": square_norm,
            **plan.strides(query=inputs.query, key=inputs.key, value=inputs.value, output=output),
            **work.arguments,
        },
        constants=work.constants,
        num_warps=work.num_warps,
        num_stages=work.num_stages,
    )
    return [launch]
