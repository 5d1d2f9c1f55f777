"""What every attention kernel here is built from: where a program works, how it loads tokens, how it walks an axis.

A program *owns* one tile of BLOCK_M tokens of one image and head and *sweeps* all tokens of that image on the other
axis in tiles of BLOCK_N. So a kernel states two things only: what happens to the owned tile before and after the
sweep, and one `step` that folds a swept tile into the state. Where all tokens of a head fit, a program may own all its
tiles in turn and keep the swept axis *resident* in shared memory instead. How the axes are cut is decided in `plan.py`.

Each kernel gathers what its functions need in one NamedTuple `ctx`. It has at least `program`, `rope`, D, BLOCK_D,
BLOCK_M, BLOCK_N, TAIL, PREFIX and INTERLEAVED. It is always handed on as an argument: triton turns the constants of a
tuple that is assigned to a name into run-time values. No function here returns None or a string within a tuple: triton
3.6 does not compile that.

Shapes in comments: M owned tokens, W swept tokens, BLOCK_D channels (D padded to a power of two).
"""

# ruff: noqa: ANN001, ANN201  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)

# A running maximum starts here and not at -inf, so that a difference of two maxima is never NaN. Far below any logit
# of finite half-precision inputs, and far enough from overflow to be multiplied by any sensible scale.
FLOOR = tl.constexpr(-1.0e30)


class ProgramIndex(NamedTuple):
    """The tile, image and head of a program. Packed images share batch row 0 and begin at token `start` of it."""

    tile: Any
    image: Any
    head: Any
    batch: Any
    start: Any
    num_tokens: Any
    num_prefix: Any


class Rows(NamedTuple):
    """Tokens of one image and head in memory: the address of token 0, channel 0, and both strides."""

    pointer: Any
    row_stride: Any
    channel_stride: Any


class RopeRows(NamedTuple):
    """Rotation of one image's patches: `cos` and `sin` point at its first patch's row."""

    cos: Any
    sin: Any
    row_stride: Any


@triton.jit
def program_index(sizes, cu_seqlens):
    """Where this program works. Programs of one head are neighbours, so that they meet its tokens in the L2."""
    pid = tl.program_id(0)
    tile = pid % sizes.num_programs
    head = (pid // sizes.num_programs % sizes.num_heads).to(tl.int64)
    image = (pid // sizes.num_programs // sizes.num_heads).to(tl.int64)
    if cu_seqlens is None:
        program = ProgramIndex(tile, image, head, image, image * 0, sizes.num_tokens, sizes.num_prefix)
    else:
        start = tl.load(cu_seqlens + image)
        length = tl.load(cu_seqlens + image + 1) - start
        program = ProgramIndex(tile, image, head, image * 0, start.to(tl.int64), length, sizes.num_prefix)
    return program


@triton.jit
def rows_of(x, program):
    """This program's image and head of a [B, H, N, D] tensor. `program` is 64-bit, hence so are the products."""
    offset = program.batch * x.strides[0] + program.head * x.strides[1] + program.start * x.strides[2]
    return Rows(x.pointer + offset, x.strides[2], x.strides[3])


@triton.jit
def statistic_of(pointer, program, sizes):
    """Address of token 0 of this program's image and head in a contiguous [B, H, N] statistic."""
    return pointer + (program.batch * sizes.num_heads + program.head) * sizes.num_tokens + program.start


@triton.jit
def prefix_attention_of(pointer, program, sizes):
    """This program's image and head of contiguous [B, H, P, N] probabilities, a row a prefix token."""
    head = program.batch * sizes.num_heads + program.head
    return Rows(pointer + head * sizes.num_prefix * sizes.num_tokens + program.start, sizes.num_tokens, 1)


@triton.jit
def mask_of(key_mask, program):
    """This program's image of a [B, N] mask, as rows of one byte."""
    offset = program.batch * key_mask.strides[0] + program.start * key_mask.strides[1]
    return Rows(key_mask.pointer + offset, key_mask.strides[1], 1)


@triton.jit
def rope_of(rope, program):
    """This program's image of tables [B, M, D], or [sum of M, D], where other images' prefixes are left out."""
    first_patch = tl.maximum(program.start - program.image * program.num_prefix, 0)
    offset = program.batch * rope.strides[0] + first_patch * rope.strides[1]
    return RopeRows(rope.cos + offset, rope.sin + offset, rope.strides[1])


@triton.jit
def for_owned_tile(body: tl.constexpr, ctx):
    """Run `body(ctx, first, end, WIDTH)` on the owned tile: tokens from first to end, in a tile of WIDTH."""
    tile = ctx.program.tile
    if ctx.PREFIX:
        if tile == 0:
            body(ctx, tile, ctx.program.num_prefix, ctx.PREFIX)
        else:
            body(ctx, ctx.program.num_prefix + (tile - 1) * ctx.BLOCK_M, ctx.program.num_tokens, ctx.BLOCK_M)
    elif tile * ctx.BLOCK_M < ctx.program.num_tokens:  # packed: the grid fits the longest image
        body(ctx, tile * ctx.BLOCK_M, ctx.program.num_tokens, ctx.BLOCK_M)


@triton.jit
def for_swept_tiles(step: tl.constexpr, state, owned, ctx):
    """Fold `state = step(state, owned, ctx, first, end, WIDTH, MASKED)` over all tokens of the image.

    The prefix comes first if it has a tile of its own, then what full tiles leave over, as the halves, quarters... of
    BLOCK_N that TAIL is made of, of which only the last can reach beyond its tokens, then full tiles.
    """
    first = 0
    end = ctx.program.num_tokens
    if ctx.PREFIX:
        state = step(state, owned, ctx, first, ctx.program.num_prefix, ctx.PREFIX, True)
        first = ctx.program.num_prefix
    if ctx.TAIL:
        # The tail goes before the full tiles: behind them, its addresses would be computed before their loop and held
        # in registers all through it.
        full = first + (end - first - 1) % ctx.BLOCK_N + 1
        for halving in tl.static_range(5):
            if ctx.TAIL & (ctx.BLOCK_N >> halving):
                width: tl.constexpr = ctx.BLOCK_N >> halving
                state = step(state, owned, ctx, first, full, width, ctx.TAIL % width == 0)
                first += width
        first = full
    for tile in range(first, end, ctx.BLOCK_N):
        state = step(state, owned, ctx, tile, end, ctx.BLOCK_N, False)
    return state


@triton.jit
def addresses(rows: Rows, tokens, channels):
    """[W, C] addresses, 64-bit in both axes because either can have the largest stride of a tensor."""
    row_offsets = tokens.to(tl.int64)[:, None] * rows.row_stride
    return rows.pointer + row_offsets + channels.to(tl.int64)[None, :] * rows.channel_stride


@triton.jit
def load_channels(rows, tokens, end, channels, LIMIT: tl.constexpr, MASKED: tl.constexpr, key_mask=None):
    """[W, C] tile of the given channels; zero for tokens beyond `end` and in the padding of the channels.

    With a `key_mask` it is zero for masked keys too, and a NaN in one meets no product: 0 * NaN would be NaN.
    """
    if MASKED or channels.shape[0] > LIMIT or key_mask is not None:
        inside = takes_part(key_mask, tokens, end)[:, None] & (tl.arange(0, channels.shape[0]) < LIMIT)[None, :]
        tile = tl.load(addresses(rows, tokens, channels), mask=inside, other=0.0)
    else:
        tile = tl.load(addresses(rows, tokens, channels))
    return tile


@triton.jit
def load_tokens(rows, ctx, tokens, end, MASKED: tl.constexpr, key_mask=None):
    """[W, BLOCK_D] tile, channels in memory order."""
    return load_channels(rows, tokens, end, tl.arange(0, ctx.BLOCK_D), ctx.D, MASKED, key_mask)


@triton.jit
def load_rotated(rows, ctx, tokens, end, MASKED: tl.constexpr, key_mask=None):
    """[W, BLOCK_D] tile of queries or keys, its patches rotated by fp32 arithmetic.

    A rotated tile has the first members of all pairs in its left half and the second ones in its right half. Logits do
    not care about the order of channels; `store_gradient` puts it back.
    """
    if ctx.rope is None:
        tile = load_tokens(rows, ctx, tokens, end, MASKED, key_mask)
    else:
        x1, x2 = load_pairs(rows, ctx, tokens, end, MASKED, key_mask)
        cos1, cos2, sin1, sin2 = load_rotation(ctx, tokens, end)
        y1 = x1.to(tl.float32) * cos1 - x2.to(tl.float32) * sin1
        y2 = x2.to(tl.float32) * cos2 + x1.to(tl.float32) * sin2
        pairs = tl.join(y1.to(x1.dtype), y2.to(x1.dtype))  # [W, BLOCK_D / 2, 2]
        tile = tl.reshape(tl.permute(pairs, (0, 2, 1)), (tokens.shape[0], ctx.BLOCK_D))
    return tile


@triton.jit
def load_pairs(rows, ctx, tokens, end, MASKED: tl.constexpr, key_mask=None):
    """First and second members of the channel pairs, each [W, BLOCK_D / 2], read in memory order."""
    if ctx.INTERLEAVED:
        tile = load_tokens(rows, ctx, tokens, end, MASKED, key_mask)
        x1, x2 = tl.split(tl.reshape(tile, (tokens.shape[0], ctx.BLOCK_D // 2, 2)))
    else:
        pair = tl.arange(0, ctx.BLOCK_D // 2)
        x1 = load_channels(rows, tokens, end, pair, ctx.D // 2, MASKED, key_mask)
        x2 = load_channels(rows, tokens, end, pair + ctx.D // 2, ctx.D // 2, MASKED, key_mask)
    return x1, x2


@triton.jit
def load_rotation(ctx, tokens, end):
    """cos and sin, in fp32, of the first and second members of the pairs; 1 and 0 for the prefix."""
    num_prefix = ctx.program.num_prefix
    patches = tl.maximum(tokens - num_prefix, 0)
    num_patches = end - num_prefix
    cos1, cos2 = load_pairs(Rows(ctx.rope.cos, ctx.rope.row_stride, 1), ctx, patches, num_patches, True)
    sin1, sin2 = load_pairs(Rows(ctx.rope.sin, ctx.rope.row_stride, 1), ctx, patches, num_patches, True)
    rotates = (tokens >= num_prefix)[:, None]
    return (
        tl.where(rotates, cos1.to(tl.float32), 1.0),
        tl.where(rotates, cos2.to(tl.float32), 1.0),
        tl.where(rotates, sin1.to(tl.float32), 0.0),
        tl.where(rotates, sin2.to(tl.float32), 0.0),
    )


@triton.jit
def store_channels(rows, tile, tokens, end, channels, LIMIT: tl.constexpr):
    """Store the first LIMIT columns of a [W, C] tile to the given channels, except tokens beyond `end`."""
    inside = (tokens < end)[:, None] & (tl.arange(0, channels.shape[0]) < LIMIT)[None, :]
    tl.store(addresses(rows, tokens, channels), tile.to(rows.pointer.dtype.element_ty), mask=inside)


@triton.jit
def store_tokens(rows, ctx, tile, tokens, end):
    """Store a [W, BLOCK_D] tile whose channels are in memory order."""
    store_channels(rows, tile, tokens, end, tl.arange(0, ctx.BLOCK_D), ctx.D)


@triton.jit
def store_gradient(rows, ctx, gradient, tokens, end):
    """Store the gradient of a tile that `load_rotated` gave: times the transposed rotation, channels put back."""
    if ctx.rope is None:
        store_tokens(rows, ctx, gradient, tokens, end)
    else:
        W: tl.constexpr = gradient.shape[0]
        dy1, dy2 = tl.split(tl.permute(tl.reshape(gradient, (W, 2, ctx.BLOCK_D // 2)), (0, 2, 1)))
        cos1, cos2, sin1, sin2 = load_rotation(ctx, tokens, end)
        dx1 = dy1 * cos1 + dy2 * sin2
        dx2 = dy2 * cos2 - dy1 * sin1
        if ctx.INTERLEAVED:
            store_tokens(rows, ctx, tl.reshape(tl.join(dx1, dx2), (W, ctx.BLOCK_D)), tokens, end)
        else:
            pair = tl.arange(0, ctx.BLOCK_D // 2)
            store_channels(rows, dx1, tokens, end, pair, ctx.D // 2)
            store_channels(rows, dx2, tokens, end, pair + ctx.D // 2, ctx.D // 2)


@triton.jit
def takes_part(key_mask, tokens, end):
    """[W] which keys exist and are not masked."""
    inside = tokens < end
    if key_mask is not None:
        inside = inside & tl.load(key_mask.pointer + tokens.to(tl.int64) * key_mask.row_stride, mask=inside, other=0)
    return inside


@triton.jit
def exponent_scale(scale):
    """Factor from raw logits to exponents of two, positive.

    Of a negative scale (NEGATIVE), queries or keys take the sign, which is exact. It is known when a kernel is
    compiled: a choice at run time would make every product fetch that operand from shared memory into registers. A zero
    scale becomes so small that no logit shows, because 0 * -inf would turn a masked logit into NaN.
    """
    return tl.maximum(tl.abs(scale) * LOG2E, 1e-30)


@triton.jit
def base_2(lse):
    """A log-sum-exp in base 2; +inf, which makes every probability 0, for queries that see no key."""
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
def load_lse(lse, tokens, end):
    """[W] log-sum-exp in base 2; +inf for queries that do not exist or see no key."""
    return base_2(tl.load(lse + tokens, mask=tokens < end, other=float("inf")))


@triton.jit
def probabilities(logits, lse, scale):
    """exp(|scale| * logits - lse), of logits that have the sign of the scale, and an lse in base 2.

    The product is not rounded by itself: at logits in the thousands that would be an error of 1e-4 in each probability.
    The rounding of the lse is as large, but one factor for all keys of a query; whoever needs better multiplies by the
    query's *normalizer*: 1 / the sum of these probabilities. It fits as far as every kernel sums a logit's products in
    the same order; a rounding of the logit itself is beyond it.
    """
    return tl.exp2(tl.fma(logits, exponent_scale(scale), -lse))
