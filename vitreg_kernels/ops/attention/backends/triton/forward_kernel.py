"""Forward: softmax(scale * Q K^T) V by an online softmax in base 2, fp32 statistics and accumulation.

At the lengths of most ViTs one program takes a whole head: it *holds* all keys and values in shared memory and passes
the queries by them tile by tile, so that each is read once. At longer ones, and where held tiles spill, a program owns
one tile of queries and sweeps the keys and values.

Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (arXiv 1805.02867); tiling as in Dao,
"FlashAttention-2" (arXiv 2307.08691), algorithm 1.
"""

# ruff: noqa: ANN001, ANN202, RUF005  (what a kernel takes is traced, not annotated, shapes stand in comments; triton
# unpacks no tuples)

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
    rope_offset,
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
    PACKED: Any
    NEGATIVE: Any
    PRECISION: Any


@triton.jit
def _load_queries(ctx, first, end, WIDTH: tl.constexpr):
    return load_rotated(ctx.query, ctx.rope, first + tl.arange(0, WIDTH), end, ctx.D, ctx.BLOCK_D, True)


@triton.jit
def _load_keys(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return load_rotated(ctx.key, ctx.rope, first + tl.arange(0, WIDTH), end, ctx.D, ctx.BLOCK_D, MASKED)


@triton.jit
def _load_values(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return load_tokens(ctx.value, first + tl.arange(0, WIDTH), end, ctx.D, ctx.BLOCK_D, MASKED)


@triton.jit
def _attend(state, query, ctx, key, value, first, end, MASKED: tl.constexpr):
    """One step of the online softmax."""
    acc, total, peak = state  # [M, BLOCK_D], [M], [M]; peak is in units of raw logits
    scale = exponent_scale(ctx.scale)
    logits = tl.dot(query, tl.trans(key), input_precision=ctx.PRECISION)  # [M, W]
    if MASKED or ctx.key_mask is not None:
        valid = takes_part(ctx.key_mask, ctx.mask_stride, first + tl.arange(0, key.shape[0]), end)
        logits = tl.where(valid[None, :], logits, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(logits, 1))
    p = tl.exp2(tl.fma(logits, scale, -(new_peak * scale)[:, None]))
    decay = tl.exp2((peak - new_peak) * scale)
    total = total * decay + tl.sum(p, 1)
    acc = tl.dot(p.to(value.dtype), value, acc * decay[:, None], input_precision=ctx.PRECISION)
    return acc, total, new_peak


@triton.jit
def _nothing(ctx, WIDTH: tl.constexpr):
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
    sees_a_key = total != 0.0  # NaN does see keys, and shows
    acc = acc * (1.0 / tl.where(sees_a_key, total, 1.0))[:, None]
    store_tokens(ctx.output, acc, tokens, end, ctx.D)
    if ctx.lse is not None:
        lse = tl.where(sees_a_key, peak * tl.abs(ctx.scale) + tl.log(total), float("-inf"))
        tl.store(ctx.lse + tokens, lse, mask=inside)
        if ctx.normalizer is not None:
            # Of the probabilities that the stored, rounded lse will give: of exp2(logits - lse), not of p.
            normalizer = tl.exp2(base_2(lse) - peak * exponent_scale(ctx.scale)) / total
            tl.store(ctx.normalizer + tokens, tl.where(sees_a_key, normalizer, 1.0), mask=inside)
    if ctx.square_norm is not None:
        tl.store(ctx.square_norm + tokens, tl.sum(acc * acc, 1), mask=inside)
    if ctx.max_logit is not None:
        logit = tl.where(inside & sees_a_key, peak * tl.abs(ctx.scale), float("-inf"))
        # As rows of a matrix: triton 3.7 does not compile the reduction of a vector to a scalar here for sm_100. Plus
        # 0, or NaN if a query's softmax is, which a maximum by itself passes over.
        largest = tl.max(tl.reshape(logit, (1, WIDTH)), 1)
        nothing_or_nan = 0.0 * tl.sum(tl.reshape(tl.where(inside, total, 0.0), (1, WIDTH)), 1)
        tile = tl.cdiv(first, ctx.BLOCK_M)  # where one tile is shorter than the others, it is the first
        tl.store(ctx.max_logit + tile + tl.arange(0, 1), largest + nothing_or_nan)


@triton.jit
def _sweep_and_attend(state, query, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    key = _load_keys(ctx, first, end, WIDTH, MASKED)
    value = _load_values(ctx, first, end, WIDTH, MASKED)
    return _attend(state, query, ctx, key, value, first, end, MASKED)


@triton.jit
def _attend_from_tile(ctx, first, end, WIDTH: tl.constexpr):
    """The owned tile of queries, by a sweep of the keys."""
    query = signed(_load_queries(ctx, first, end, WIDTH), ctx.scale)
    _store(sweep(_sweep_and_attend, _nothing(ctx, WIDTH), query, ctx), ctx, first, end)


@triton.jit
def _hold(ctx, WIDTHS: tl.constexpr):
    """Tiles of all (signed) keys and values. Products alone use them, so triton keeps them in shared memory."""
    held = ()
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        key = _load_keys(ctx, first, ctx.place.num_tokens, WIDTHS[i], ctx.PACKED or i == len(WIDTHS) - 1)
        value = _load_values(ctx, first, ctx.place.num_tokens, WIDTHS[i], ctx.PACKED or i == len(WIDTHS) - 1)
        # Not `signed`, whose choice at run time would make every product fetch the keys back into registers.
        held = held + ((-key if ctx.NEGATIVE else key, value),)
        first += WIDTHS[i]
    return held


@triton.jit
def _attend_to_held(query, ctx, held):
    state = _nothing(ctx, query.shape[0])
    first = 0
    for i in tl.static_range(len(held)):
        key, value = held[i]
        if not ctx.PACKED:
            state = _attend(state, query, ctx, key, value, first, ctx.place.num_tokens, i == len(held) - 1)
        elif first + key.shape[0] <= ctx.place.num_tokens:
            state = _attend(state, query, ctx, key, value, first, ctx.place.num_tokens, False)
        elif first < ctx.place.num_tokens:
            state = _attend(state, query, ctx, key, value, first, ctx.place.num_tokens, True)
        first += key.shape[0]
    return state


@triton.jit
def _attend_from_few(ctx, held, first, few):
    """16 queries from `first` on: writes what the prefix among them attends to, and all of those before `few`.

    Transposed, keys by queries: tensor cores want 64 rows or more, and of few queries that would be mostly padding.
    """
    end = ctx.place.num_tokens
    scale = exponent_scale(ctx.scale)
    query = _load_queries(ctx, first, end, 16)
    logits = ()  # of all keys, so this softmax needs no decay
    peak = tl.full([16], FLOOR, tl.float32)
    start = 0
    for i in tl.static_range(len(held)):
        key = held[i][0]
        products = tl.dot(key, tl.trans(query), input_precision=ctx.PRECISION)  # [W, 16]
        if ctx.PACKED or ctx.key_mask is not None or i == len(held) - 1:
            valid = takes_part(ctx.key_mask, ctx.mask_stride, start + tl.arange(0, key.shape[0]), end)
            products = tl.where(valid[:, None], products, float("-inf"))
        peak = tl.maximum(peak, tl.max(products, 0))
        logits = logits + (products,)
        start += key.shape[0]
    total = tl.zeros([16], tl.float32)
    acc = tl.zeros([ctx.BLOCK_D, 16], tl.float32)
    for i in tl.static_range(len(held)):
        value = held[i][1]
        p = tl.exp2(tl.fma(logits[i], scale, -(peak * scale)[None, :]))
        total += tl.sum(p, 0)
        acc = tl.dot(tl.trans(value), p.to(value.dtype), acc, input_precision=ctx.PRECISION)
    if ctx.prefix_attention is not None:
        normalizer = 1.0 / tl.where(total != 0.0, total, 1.0)
        start = 0
        for i in tl.static_range(len(held)):
            tokens = first + tl.arange(0, 16)
            keys = start + tl.arange(0, held[i][0].shape[0])
            p = tl.exp2(tl.fma(logits[i], scale, -(peak * scale)[None, :])) * normalizer[None, :]
            cells = tokens.to(tl.int64)[None, :] * ctx.prefix_stride + keys[:, None]
            exists = (tokens < ctx.place.num_prefix)[None, :] & (keys < end)[:, None]
            tl.store(ctx.prefix_attention + cells, p, mask=exists)
            start += held[i][0].shape[0]
    if first < few:
        _store((tl.trans(acc), total, peak), ctx, first, few)


@triton.jit
def _attend_from_small_head(ctx, WIDTHS: tl.constexpr, PREFIX_TILES: tl.constexpr):
    """All queries of a head that fits one tile."""
    first = 0
    end = ctx.place.num_tokens
    query = _load_queries(ctx, first, end, ctx.BLOCK_M)
    held = _hold(ctx, WIDTHS)
    for i in tl.static_range(PREFIX_TILES):
        _attend_from_few(ctx, held, 16 * i, first)
    _store(_attend_to_held(query, ctx, held), ctx, first, end)


@triton.jit
def _attend_from_head(ctx, WIDTHS: tl.constexpr, FEW: tl.constexpr, PREFIX_TILES: tl.constexpr):
    """All queries of a head: first those that full tiles would leave over, if they are few, then full tiles."""
    end = ctx.place.num_tokens
    few = end % ctx.BLOCK_M
    if ctx.PACKED:
        few = tl.where(few <= 16, few, 0)
    elif not FEW:
        few = 0
    query = _load_queries(ctx, few, end, ctx.BLOCK_M)
    held = _hold(ctx, WIDTHS)
    for i in tl.static_range(PREFIX_TILES):
        _attend_from_few(ctx, held, 16 * i, few)
    if FEW and PREFIX_TILES == 0:
        _attend_from_few(ctx, held, 0, few)
    for start in range(few, end, ctx.BLOCK_M):
        if ctx.rope.cos is None:
            # The next queries travel while these are at work. (With num_stages they would take shared memory twice
            # over, and with it the place of a third program on the multiprocessor.)
            next_query = _load_queries(ctx, start + ctx.BLOCK_M, end, ctx.BLOCK_M)
            _store(_attend_to_held(query, ctx, held), ctx, start, end)
            query = next_query
        else:  # to rotate them needs them at once, and registers
            _store(_attend_to_held(_load_queries(ctx, start, end, ctx.BLOCK_M), ctx, held), ctx, start, end)


@triton.jit
def _attend_from_program(ctx, tile, HELD: tl.constexpr, FEW: tl.constexpr, PREFIX_TILES: tl.constexpr):
    if len(HELD) == 0:
        own(_attend_from_tile, ctx, tile)
    elif len(HELD) == 1 and HELD[0] <= ctx.BLOCK_M:
        _attend_from_small_head(ctx, HELD, PREFIX_TILES)
    elif not ctx.PACKED:
        _attend_from_head(ctx, HELD, FEW, PREFIX_TILES)
    elif ctx.place.num_tokens <= ctx.BLOCK_M:  # a small crop in a pack of large ones
        _attend_from_small_head(ctx, (ctx.BLOCK_M,), PREFIX_TILES)
    else:
        _attend_from_head(ctx, HELD, FEW, PREFIX_TILES)


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
    max_logit_stride,
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
    HELD: tl.constexpr,  # widths of the tiles of a held head
    FEW: tl.constexpr,  # whether tiles of BLOCK_M may leave 1 to 16 queries over
    PREFIX_TILES: tl.constexpr,  # 16-row tiles of the prefix, if that is asked for
    NEGATIVE: tl.constexpr,  # scale
    INTERLEAVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    tile, place = locate(num_programs, num_heads, num_tokens, num_prefix, cu_seqlens)
    if cos is not None:
        offset = rope_offset(place, rope_stride_b, rope_stride_m)
        cos += offset
        sin += offset
    if lse is not None:
        lse = statistic_of(lse, place, num_heads, num_tokens)
    if normalizer is not None:
        normalizer = statistic_of(normalizer, place, num_heads, num_tokens)
    if square_norm is not None:
        square_norm = statistic_of(square_norm, place, num_heads, num_tokens)
    if max_logit is not None:
        max_logit += (place.image * num_heads + place.head) * max_logit_stride
    if prefix_attention is not None:
        prefix_attention += (place.batch * num_heads + place.head) * num_prefix * num_tokens + place.start
    if key_mask is not None:
        key_mask += place.batch * mask_stride_b + place.start * mask_stride_n
    _attend_from_program(
        Forward(
            rows_of(query, place, query_stride_b, query_stride_h, query_stride_n, query_stride_d),
            rows_of(key, place, key_stride_b, key_stride_h, key_stride_n, key_stride_d),
            rows_of(value, place, value_stride_b, value_stride_h, value_stride_n, value_stride_d),
            rows_of(output, place, output_stride_b, output_stride_h, output_stride_n, output_stride_d),
            Rope(cos, sin, rope_stride_m, num_prefix, INTERLEAVED),
            key_mask,
            mask_stride_n,
            lse,
            normalizer,
            max_logit,
            square_norm,
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
            cu_seqlens is not None,
            NEGATIVE,
            PRECISION,
        ),
        tile,
        HELD,
        FEW,
        PREFIX_TILES,
    )


def forward_launches(
    inputs: AttentionInputs,
    output: Tensor,
    lse: Tensor | None,
    normalizer: Tensor | None,
    max_logit: Tensor | None,
    square_norm: Tensor | None,
    prefix_attention: Tensor | None,
    arch: int,
) -> list[Launch]:
    """The forward as launches.

    Args:
        inputs: the call.
        output: ``[B, H, N, D]``, any strides.
        lse: ``[B, H, N]`` fp32, contiguous, or ``None``.
        normalizer: ``[B, H, N]`` fp32, contiguous, or ``None``; what ``statistics_launches`` needs beside the lse.
        max_logit: ``[images, H, tiles]`` fp32, where ``tiles`` is ``plan.of(inputs, "forward", arch).num_tiles``; the
            largest logit of each tile of queries. Tiles without queries, such as packing has, are left as they are.
        square_norm: ``[B, H, N]`` fp32: sum of squares of each head of each output token, or ``None``.
        prefix_attention: ``[B, H, P, N]`` fp32, contiguous, or ``None``; only of heads that are held.
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
            "prefix_attention": prefix_attention,
            "max_logit_stride": work.num_tiles,
            **plan.strides(query=inputs.query, key=inputs.key, value=inputs.value, output=output),
            **work.arguments,
        },
        constants={
            **work.constants,
            "HELD": work.held,
            "FEW": plan.leaves_few(inputs, work),
            "PREFIX_TILES": 0 if prefix_attention is None else plan.prefix_tiles(inputs),
            "NEGATIVE": inputs.scale < 0,
        },
        num_warps=work.num_warps,
        num_stages=work.num_stages,
    )
    return [launch]
