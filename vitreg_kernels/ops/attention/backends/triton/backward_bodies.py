"""Backward: the gradients of one owned tile, of queries or of keys and values, and of all tiles of a head.

With S = scale Q K^T, P = exp(S - lse) and dP = dO V^T: dS = P * (dP - delta), delta = rowsum(dO * O), dQ = scale dS K,
dK = scale dS^T Q, dV = P^T dO. Who owns queries computes delta, dQ and the queries' normalizers (see
`primitives.probabilities`), and leaves delta and the normalizers in memory to who owns keys. Each gradient is summed by
one program in a fixed order, so results are the same from run to run.

Source: Dao, "FlashAttention-2" (arXiv 2307.08691), algorithm 2, split in two so that nothing is added to global memory.
"""

# ruff: noqa: ANN001, ANN201, ANN202, RUF005  (traced, not annotated: shapes stand in comments; triton unpacks no tuples)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .primitives import (
    Rope,
    Rows,
    base_2,
    load_lse,
    load_rotated,
    load_tokens,
    probabilities,
    store_gradient,
    store_tokens,
    sweep,
    takes_part,
)


class Backward(NamedTuple):
    """What a program computes gradients with; None for the gradients that are not its own."""

    query: Rows
    key: Rows
    value: Rows
    output: Any
    grad_output: Rows
    grad_query: Any
    grad_key: Any
    grad_value: Any
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
    PACKED: Any
    NEGATIVE: Any
    PRECISION: Any


@triton.jit
def _load_keys(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    key = load_rotated(ctx.key, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    value = load_tokens(ctx.value, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    return key, value


@triton.jit
def _fold_keys(state, owned, ctx, swept, first, end, MASKED: tl.constexpr):
    grad_query, total = state
    query, grad_output, lse, delta = owned
    key, value = swept
    logits = tl.dot(query, tl.trans(key), input_precision=ctx.PRECISION)  # [M, W]
    p = probabilities(logits, lse[:, None], ctx.scale)
    if MASKED or ctx.key_mask is not None:
        valid = takes_part(ctx.key_mask, ctx.mask_stride, first + tl.arange(0, key.shape[0]), end)
        p = tl.where(valid[None, :], p, 0.0)
    grad_p = tl.dot(grad_output, tl.trans(value), input_precision=ctx.PRECISION)
    grad_logits = p * (grad_p - delta[:, None])
    grad_query = tl.dot(grad_logits.to(key.dtype), key, grad_query, input_precision=ctx.PRECISION)
    return grad_query, total + tl.sum(p, 1)


@triton.jit
def _sweep_keys(state, owned, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return _fold_keys(state, owned, ctx, _load_keys(ctx, first, end, WIDTH, MASKED), first, end, MASKED)


@triton.jit
def grad_of_queries(ctx, first, end, WIDTH: tl.constexpr, held=None):
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, True)
    grad_output = load_tokens(ctx.grad_output, tokens, end, ctx.D, ctx.BLOCK_D, True)
    output = load_tokens(ctx.output, tokens, end, ctx.D, ctx.BLOCK_D, True)
    delta = tl.sum(grad_output.to(tl.float32) * output.to(tl.float32), 1)
    tl.store(ctx.delta + tokens, delta, mask=tokens < end)
    lse = load_lse(ctx.lse, tokens, end)
    owned = (-query if ctx.NEGATIVE else query, grad_output, lse, delta)
    nothing = tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32), tl.zeros([WIDTH], tl.float32)
    if held is None:
        grad_query, total = sweep(_sweep_keys, nothing, owned, ctx)
    else:
        grad_query, total = _fold_held(_fold_keys, nothing, owned, ctx, held)
    normalizer = 1.0 / tl.where(total > 0.0, total, 1.0)
    tl.store(ctx.normalizer + tokens, normalizer, mask=tokens < end)
    store_gradient(ctx.grad_query, ctx.rope, grad_query * (normalizer * ctx.scale)[:, None], tokens, end, ctx.D)


@triton.jit
def _load_queries(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    tokens = first + tl.arange(0, WIDTH)
    query = load_rotated(ctx.query, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    grad_output = load_tokens(ctx.grad_output, tokens, end, ctx.D, ctx.BLOCK_D, MASKED)
    return query, grad_output


@triton.jit
def _load_statistic(statistic, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr, BEYOND: tl.constexpr):
    # `first` moves the pointer and not the 32-bit indices, so that all addresses of a thread are one and a constant.
    tokens = tl.arange(0, WIDTH)
    if MASKED:
        values = tl.load(statistic + first + tokens, mask=tokens < end - first, other=BEYOND)
    else:
        values = tl.load(statistic + first + tokens)
    return values


@triton.jit
def _load_statistics(ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """lse in base 2, delta and normalizer. By their lse, probabilities of queries beyond the end are 0."""
    lse = base_2(_load_statistic(ctx.lse, first, end, WIDTH, MASKED, float("inf")))
    delta = _load_statistic(ctx.delta, first, end, WIDTH, MASKED, 0.0)
    normalizer = _load_statistic(ctx.normalizer, first, end, WIDTH, MASKED, 0.0)
    return lse, delta, normalizer


@triton.jit
def _fold_queries(state, owned, ctx, swept, first, end, MASKED: tl.constexpr):
    grad_key, grad_value = state
    key, value = owned
    query, grad_output = swept
    lse, delta, normalizer = _load_statistics(ctx, first, end, query.shape[0], MASKED)
    logits = tl.dot(key, tl.trans(query), input_precision=ctx.PRECISION)  # [M, W], keys by queries
    p = probabilities(logits, lse[None, :], ctx.scale) * normalizer[None, :]
    grad_value = tl.dot(p.to(grad_output.dtype), grad_output, grad_value, input_precision=ctx.PRECISION)
    grad_p = tl.dot(value, tl.trans(grad_output), input_precision=ctx.PRECISION)
    grad_logits = p * (grad_p - delta[None, :])
    grad_key = tl.dot(grad_logits.to(query.dtype), query, grad_key, input_precision=ctx.PRECISION)
    return grad_key, grad_value


@triton.jit
def _sweep_queries(state, owned, ctx, first, end, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    return _fold_queries(state, owned, ctx, _load_queries(ctx, first, end, WIDTH, MASKED), first, end, MASKED)


@triton.jit
def grad_of_keys_and_values(ctx, first, end, WIDTH: tl.constexpr, held=None):
    tokens = first + tl.arange(0, WIDTH)
    key = load_rotated(ctx.key, ctx.rope, tokens, end, ctx.D, ctx.BLOCK_D, True)
    value = load_tokens(ctx.value, tokens, end, ctx.D, ctx.BLOCK_D, True)
    nothing = tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32), tl.zeros([WIDTH, ctx.BLOCK_D], tl.float32)
    owned = (-key if ctx.NEGATIVE else key, value)
    if held is None:
        grad_key, grad_value = sweep(_sweep_queries, nothing, owned, ctx)
    else:
        grad_key, grad_value = _fold_held(_fold_queries, nothing, owned, ctx, held)
    grad_key *= ctx.scale
    if ctx.key_mask is not None:
        # A masked key's row of the products above means nothing, but it is its own: it reaches no other key.
        valid = takes_part(ctx.key_mask, ctx.mask_stride, tokens, end)[:, None]
        grad_key = tl.where(valid, grad_key, 0.0)
        grad_value = tl.where(valid, grad_value, 0.0)
    store_gradient(ctx.grad_key, ctx.rope, grad_key, tokens, end, ctx.D)
    store_tokens(ctx.grad_value, grad_value, tokens, end, ctx.D)


@triton.jit
def _hold(load: tl.constexpr, ctx, WIDTHS: tl.constexpr):
    """All tokens of the swept axis, in tiles. Products alone use them, so triton keeps them in shared memory."""
    held = ()
    first = 0
    for i in tl.static_range(len(WIDTHS)):
        # Only the last tile can reach beyond the end, except that packed images are shorter than the longest.
        held = held + (load(ctx, first, ctx.place.num_tokens, WIDTHS[i], ctx.PACKED or i == len(WIDTHS) - 1),)
        first += WIDTHS[i]
    return held


@triton.jit
def _fold_some(fold: tl.constexpr, state, owned, ctx, held, FROM: tl.constexpr, TO: tl.constexpr):
    first = FROM * ctx.BLOCK_N
    for i in tl.static_range(FROM, TO):
        state = fold(state, owned, ctx, held[i], first, ctx.place.num_tokens, ctx.PACKED or i == len(held) - 1)
        first += held[i][0].shape[0]
    return state


@triton.jit
def _fold_held(fold: tl.constexpr, state, owned, ctx, held):
    """What `sweep` does, over held tiles and without loading them."""
    if ctx.PACKED and len(held) > 1:
        state = _fold_some(fold, state, owned, ctx, held, 0, 1)
        # Small crops among large ones end here. Asked tile by tile, the state would change its layout at each question.
        if ctx.place.num_tokens > ctx.BLOCK_N:
            state = _fold_some(fold, state, owned, ctx, held, 1, len(held))
    else:
        state = _fold_some(fold, state, owned, ctx, held, 0, len(held))
    return state


@triton.jit
def _own_head(body: tl.constexpr, load: tl.constexpr, ctx, WIDTHS: tl.constexpr):
    held = _hold(load, ctx, WIDTHS)
    # What does not change from tile to tile, addresses above all, takes 60 registers if it is kept, and spills.
    for first in tl.range(0, ctx.place.num_tokens, ctx.BLOCK_M, disable_licm=True):
        body(ctx, first, ctx.place.num_tokens, ctx.BLOCK_M, held)


@triton.jit
def grad_of_head(ctx, WIDTHS: tl.constexpr):
    """All gradients of a head, of which tiles of these widths hold all tokens."""
    _own_head(grad_of_queries, _load_keys, ctx, WIDTHS)
    tl.debug_barrier()  # who owns keys reads the delta and the normalizers that other threads wrote
    _own_head(grad_of_keys_and_values, _load_queries, ctx, WIDTHS)
