"""Forward: softmax(scale * Q K^T) V by an online softmax in base 2, fp32 statistics and accumulation.

At the lengths of most ViTs one program takes a whole head: it keeps all keys and values *resident* in shared memory and
passes the queries by them tile by tile, so that each is read once. At longer ones, and where resident tiles would make
registers spill, a program owns one tile of queries and sweeps the keys and values.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867); tiling as in Dao,
"FlashAttention-2" (arXiv 2307.08691), algorithm 1.
"""

# ruff: noqa: ANN001, ANN202, RUF005  (what a kernel takes is traced, not annotated, shapes stand in comments; triton
# unpacks no tuples)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ....._triton.launch import Launch, strided
from ...types import AttentionInputs
from .plan import ForwardBuffers, LaunchPlan, leaves_small_remainder, prefix_tiles
from .primitives import (
    FLOOR,
    ProgramIndex,
    RopeRows,
    Rows,
    base_2,
    exponent_scale,
    for_owned_tile,
    for_swept_tiles,
    load_rotated,
    load_tokens,
    mask_of,
    prefix_attention_of,
    program_index,
    rope_of,
    rows_of,
    statistic_of,
    store_tokens,
    takes_part,
)


class Forward(NamedTuple):
    """What a program attends with; None for what the call does not need."""

    query: Rows
    key: Rows
    value: Rows
    output: Rows
    lse: Any
    normalizer: Any
    max_logit: Any
    square_norm: Any
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
    RESIDENT_WIDTHS: Any
    SMALL_REMAINDER: Any
    PREFIX_TILES: Any
    NEGATIVE: Any
    PACKED: Any


@triton.jit
def _load_queries(ctx, first, end, WIDTH: tl.constexpr):
    return load_rotated(ctx.query, ctx, first + tl.arange(0, WIDTH), end, True)


@triton.jit
def _load_keys(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return load_rotated(ctx.key, ctx, first + tl.arange(0, WIDTH), end, MASKED)


@triton.jit
def _load_values(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return load_tokens(ctx.value, ctx, first + tl.arange(0, WIDTH), end, MASKED, ctx.key_mask)


@triton.jit
def _attend(state, query, ctx, key, value, first, end, MASKED: tl.constexpr):
    """One step of the online softmax."""
    acc, total, peak = state  # [M, BLOCK_D], [M], [M]; peak is in units of raw logits
    scale = exponent_scale(ctx.scale)
    logits = tl.dot(query, tl.trans(key), input_precision=ctx.PRECISION)  # [M, W]
    if MASKED or ctx.key_mask is not None:
        valid = takes_part(ctx.key_mask, first + tl.arange(0, key.shape[0]), end)
        logits = tl.where(valid[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    p = tl.exp2(tl.fma(logits, scale, -(new_peak * scale)[:, None]))
    decay = tl.exp2((peak - new_peak) * scale)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision=ctx.PRECISION)
    return acc, total, new_peak


@triton.jit
def _initial_state(ctx, WIDTH: tl.constexpr):
    """Of the online softmax: accumulator, sum of exponentials and running maximum."""
    return (
        tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32),
        tl.zeros([WIDTH], tl.float32),
        tl.full([WIDTH], FLOOR, tl.float32),
    )


@triton.jit
def _store(state, ctx, first, end):
    """Write the output of the queries from first to end, and their statistics."""
    acc, total, peak = state
    WIDTH: tl.constexpr = acc.shape[0]
    tokens = first + tl.arange(0, WIDTH)
    inside = tokens < end
    sees_a_key = total != 0.0  # true of NaN, which is to show in the output
    acc = acc * (1.0 / tl.where(sees_a_key, total, 1.0))[:, None]
    store_tokens(ctx.output, ctx, acc, tokens, end)
    if ctx.lse is not None:
        lse = tl.where(sees_a_key, peak * tl.abs(ctx.scale) + tl.log(total), float("-inf"))
        tl.store(ctx.lse + tokens, lse, mask=inside)
        if ctx.normalizer is not None:
            # See `probabilities`: it belongs to the stored, rounded lse, so it is not 1 / total.
            normalizer = tl.exp2(base_2(lse) - peak * exponent_scale(ctx.scale)) / total
            tl.store(ctx.normalizer + tokens, tl.where(sees_a_key, normalizer, 1.0), mask=inside)
    if ctx.square_norm is not None:
        tl.store(ctx.square_norm + tokens, tl.sum(acc * acc, 1), mask=inside)
    if ctx.max_logit is not None:
        logit = tl.where(inside & sees_a_key, peak * tl.abs(ctx.scale), float("-inf"))
        # Reduced as a matrix of one row: triton 3.7 does not compile the reduction of a vector to a scalar here for
        # sm_100. A maximum passes over NaN, so 0 is added, or NaN if the softmax of a query is.
        largest = tl.max(tl.reshape(logit, (1, WIDTH)), 1)
        nothing_or_nan = 0.0 * tl.sum(tl.reshape(tl.where(inside, total, 0.0), (1, WIDTH)), 1)
        tile = tl.cdiv(first, ctx.BLOCK_M)  # where one tile is shorter than the others, it is the first
        tl.store(ctx.max_logit + tile + tl.arange(0, 1), largest + nothing_or_nan)


@triton.jit
def _load_and_attend(state, query, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    key = _load_keys(ctx, first, end, WIDTH, MASKED)
    value = _load_values(ctx, first, end, WIDTH, MASKED)
    return _attend(state, query, ctx, key, value, first, end, MASKED)


@triton.jit
def _attend_from_tile(ctx, first, end, WIDTH: tl.constexpr):
    """The owned tile of queries attends to keys and values that are loaded tile by tile."""
    query = _load_queries(ctx, first, end, WIDTH)
    query = -query if ctx.NEGATIVE else query  # see `exponent_scale`
    _store(for_swept_tiles(_load_and_attend, _initial_state(ctx, WIDTH), query, ctx), ctx, first, end)


@triton.jit
def _keep_in_smem(ctx, WIDTHS: tl.constexpr):
    """Tiles of all keys and values. Products alone use them, so triton keeps them in shared memory."""
    resident = ()
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        key = _load_keys(ctx, first, ctx.program.num_tokens, WIDTHS[i], ctx.PACKED or i == len(WIDTHS) - 1)
        value = _load_values(ctx, first, ctx.program.num_tokens, WIDTHS[i], ctx.PACKED or i == len(WIDTHS) - 1)
        resident = resident + ((-key if ctx.NEGATIVE else key, value),)  # see `exponent_scale`
        first += WIDTHS[i]
    return resident


@triton.jit
def _attend_to_resident(state, query, ctx, resident, FROM: tl.constexpr, TO: tl.constexpr):
    """Fold the resident tiles from FROM up to TO into the state."""
    first = 0
    for i in tl.static_range(FROM):
        first += resident[i][0].shape[0]
    for i in tl.static_range(FROM, TO):
        key, value = resident[i]
        if not ctx.PACKED:
            state = _attend(state, query, ctx, key, value, first, ctx.program.num_tokens, i == len(resident) - 1)
        elif first + key.shape[0] <= ctx.program.num_tokens:
            state = _attend(state, query, ctx, key, value, first, ctx.program.num_tokens, False)
        elif first < ctx.program.num_tokens:
            state = _attend(state, query, ctx, key, value, first, ctx.program.num_tokens, True)
        first += key.shape[0]
    return state


@triton.jit
def _attend_from_16_queries(ctx, resident, first, remainder_rows):
    """Store what the prefix tokens among queries `first` to `first + 16` attend to, and the output of the remainder.

    The remainder are the queries before `remainder_rows`, which no full tile owns.

    Transposed, keys by queries: tensor cores want 64 rows or more, and of 16 queries that would be mostly padding.
    """
    end = ctx.program.num_tokens
    scale = exponent_scale(ctx.scale)
    query = _load_queries(ctx, first, end, 16)
    logits = ()  # of all keys, so this softmax needs no decay
    peak = tl.full([16], FLOOR, tl.float32)
    start = 0
    for i in tl.static_range(len(resident)):
        key = resident[i][0]
        products = tl.dot(key, tl.trans(query), input_precision=ctx.PRECISION)  # [W, 16]
        if ctx.PACKED or ctx.key_mask is not None or i == len(resident) - 1:
            valid = takes_part(ctx.key_mask, start + tl.arange(0, key.shape[0]), end)
            products = tl.where(valid[:, None], products, float("-inf"))
        peak = tl.maximum(peak, tl.max(products, 0))
        logits = logits + (products,)
        start += key.shape[0]
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([ctx.BLOCK_D, 16], tl.float32)
    for i in tl.static_range(len(resident)):
        value = resident[i][1]
        p = tl.exp2(tl.fma(logits[i], scale, -(peak * scale)[None, :]))
        total += tl.sum(p, 0)
        acc = tl.dot(tl.trans(value), p.to(value.dtype), acc, input_precision=ctx.PRECISION)
    if ctx.prefix_attention is not None:
        normalizer = 1.0 / tl.where(total != 0.0, total, 1.0)
        start = 0
        for i in tl.static_range(len(resident)):
            tokens = first + tl.arange(0, 16)
            keys = start + tl.arange(0, resident[i][0].shape[0])
            p = tl.exp2(tl.fma(logits[i], scale, -(peak * scale)[None, :])) * normalizer[None, :]
            cells = tokens.to(tl.int64)[None, :] * ctx.prefix_attention.row_stride + keys[:, None]
            exists = (tokens < ctx.program.num_prefix)[None, :] & (keys < end)[:, None]
            tl.store(ctx.prefix_attention.pointer + cells, p, mask=exists)
            start += resident[i][0].shape[0]
    if first < remainder_rows:
        _store((tl.trans(acc), total, peak), ctx, first, remainder_rows)


@triton.jit
def _attend_from_small_head(ctx, WIDTHS: tl.constexpr):
    """All queries of a head that fits one tile."""
    first = 0
    end = ctx.program.num_tokens
    query = _load_queries(ctx, first, end, ctx.BLOCK_M)
    resident = _keep_in_smem(ctx, WIDTHS)
    for i in tl.static_range(ctx.PREFIX_TILES):
        _attend_from_16_queries(ctx, resident, 16 * i, first)
    state = _initial_state(ctx, ctx.BLOCK_M)
    _store(_attend_to_resident(state, query, ctx, resident, 0, len(resident)), ctx, first, end)


@triton.jit
def _attend_from_large_head(ctx):
    """All queries of a head: first those that full tiles would leave over, if there are 16 or less, then full tiles."""
    end = ctx.program.num_tokens
    remainder_rows = end % ctx.BLOCK_M
    if ctx.PACKED:
        remainder_rows = tl.where(remainder_rows <= 16, remainder_rows, 0)
    elif not ctx.SMALL_REMAINDER:
        remainder_rows = 0
    query = _load_queries(ctx, remainder_rows, end, ctx.BLOCK_M)
    resident = _keep_in_smem(ctx, ctx.RESIDENT_WIDTHS)
    for i in tl.static_range(ctx.PREFIX_TILES):
        _attend_from_16_queries(ctx, resident, 16 * i, remainder_rows)
    if ctx.SMALL_REMAINDER and ctx.PREFIX_TILES == 0:
        _attend_from_16_queries(ctx, resident, 0, remainder_rows)
    # The next queries are loaded before the last tile of keys. Loaded earlier, they would take the registers that a
    # third program on the multiprocessor needs. Where two full tiles and a rest are held, shared memory has room for
    # two programs only, so there they are loaded first. (With num_stages they would take shared memory twice over.)
    LAST: tl.constexpr = len(ctx.RESIDENT_WIDTHS) - 1
    TWO_PROGRAMS: tl.constexpr = LAST > 1 and ctx.RESIDENT_WIDTHS[1] == ctx.BLOCK_N
    BEFORE: tl.constexpr = 0 if TWO_PROGRAMS else LAST
    for start in range(remainder_rows, end, ctx.BLOCK_M):
        state = _initial_state(ctx, ctx.BLOCK_M)
        if ctx.rope is None:
            state = _attend_to_resident(state, query, ctx, resident, 0, BEFORE)
            next_query = _load_queries(ctx, start + ctx.BLOCK_M, end, ctx.BLOCK_M)
            _store(_attend_to_resident(state, query, ctx, resident, BEFORE, LAST + 1), ctx, start, end)
            query = next_query
        else:  # rotated queries wait for their values, and take registers
            query = _load_queries(ctx, start, end, ctx.BLOCK_M)
            _store(_attend_to_resident(state, query, ctx, resident, 0, LAST + 1), ctx, start, end)


@triton.jit
def _attend_from_program(ctx):
    if len(ctx.RESIDENT_WIDTHS) == 0:
        for_owned_tile(_attend_from_tile, ctx)
    elif len(ctx.RESIDENT_WIDTHS) == 1 and ctx.RESIDENT_WIDTHS[0] <= ctx.BLOCK_M:
        _attend_from_small_head(ctx, ctx.RESIDENT_WIDTHS)
    elif not ctx.PACKED:
        _attend_from_large_head(ctx)
    elif ctx.program.num_tokens <= ctx.BLOCK_M:  # a small crop in a pack of large ones
        _attend_from_small_head(ctx, (ctx.BLOCK_M,))
    else:
        _attend_from_large_head(ctx)


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
    prefix_attention,  # [B, H, P, N] fp32 or None
    key_mask,  # [B, N] bool or None
    rope,  # cos and sin [B, M, D] or None
    cu_seqlens,  # [images + 1] int32 or None
    sizes,  # plan.Sizes
    num_tiles,  # an image
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr,
    PREFIX: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
    RESIDENT_WIDTHS: tl.constexpr,  # of the tiles that keep a head in shared memory; none where programs sweep
    SMALL_REMAINDER: tl.constexpr,  # whether tiles of BLOCK_M may leave 1 to 16 queries over
    PREFIX_TILES: tl.constexpr,  # 16-row tiles of the prefix, if prefix_attention is asked for
    NEGATIVE: tl.constexpr,  # whether scale is
):
    program = program_index(sizes, cu_seqlens)
    if max_logit is not None:
        max_logit += (program.image * sizes.num_heads + program.head) * num_tiles
    _attend_from_program(
        Forward(
            query=rows_of(query, program),
            key=rows_of(key, program),
            value=rows_of(value, program),
            output=rows_of(output, program),
            lse=None if lse is None else statistic_of(lse, program, sizes),
            normalizer=None if normalizer is None else statistic_of(normalizer, program, sizes),
            max_logit=max_logit,
            square_norm=None if square_norm is None else statistic_of(square_norm, program, sizes),
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
            RESIDENT_WIDTHS=RESIDENT_WIDTHS,
            SMALL_REMAINDER=SMALL_REMAINDER,
            PREFIX_TILES=PREFIX_TILES,
            NEGATIVE=NEGATIVE,
            PACKED=cu_seqlens is not None,
        )
    )


def forward_launch(inputs: AttentionInputs, buffers: ForwardBuffers, plan: LaunchPlan) -> Launch:
    """The forward as a launch, which writes every buffer but ``received_attention``.

    ``prefix_attention`` is left to ``statistics_launch`` where no program has all keys of a head.
    """
    prefix_attention = buffers.prefix_attention if plan.resident_widths else None
    return plan.launch(
        _attention_fwd_kernel,
        {
            "query": strided(inputs.query),
            "key": strided(inputs.key),
            "value": strided(inputs.value),
            "output": strided(buffers.output),
            "lse": buffers.lse,
            "normalizer": buffers.normalizer,
            "max_logit": buffers.max_logit,
            "square_norm": buffers.square_norm,
            "prefix_attention": prefix_attention,
            "num_tiles": plan.num_tiles,
        },
        {
            "RESIDENT_WIDTHS": plan.resident_widths,
            "SMALL_REMAINDER": leaves_small_remainder(inputs, plan),
            "PREFIX_TILES": 0 if prefix_attention is None else prefix_tiles(inputs),
            "NEGATIVE": inputs.scale < 0,
        },
    )
