"""Statistics that take a second pass over the logits, with the log-sum-exp of the forward.

Programs own keys, so the attention a key receives is a sum within one program. In the forward, whose programs own
queries, many programs would have to add to it.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....._triton.launch import Launch, strided
from ...types import AttentionInputs
from .plan import ForwardBuffers, LaunchPlan
from .primitives import (
    ProgramIndex,
    RopeRows,
    Rows,
    for_owned_tile,
    for_swept_tiles,
    load_lse,
    load_rotated,
    mask_of,
    prefix_attention_of,
    probabilities,
    program_index,
    rope_of,
    rows_of,
    statistic_of,
    takes_part,
)


class Statistics(NamedTuple):
    """What a program computes the statistics of its keys with; None for what the call does not need."""

    query: Rows
    key: Rows
    lse: Any
    normalizer: Any
    received_attention: Any
    prefix_attention: Rows | None
    key_mask: Rows | None
    rope: RopeRows | None
    program: ProgramIndex
    scale: Any
    D: Any
    BLOCK_D: Any
    BLOCK_M: Any
    BLOCK_N: Any
    TAIL: Any
    PREFIX: Any
    INTERLEAVED: Any
    PRECISION: Any
    NEGATIVE: Any


@triton.jit
def _from_queries(key, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """[W, M] probabilities of the owned keys for queries first to first + WIDTH; 0 for queries from `end` on.

    Queries are the rows, as in the forward: then each logit is summed in the same order, and the normalizer fits.
    """
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx, tokens, end, MASKED)
    logits = tl.dot(-query if ctx.NEGATIVE else query, tl.trans(key), input_precision=ctx.PRECISION)
    normalizer = tl.load(ctx.normalizer + tokens, mask=tokens < end, other=0.0)
    return probabilities(logits, load_lse(ctx.lse, tokens, end)[:, None], ctx.scale) * normalizer[:, None]


@triton.jit
def _receive(received, key, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return received + tl.sum(_from_queries(key, ctx, first, end, WIDTH, MASKED), 0)


@triton.jit
def _statistics_of_keys(ctx, first, end, WIDTH: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    inside = tokens < end
    valid = takes_part(ctx.key_mask, tokens, end)
    key = load_rotated(ctx.key, ctx, tokens, end, True)
    if ctx.received_attention is not None:
        received = for_swept_tiles(_receive, tl.zeros([WIDTH], tl.float32), key, ctx) / ctx.program.num_tokens
        tl.store(ctx.received_attention + tokens, tl.where(valid, received, 0.0), mask=inside)
    if ctx.prefix_attention is not None:
        for prefix in range(0, ctx.program.num_prefix, 16):
            p = _from_queries(key, ctx, prefix, ctx.program.num_prefix, 16, True)
            queries = prefix + tl.arange(0, 16)
            cells = queries.to(tl.int64)[:, None] * ctx.prefix_attention.row_stride + tokens[None, :]
            exists = (queries < ctx.program.num_prefix)[:, None] & inside[None, :]
            tl.store(ctx.prefix_attention.pointer + cells, tl.where(valid[None, :], p, 0.0), mask=exists)


@triton.jit
def _statistics_fwd_kernel(
    query,  # [B, H, N, D]
    key,
    lse,  # [B, H, N] fp32
    normalizer,  # [B, H, N] fp32
    received_attention,  # [B, H, N] fp32 or None
    prefix_attention,  # [B, H, P, N] fp32 or None
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
    program = program_index(sizes, cu_seqlens)
    for_owned_tile(
        _statistics_of_keys,
        Statistics(
            query=rows_of(query, program),
            key=rows_of(key, program),
            lse=statistic_of(lse, program, sizes),
            normalizer=statistic_of(normalizer, program, sizes),
            received_attention=None if received_attention is None else statistic_of(received_attention, program, sizes),
            prefix_attention=None
            if prefix_attention is None
            else prefix_attention_of(prefix_attention, program, sizes),
            key_mask=None if key_mask is None else mask_of(key_mask, program),
            rope=None if rope is None else rope_of(rope, program),
            program=program,
            scale=scale,
            D=D,
            BLOCK_D=BLOCK_D,
            BLOCK_M=BLOCK_M,
            BLOCK_N=BLOCK_N,
            TAIL=TAIL,
            PREFIX=PREFIX,
            INTERLEAVED=INTERLEAVED,
            PRECISION=PRECISION,
            NEGATIVE=NEGATIVE,
        ),
    )


def statistics_launch(
    inputs: AttentionInputs, buffers: ForwardBuffers, plan: LaunchPlan, *, with_prefix_attention: bool
) -> Launch:
    """What is left of the statistics, from the forward's lse and normalizer.

    Args:
        inputs: the call.
        buffers: of which ``received_attention`` is written, unless it is ``None``.
        plan: of this kernel.
        with_prefix_attention: whether ``prefix_attention`` is written here; else the forward did.
    """
    return plan.launch(
        _statistics_fwd_kernel,
        {
            "query": strided(inputs.query),
            "key": strided(inputs.key),
            "lse": buffers.lse,
            "normalizer": buffers.normalizer,
            "received_attention": buffers.received_attention,
            "prefix_attention": buffers.prefix_attention if with_prefix_attention else None,
        },
        {"NEGATIVE": inputs.scale < 0},
    )
