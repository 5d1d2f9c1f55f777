"""Backward: the gradients of one owned tile, of queries or of keys and values, and of all tiles of a head.

With S = scale Q K^T, P = exp(S - lse) and dP = dO V^T: dS = P * (dP - delta), delta = rowsum(dO * O), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO. A program that owns queries computes dQ, delta and the queries' *normalization*, and
stores the last two for the programs that own keys. Each gradient is summed by one program in a fixed order, so results
are the same from run to run.

The normalization is what makes the probabilities of a query sum to 1. For 16-bit inputs it is the lse in base 2.
Rounded to fp32, that changes a probability by 1e-4 of itself at logits of a thousand, less than rounding the
probability to 16 bits does; from logits of about 3 thousand on in fp16, and 30 thousand in bf16, it is more. For fp32
inputs this would be the largest error, so there it is the normalizer (see `primitives.probabilities`), a factor beside
the lse.

Source: Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 2, split in two so that nothing is added to global memory.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005  (traced, not annotated: shapes stand in comments; triton unpacks no tuples)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    ProgramIndex,
    RopeRows,
    Rows,
    base_2,
    for_owned_tile,
    for_swept_tiles,
    load_lse,
    load_rotated,
    load_tokens,
    probabilities,
    store_gradient,
    store_tokens,
    takes_part,
)


class Backward(NamedTuple):
    """What a program computes gradients with; None for tensors that only the other kernel reads or writes."""

    query: Rows
    key: Rows
    value: Rows
    output: Rows | None
    grad_output: Rows
    grad_query: Rows | None
    grad_key: Rows | None
    grad_value: Rows | None
    lse: Any
    delta: Any
    normalization: Any
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
    NEGATIVE: Any
    PACKED: Any


@triton.jit
def _load_keys(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    key = load_rotated(ctx.key, ctx, tokens, end, MASKED, ctx.key_mask)
    value = load_tokens(ctx.value, ctx, tokens, end, MASKED, ctx.key_mask)
    return key, value


@triton.jit
def _fold_keys(state, owned, ctx, swept, first, end, MASKED: tl.constexpr):
    grad_query, total = state
    query, grad_output, lse, delta = owned
    key, value = swept
    logits = tl.dot(query, tl.trans(key), input_precision=ctx.PRECISION)  # [M, W]
    p = probabilities(logits, lse[:, None], ctx.scale)
    if MASKED or ctx.key_mask is not None:
        valid = takes_part(ctx.key_mask, first + tl.arange(0, key.shape[0]), end)
        p = tl.where(valid[None, :], p, 0.0)
    grad_p = tl.dot(grad_output, tl.trans(value), input_precision=ctx.PRECISION)
    grad_logits = p * (grad_p - delta[:, None])
    grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision=ctx.PRECISION)
    if query.dtype == tl.float32:
        total += tl.sum(p, 1)
    return grad_query, total


@triton.jit
def _load_and_fold_keys(state, owned, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return _fold_keys(state, owned, ctx, _load_keys(ctx, first, end, WIDTH, MASKED), first, end, MASKED)


@triton.jit
def _grad_of_queries(ctx, first, end, WIDTH: tl.constexpr, resident=None):
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx, tokens, end, True)
    grad_output = load_tokens(ctx.grad_output, ctx, tokens, end, True)
    output = load_tokens(ctx.output, ctx, tokens, end, True)
    delta = tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(ctx.delta + tokens, delta, mask=tokens < end)
    lse = load_lse(ctx.lse, tokens, end)
    owned = (-query if ctx.NEGATIVE else query, grad_output, lse, delta)
    nothing = tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32), tl.zeros([WIDTH], tl.float32)
    if resident is None:
        grad_query, total = for_swept_tiles(_load_and_fold_keys, nothing, owned, ctx)
    else:
        grad_query, total = _fold_resident(_fold_keys, nothing, owned, ctx, resident)
    normalization = lse
    if query.dtype == tl.float32:
        normalization = 1.0 / tl.where(total > 0.0, total, 1.0)
        grad_query *= normalization[:, None]
    tl.store(ctx.normalization + tokens, normalization, mask=tokens < end)
    store_gradient(ctx.grad_query, ctx, grad_query * ctx.scale, tokens, end)


@triton.jit
def _load_queries(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx, tokens, end, MASKED)
    grad_output = load_tokens(ctx.grad_output, ctx, tokens, end, MASKED)
    return query, grad_output


@triton.jit
def _load_statistic(statistic, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr, BEYOND: tl.constexpr):
    # `first` is added to the pointer, not to the indices: then all addresses of a thread are one plus a constant.
    tokens = tl.arange(0, WIDTH)
    if MASKED:
        values = tl.load(statistic + first + tokens, mask=tokens < end - first, other=BEYOND)
    else:
        values = tl.load(statistic + first + tokens)
    return values


@triton.jit
def _load_lse(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """In base 2. By it, probabilities of queries beyond the end are 0."""
    if ctx.query.pointer.dtype.element_ty == tl.float32:
        lse = base_2(_load_statistic(ctx.lse, first, end, WIDTH, MASKED, float("inf")))
    else:
        lse = _load_statistic(ctx.normalization, first, end, WIDTH, MASKED, float("inf"))
    return lse


@triton.jit
def _fold_queries(state, owned, ctx, swept, first, end, MASKED: tl.constexpr):
    grad_key, grad_value = state
    key, value = owned
    query, grad_output = swept
    lse = _load_lse(ctx, first, end, query.shape[0], MASKED)
    delta = _load_statistic(ctx.delta, first, end, query.shape[0], MASKED, 0.0)
    logits = tl.dot(key, tl.trans(query), input_precision=ctx.PRECISION)  # [M, W], keys by queries
    p = probabilities(logits, lse[None, :], ctx.scale)
    if query.dtype == tl.float32:
        p *= _load_statistic(ctx.normalization, first, end, query.shape[0], MASKED, 0.0)[None, :]
    grad_value = tl.dot(p.to(grad_output.dtype), grad_output, grad_value, input_precision=ctx.PRECISION)
    grad_p = tl.dot(value, tl.trans(grad_output), input_precision=ctx.PRECISION)
    grad_logits = p * (grad_p - delta[None, :])
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=ctx.PRECISION)
    return grad_key, grad_value


@triton.jit
def _load_and_fold_queries(state, owned, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return _fold_queries(state, owned, ctx, _load_queries(ctx, first, end, WIDTH, MASKED), first, end, MASKED)


@triton.jit
def _grad_of_keys_and_values(ctx, first, end, WIDTH: tl.constexpr, resident=None):
    tokens = first + tl.arange(0, WIDTH)
    key = load_rotated(ctx.key, ctx, tokens, end, True)
    value = load_tokens(ctx.value, ctx, tokens, end, True)
    nothing = tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32), tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32)
    owned = (-key if ctx.NEGATIVE else key, value)
    if resident is None:
        grad_key, grad_value = for_swept_tiles(_load_and_fold_queries, nothing, owned, ctx)
    else:
        grad_key, grad_value = _fold_resident(_fold_queries, nothing, owned, ctx, resident)
    grad_key *= ctx.scale
    if ctx.key_mask is not None:
        # The products above did not mask keys: a masked key has a gradient of its own, which is dropped here.
        valid = takes_part(ctx.key_mask, tokens, end)[:, None]
        grad_key = tl.where(valid, grad_key, 0.0)
        grad_value = tl.where(valid, grad_value, 0.0)
    store_gradient(ctx.grad_key, ctx, grad_key, tokens, end)
    store_tokens(ctx.grad_value, ctx, grad_value, tokens, end)


@triton.jit
def _keep_in_smem(load: tl.constexpr, ctx, WIDTHS: tl.constexpr):
    """All tokens of the swept axis, in tiles. Products alone use them, so triton keeps them in shared memory."""
    resident = ()
    first = 0
    end = ctx.program.num_tokens
    for i in tl.static_range(len(WIDTHS)):
        # Only the last tile can reach beyond the end, except that packed images are shorter than the longest.
        resident = resident + (load(ctx, first, end, WIDTHS[i], ctx.PACKED or i == len(WIDTHS) - 1),)
        first += WIDTHS[i]
    return resident


@triton.jit
def _fold_some(fold: tl.constexpr, state, owned, ctx, resident, FROM: tl.constexpr, TO: tl.constexpr):
    first = FROM * ctx.BLOCK_N
    end = ctx.program.num_tokens
    for i in tl.static_range(FROM, TO):
        state = fold(state, owned, ctx, resident[i], first, end, ctx.PACKED or i == len(resident) - 1)
        first += resident[i][0].shape[0]
    return state


@triton.jit
def _fold_resident(fold: tl.constexpr, state, owned, ctx, resident):
    """What `for_swept_tiles` does, over resident tiles and without loading them."""
    if ctx.PACKED and len(resident) > 1:
        state = _fold_some(fold, state, owned, ctx, resident, 0, 1)
        # Small crops among large ones end here. With such a condition before every tile, triton would convert the
        # layout of the state at each of them.
        if ctx.program.num_tokens > ctx.BLOCK_N:
            state = _fold_some(fold, state, owned, ctx, resident, 1, len(resident))
    else:
        state = _fold_some(fold, state, owned, ctx, resident, 0, len(resident))
    return state


@triton.jit
def _for_owned_tiles_of_head(body: tl.constexpr, load: tl.constexpr, ctx):
    resident = _keep_in_smem(load, ctx, ctx.RESIDENT_WIDTHS)
    # Without loop-invariant code motion: kept across tiles, addresses above all take 60 registers, and spill.
    for first in tl.range(0, ctx.program.num_tokens, ctx.BLOCK_M, disable_licm=True):
        body(ctx, first, ctx.program.num_tokens, ctx.BLOCK_M, resident)


@triton.jit
def grad_of_query_tile(ctx):
    """The gradient of one tile of queries; stores delta and the normalization for the kernel that owns keys."""
    for_owned_tile(_grad_of_queries, ctx)


@triton.jit
def grad_of_key_value_tile(ctx):
    """The gradients of one tile of keys and values."""
    for_owned_tile(_grad_of_keys_and_values, ctx)


@triton.jit
def grad_of_head(ctx):
    """All gradients of a head: first its keys and values are resident in shared memory, then its queries."""
    _for_owned_tiles_of_head(_grad_of_queries, _load_keys, ctx)
    tl.debug_barrier()  # what follows reads the delta and the normalization that other threads wrote
    _for_owned_tiles_of_head(_grad_of_keys_and_values, _load_queries, ctx)
