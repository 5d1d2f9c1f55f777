"""A tile of whole tokens in a Triton kernel: where it lies in memory, how it is loaded and stored.

Shapes in comments: R tokens of one image, C channels, padded to BLOCK_C. Offsets are 64-bit, `image` is to begin with.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(tile, tiles_of_image, ROWS: tl.constexpr):
    """The image of a tile, and [R] its tokens, of which the last may lie beyond the image's end."""
    return (tile // tiles_of_image).to(tl.int64), tile % tiles_of_image * ROWS + tl.arange(0, ROWS)


@triton.jit
def inside(tokens, num_tokens, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[R, C] which elements of a tile exist."""
    return (tokens < num_tokens)[:, None] & (tl.arange(0, BLOCK_C) < C)[None, :]


@triton.jit
def load_tokens(x, image, tokens, exists):
    """[R, C] fp32 of [B, N, C] with channels side by side; zero where there is none."""
    rows = image * x.strides[0] + tokens.to(tl.int64) * x.strides[1]
    cells = rows[:, None] + tl.arange(0, exists.shape[1])[None, :]
    return tl.load(x.pointer + cells, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def store_tokens(pointer, tile, image, tokens, num_tokens, exists, C: tl.constexpr):
    """Store [R, C] to a contiguous [B, N, C] tensor."""
    rows = (image * num_tokens + tokens) * C
    cells = rows[:, None] + tl.arange(0, exists.shape[1])[None, :]
    tl.store(pointer + cells, tile.to(pointer.dtype.element_ty), mask=exists)


@triton.jit
def load_statistic(pointer, image, tokens, num_tokens):
    """[R, 1] of a contiguous [B, N] statistic; zero beyond the image."""
    return tl.load(pointer + image * num_tokens + tokens, mask=tokens < num_tokens, other=0.0)[:, None]


@triton.jit
def store_statistic(pointer, value, image, tokens, num_tokens):
    """Store [R] to a contiguous [B, N] statistic."""
    tl.store(pointer + image * num_tokens + tokens, value, mask=tokens < num_tokens)
