"""Backward: one kernel where a program owns a head, two where it owns a tile; `backward_bodies` has what they compute.

Of tiles, the first kernel owns queries and the second one keys. Each reads queries, keys, values and the gradient of
the output, so 12 tensors pass between the GPU and its memory where there are 8. Of short heads, if there are enough of
them for all multiprocessors, a program owns first all queries and then all keys, and only 8 pass.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ....._runtime.launch import Constant, Launch
from ...types import AttentionInputs
from . import plan
from .backward_bodies import Backward, grad_of_head, grad_of_keys_and_values, grad_of_queries
from .primitives import Rope, locate, own, rope_offset, rows_of, statistic_of


@triton.jit
def _attention_bwd_kernel(
    query,  # [B, H, N, D]
    key,
    value,
    output,
    grad_output,
    grad_query,
    grad_key,
    grad_value,
    lse,  # [B, H, N] fp32
    delta,  # [B, H, N] fp32, written and read
    normalizer,  # [B, H, N] fp32, written and read
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
    NEGATIVE: tl.constexpr,  # scale
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    HELD: tl.constexpr,  # widths of the tiles of a held head
):
    _, place = locate(num_programs, num_heads, num_tokens, num_prefix, cu_seqlens)
    if cos is not None:
        offset = rope_offset(place, rope_stride_b, rope_stride_m)
        cos += offset
        sin += offset
    if key_mask is not None:
        key_mask += place.batch * mask_stride_b + place.start * mask_stride_n
    grad_of_head(
        Backward(
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
            rows_of(grad_key, place, grad_key_stride_b, grad_key_stride_h, grad_key_stride_n, grad_key_stride_d),
            rows_of(
                grad_value, place, grad_value_stride_b, grad_value_stride_h, grad_value_stride_n, grad_value_stride_d
            ),
            Rope(cos, sin, rope_stride_m, num_prefix, INTERLEAVED),
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
            cu_seqlens is not None,
            NEGATIVE,
            PRECISION,
        ),
        HELD,
    )


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
    NEGATIVE: tl.constexpr,  # scale
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
    own(
        grad_of_queries,
        Backward(
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
            None,
            None,
            Rope(cos, sin, rope_stride_m, num_prefix, INTERLEAVED),
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
            cu_seqlens is not None,
            NEGATIVE,
            PRECISION,
        ),
        tile,
    )


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
    NEGATIVE: tl.constexpr,  # scale
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
    own(
        grad_of_keys_and_values,
        Backward(
            rows_of(query, place, query_stride_b, query_stride_h, query_stride_n, query_stride_d),
            rows_of(key, place, key_stride_b, key_stride_h, key_stride_n, key_stride_d),
            rows_of(value, place, value_stride_b, value_stride_h, value_stride_n, value_stride_d),
            None,
            rows_of(
                grad_output,
                place,
                grad_output_stride_b,
                grad_output_stride_h,
                grad_output_stride_n,
                grad_output_stride_d,
            ),
            None,
            rows_of(grad_key, place, grad_key_stride_b, grad_key_stride_h, grad_key_stride_n, grad_key_stride_d),
            rows_of(
                grad_value, place, grad_value_stride_b, grad_value_stride_h, grad_value_stride_n, grad_value_stride_d
            ),
            Rope(cos, sin, rope_stride_m, num_prefix, INTERLEAVED),
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
            cu_seqlens is not None,
            NEGATIVE,
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
    """The backward as one launch, or two to be run in order.

    Args:
        inputs: the call.
        output, lse: of the forward; ``lse`` ``[B, H, N]`` fp32, contiguous.
        delta, normalizer: ``[B, H, N]`` fp32, contiguous: room for what who owns queries leaves to who owns keys.
        grad_output: ``[B, H, N, D]``, any strides, zero ones included.
        grad_query, grad_key, grad_value: ``[B, H, N, D]``, any strides that do not overlap; every element is written.
        arch: compute capability times ten.
    """
    tokens = {"query": inputs.query, "key": inputs.key, "value": inputs.value, "grad_output": grad_output}
    of_queries = {"output": output, "grad_query": grad_query}
    of_keys = {"grad_key": grad_key, "grad_value": grad_value}
    statistics = {"lse": lse, "delta": delta, "normalizer": normalizer}
    negative = {"NEGATIVE": inputs.scale < 0}
    if plan.backward_by_heads(inputs, arch):
        work = plan.of(inputs, "backward", arch)
        constants = {**negative, "HELD": work.held}
        return [_launch(_attention_bwd_kernel, work, {**tokens, **of_queries, **of_keys}, statistics, constants)]
    by_queries, by_keys = (plan.of(inputs, kernel, arch) for kernel in ("grad_query", "grad_key_value"))
    return [
        _launch(_attention_bwd_query_kernel, by_queries, {**tokens, **of_queries}, statistics, negative),
        _launch(_attention_bwd_key_value_kernel, by_keys, {**tokens, **of_keys}, statistics, negative),
    ]


def _launch(
    kernel: Any,
    work: plan.Work,
    tokens: dict[str, Tensor],
    statistics: dict[str, Tensor],
    constants: dict[str, Constant],
) -> Launch:
    return Launch(
        kernel=kernel,
        grid=work.grid,
        arguments={**tokens, **statistics, **plan.strides(**tokens), **work.arguments},
        constants={**work.constants, **constants},
        num_warps=work.num_warps,
        num_stages=work.num_stages,
    )
