"""Backward: one kernel where a program owns a head, two where it owns a tile; `backward_bodies` has what they compute.

Of the two, the first owns tiles of queries and the second tiles of keys. Each reads queries, keys, values and the
gradient of the output, so 12 tensors pass between the GPU and its memory where there are 8. Short heads, if there are
enough of them for all multiprocessors, are owned whole: first all their queries, then all their keys, and only 8 pass.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ....._triton.launch import Launch, strided
from ...types import AttentionInputs
from .backward_bodies import Backward, grad_of_head, grad_of_key_value_tile, grad_of_query_tile
from .plan import backward_by_heads, launch_plan
from .primitives import mask_of, program_index, rope_of, rows_of, statistic_of


class Tensors(NamedTuple):
    """The tensors of all kernels here, whole; None for what a kernel does not take."""

    query: Any
    key: Any
    value: Any
    output: Any
    grad_output: Any
    grad_query: Any
    grad_key: Any
    grad_value: Any
    lse: Any
    delta: Any
    normalization: Any
    key_mask: Any
    rope: Any


class Constants(NamedTuple):
    """The constants of all kernels here."""

    D: Any
    BLOCK_D: Any
    BLOCK_M: Any
    BLOCK_N: Any
    TAIL: Any
    PREFIX: Any
    INTERLEAVED: Any
    PRECISION: Any
    NEGATIVE: Any
    RESIDENT_WIDTHS: Any


@triton.jit
def _run(body: tl.constexpr, tensors, cu_seqlens, sizes, scale, constants):
    """Run `body` on what this program needs of all tensors."""
    program = program_index(sizes, cu_seqlens)
    body(
        Backward(
            query=rows_of(tensors.query, program),
            key=rows_of(tensors.key, program),
            value=rows_of(tensors.value, program),
            output=None if tensors.output is None else rows_of(tensors.output, program),
            grad_output=rows_of(tensors.grad_output, program),
            grad_query=None if tensors.grad_query is None else rows_of(tensors.grad_query, program),
            grad_key=None if tensors.grad_key is None else rows_of(tensors.grad_key, program),
            grad_value=None if tensors.grad_value is None else rows_of(tensors.grad_value, program),
            lse=statistic_of(tensors.lse, program, sizes),
            delta=statistic_of(tensors.delta, program, sizes),
            normalization=statistic_of(tensors.normalization, program, sizes),
            key_mask=None if tensors.key_mask is None else mask_of(tensors.key_mask, program),
            rope=None if tensors.rope is None else rope_of(tensors.rope, program),
            program=program,
            scale=scale,
            D=constants.D,
            BLOCK_D=constants.BLOCK_D,
            BLOCK_M=constants.BLOCK_M,
            BLOCK_N=constants.BLOCK_N,
            TAIL=constants.TAIL,
            PREFIX=constants.PREFIX,
            INTERLEAVED=constants.INTERLEAVED,
            PRECISION=constants.PRECISION,
            RESIDENT_WIDTHS=constants.RESIDENT_WIDTHS,
            NEGATIVE=constants.NEGATIVE,
            PACKED=cu_seqlens is not None,
        )
    )


@triton.jit
def _attention_bwd_kernel(
    grad_query,  # [B, H, N, D]
    grad_key,
    grad_value,
    grad_output,
    query,
    key,
    value,
    output,
    lse,  # [B, H, N] fp32
    delta,  # [B, H, N] fp32, written and read
    normalization,  # [B, H, N] fp32, written and read
    key_mask,  # [B, N] bool or None
    rope,  # cos and sin [B, M, D] or None
    cu_seqlens,  # [images + 1] int32 or None
    sizes,  # plan.Sizes
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PREFIX: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr,  # whether scale is
    RESIDENT_WIDTHS: tl.constexpr,  # of the tiles that keep a head in shared memory
):
    _run(
        grad_of_head,
        Tensors(
            query,
            key,
            value,
            output,
            grad_output,
            grad_query,
            grad_key,
            grad_value,
            lse,
            delta,
            normalization,
            key_mask,
            rope,
        ),
        cu_seqlens,
        sizes,
        scale,
        Constants(D, BLOCK_D, BLOCK_M, BLOCK_N, TAIL, PREFIX, INTERLEAVED, PRECISION, NEGATIVE, RESIDENT_WIDTHS),
    )


@triton.jit
def _attention_bwd_query_kernel(
    grad_query,  # [B, H, N, D]
    grad_output,
    query,
    key,
    value,
    output,
    lse,  # [B, H, N] fp32
    delta,  # [B, H, N] fp32, written
    normalization,  # [B, H, N] fp32, written
    key_mask,  # [B, N] bool or None
    rope,  # cos and sin [B, M, D] or None
    cu_seqlens,  # [images + 1] int32 or None
    sizes,  # plan.Sizes
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PREFIX: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr,  # whether scale is
):
    _run(
        grad_of_query_tile,
        Tensors(
            query, key, value, output, grad_output, grad_query, None, None, lse, delta, normalization, key_mask, rope
        ),
        cu_seqlens,
        sizes,
        scale,
        Constants(D, BLOCK_D, BLOCK_M, BLOCK_N, TAIL, PREFIX, INTERLEAVED, PRECISION, NEGATIVE, ()),
    )


@triton.jit
def _attention_bwd_key_value_kernel(
    grad_key,  # [B, H, N, D]
    grad_value,
    grad_output,
    query,
    key,
    value,
    lse,  # [B, H, N] fp32
    delta,
    normalization,
    key_mask,  # [B, N] bool or None
    rope,  # cos and sin [B, M, D] or None
    cu_seqlens,  # [images + 1] int32 or None
    sizes,  # plan.Sizes
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PREFIX: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    NEGATIVE: tl.constexpr,  # whether scale is
):
    _run(
        grad_of_key_value_tile,
        Tensors(
            query, key, value, None, grad_output, None, grad_key, grad_value, lse, delta, normalization, key_mask, rope
        ),
        cu_seqlens,
        sizes,
        scale,
        Constants(D, BLOCK_D, BLOCK_M, BLOCK_N, TAIL, PREFIX, INTERLEAVED, PRECISION, NEGATIVE, ()),
    )


def backward_launches(
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor,
    delta: Tensor,
    normalization: Tensor,
    grad_output: Tensor,
    grad_query: Tensor,
    grad_key: Tensor,
    grad_value: Tensor,
    capability: int,
) -> list[Launch]:
    """The backward as one launch, or two to be run in order.

    Args:
        inputs: the call.
        output, lse: of the forward; ``lse`` ``[B, H, N]`` fp32, contiguous.
        delta, normalization: ``[B, H, N]`` fp32, contiguous; what programs that own queries compute for those that own
            keys.
        grad_output: ``[B, H, N, D]``, any strides, zero ones included.
        grad_query, grad_key, grad_value: ``[B, H, N, D]``, any strides that do not overlap; every element is written.
        capability: of the GPU, ten times the version.
    """
    tensors = {
        "query": strided(inputs.query),
        "key": strided(inputs.key),
        "value": strided(inputs.value),
        "grad_output": strided(grad_output),
        "lse": lse,
        "delta": delta,
        "normalization": normalization,
    }
    of_queries = tensors | {"output": strided(output), "grad_query": strided(grad_query)}
    of_keys = {"grad_key": strided(grad_key), "grad_value": strided(grad_value)}
    negative = {"NEGATIVE": inputs.scale < 0}
    if backward_by_heads(inputs, capability):
        plan = launch_plan(inputs, "backward", capability)
        constants = negative | {"RESIDENT_WIDTHS": plan.resident_widths}
        return [plan.launch(_attention_bwd_kernel, of_queries | of_keys, constants)]
    by_queries, by_keys = (launch_plan(inputs, kernel, capability) for kernel in ("grad_query", "grad_key_value"))
    return [
        by_queries.launch(_attention_bwd_query_kernel, of_queries, negative),
        by_keys.launch(_attention_bwd_key_value_kernel, tensors | of_keys, negative),
    ]
