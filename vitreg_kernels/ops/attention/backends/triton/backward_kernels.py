"""Backward: two kernels that recompute the probabilities from the saved log-sum-exp, without atomics.

With S = scale Q K^T, P = exp(S - lse) and dP = dO V^T: dS = P * (dP - delta), delta = rowsum(dO * O), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO. The first kernel owns queries: it computes delta, dQ and the queries' normalizers (see
`primitives.probabilities`), and leaves delta and the normalizers to the second, which owns keys. Each gradient is
summed by one program in a fixed order, so results are the same from run to run.

Source: Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 2, split in two so that nothing is added to global memory.
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
    load_tokens,
    locate,
    own,
    probabilities,
    rope_of,
    rows_of,
    signed,
    statistic_of,
    store_gradient,
    store_tokens,
    sweep,
    takes_part,
)


class GradQuery(NamedTuple):
    """What a program computes the gradient of its queries with."""

    query: Rows
    key: Rows
    value: Rows
    output: Rows
    grad_output: Rows
    grad_query: Rows
    rope: Rope
    key_mask: Any
    mask_stride: Any
    lse: Any
    delta: Any
    normalizer: Any
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
def _fold_keys(state, owned, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    grad_query, total = state
    query, grad_output, lse, delta = owned
    tokens = first + tl.arange(0, WIDTH)
    key = load_rotated(ctx.key, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    value = load_tokens(ctx.value, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    logits = tl.dot(query, tl.trans(key), input_precision=ctx.PRECISION)  # [M, W]
    p = probabilities(logits, lse[:, None], ctx.scale)
    if MASKED or ctx.key_mask is not None:
        valid = takes_part(ctx.key_mask, ctx.mask_stride, tokens, end)
        p = tl.where(valid[None, :], p, 0.0)
    grad_p = tl.dot(grad_output, tl.trans(value), input_precision=ctx.PRECISION)
    grad_logits = p * (grad_p - delta[:, None])
    grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision=ctx.PRECISION)
    return grad_query, total + tl.sum(p, 1)


@triton.jit
def _grad_of_queries(ctx, first, end, WIDTH: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, True)
    grad_output = load_tokens(ctx.grad_output, tokens, end, ctx.D, ctx.BLOCK_D, True)
    output = load_tokens(ctx.output, tokens, end, ctx.D, ctx.BLOCK_D, True)
    delta = tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(ctx.delta + tokens, delta, mask=tokens < end)
    lse = load_lse(ctx.lse, tokens, end)
    owned = (signed(query, ctx.scale), grad_output, lse, delta)
    nothing = tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32), tl.zeros([WIDTH], tl.float32)
    grad_query, total = sweep(_fold_keys, nothing, owned, ctx)
    normalizer = 1.0 / tl.where(total > 0.0, total, 1.0)
    tl.store(ctx.normalizer + tokens, normalizer, mask=tokens < end)
    store_gradient(ctx.grad_query, ctx.rope, grad_query * (normalizer * ctx.scale)[:, None], tokens, end, ctx.D)


@triton.jit
def _attention_bwd_query_kernel(
    query,  # [B, H, N, D]
    key,
    value,
    output,
    grad_output,
    grad_query,
    lse,  # [B, H, N] fp32
    delta,  # [B, H, N] fp32, written
    normalizer,  # [B, H, N] fp32, written
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
    grad_output_stride_b,
    grad_output_stride_h,
    grad_output_stride_n,
    grad_output_stride_d,
    grad_query_stride_b,
    grad_query_stride_h,
    grad_query_stride_n,
    grad_query_stride_d,
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
    if key_mask is not None:
        key_mask += place.batch * mask_stride_b + place.start * mask_stride_n
    own(
        _grad_of_queries,
        GradQuery(
            rows_of(query, place, query_stride_b, query_stride_h, query_stride_n, query_stride_d),
            rows_of(key, place, key_stride_b, key_stride_h, key_stride_n, key_stride_d),
            rows_of(value, place, value_stride_b, value_stride_h, value_stride_n, value_stride_d),
            rows_of(output, place, output_stride_b, output_stride_h, output_stride_n, output_stride_d),
            rows_of(
                grad_output,
                place,
                grad_output_stride_b,
                grad_output_stride_h,
                grad_output_stride_n,
                grad_output_stride_d,
            ),
            rows_of(
                grad_query, place, grad_query_stride_b, grad_query_stride_h, grad_query_stride_n, grad_query_stride_d
            ),
            rope_of(cos, sin, place, rope_stride_b, rope_stride_m, INTERLEAVED),
            key_mask,
            mask_stride_n,
            statistic_of(lse, place, num_heads, num_tokens),
            statistic_of(delta, place, num_heads, num_tokens),
            statistic_of(normalizer, place, num_heads, num_tokens),
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


class GradKeyValue(NamedTuple):
    """What a program computes the gradients of its keys and values with."""

    query: Rows
    key: Rows
    value: Rows
    grad_output: Rows
    grad_key: Rows
    grad_value: Rows
    rope: Rope
    key_mask: Any
    mask_stride: Any
    lse: Any
    delta: Any
    normalizer: Any
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
def _fold_queries(state, owned, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    grad_key, grad_value = state
    key, value = owned
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    grad_output = load_tokens(ctx.grad_output, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    lse = load_lse(ctx.lse, tokens, end)  # probabilities of queries beyond the end are 0 by it, so nothing is masked
    delta = tl.load(ctx.delta + tokens, mask=tokens < end, other=0.0)
    normalizer = tl.load(ctx.normalizer + tokens, mask=tokens < end, other=0.0)
    logits = tl.dot(key, tl.trans(query), input_precision=ctx.PRECISION)  # [M, W], keys by queries
    p = probabilities(logits, lse[None, :], ctx.scale) * normalizer[None, :]
    grad_value = tl.dot(p.to(grad_output.dtype), grad_output, grad_value, input_precision=ctx.PRECISION)
    grad_p = tl.dot(value, tl.trans(grad_output), input_precision=ctx.PRECISION)
    grad_logits = p * (grad_p - delta[None, :])
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=ctx.PRECISION)
    return grad_key, grad_value


@triton.jit
def _grad_of_keys_and_values(ctx, first, end, WIDTH: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    key = load_rotated(ctx.key, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, True)
    value = load_tokens(ctx.value, tokens, end, ctx.D, ctx.BLOCK_D, True)
    nothing = tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32), tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32)
    owned = (signed(key, ctx.scale), value)
    grad_key, grad_value = sweep(_fold_queries, nothing, owned, ctx)
    grad_key *= ctx.scale
    if ctx.key_mask is not None:
        # A masked key's row of the products above means nothing, but it is its own: it reaches no other key.
        valid = takes_part(ctx.key_mask, ctx.mask_stride, tokens, end)[:, None]
        grad_key = tl.where(valid, grad_key, 0.0)
        grad_value = tl.where(valid, grad_value, 0.0)
    store_gradient(ctx.grad_key, ctx.rope, grad_key, tokens, end, ctx.D)
    store_tokens(ctx.grad_value, grad_value, tokens, end, ctx.D)


@triton.jit
def _attention_bwd_key_value_kernel(
    query,  # [B, H, N, D]
    key,
    value,
    grad_output,
    grad_key,
    grad_value,
    lse,  # [B, H, N] fp32
    delta,  # [B, H, N] fp32
    normalizer,  # [B, H, N] fp32
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
    grad_output_stride_b,
    grad_output_stride_h,
    grad_output_stride_n,
    grad_output_stride_d,
    grad_key_stride_b,
    grad_key_stride_h,
    grad_key_stride_n,
    grad_key_stride_d,
    grad_value_stride_b,
    grad_value_stride_h,
    grad_value_stride_n,
    grad_value_stride_d,
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
    if key_mask is not None:
        key_mask += place.batch * mask_stride_b + place.start * mask_stride_n
    own(
        _grad_of_keys_and_values,
        GradKeyValue(
            rows_of(query, place, query_stride_b, query_stride_h, query_stride_n, query_stride_d),
            rows_of(key, place, key_stride_b, key_stride_h, key_stride_n, key_stride_d),
            rows_of(value, place, value_stride_b, value_stride_h, value_stride_n, value_stride_d),
            rows_of(
                grad_output,
                place,
                grad_output_stride_b,
                grad_output_stride_h,
                grad_output_stride_n,
                grad_output_stride_d,
            ),
            rows_of(grad_key, place, grad_key_stride_b, grad_key_stride_h, grad_key_stride_n, grad_key_stride_d),
            rows_of(
                grad_value, place, grad_value_stride_b, grad_value_stride_h, grad_value_stride_n, grad_value_stride_d
            ),
            rope_of(cos, sin, place, rope_stride_b, rope_stride_m, INTERLEAVED),
            key_mask,
            mask_stride_n,
            statistic_of(lse, place, num_heads, num_tokens),
            statistic_of(delta, place, num_heads, num_tokens),
            statistic_of(normalizer, place, num_heads, num_tokens),
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


def backward_launches(
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor,
    delta: Tensor,
    normalizer: Tensor,
    grad_output: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    arch: int,
) -> list[Launch]:
    """The backward as launches, to be run in order.

    Args:
        inputs: the call.
        output, lse: of the forward; ``lse`` ``[B, H, N]`` fp32, contiguous.
        delta, normalizer: ``[B, H, N]`` fp32, contiguous: room for what the first launch leaves to the second.
        grad_output: ``[B, H, N, D]``, any strides, zero ones included.
        grad_query, grad_key, grad_value: ``[B, H, N, D]``, any strides that do not overlap; every element is written.
        arch: compute capability times ten.
    """
    shared = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "grad_output": grad_output}
    return [
        _launch(
            _attention_bwd_query_kernel,
            plan.of(inputs, "grad_query", arch),
            {**shared, "output": output, "grad_query": grad_query},
            {"lse": lse, "delta": delta, "normalizer": normalizer},
        ),
        _launch(
            _attention_bwd_key_value_kernel,
            plan.of(inputs, "grad_key_value", arch),
            {**shared, "grad_key": grad_key, "grad_value": grad_value},
            {"lse": lse, "delta": delta, "normalizer": normalizer},
        ),
    ]


def _launch(kernel: Any, work: plan.Work, tokens: dict[str, Tensor], statistics: dict[str, Tensor]) -> Launch:
    arguments = {**tokens, **statistics, **plan.strides(**tokens), **work.arguments}
    return Launch(kernel, work.grid, arguments, work.constants, work.num_warps, work.num_stages)
