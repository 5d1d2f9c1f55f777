"""Where a tile of tokens lies in memory: what the forward and the backward kernels share.

Shapes in comments: R tokens of one image, C channels, padded to BLOCK_C. Offsets are 64-bit, `image` is to begin with.
"""

# ruff: noqa: ANN001, ANN201  (what a kernel takes is traced, not annotated; shapes stand in comments)

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
def load_tokens(pointer, image, tokens, stride_b, stride_n, exists):
    """[R, C] fp32; zero where there is none."""
    rows = image * stride_b + tokens.to(tl.int64) * stride_n
    cells = rows[:, None] + tl.arange(0, exists.shape[1])[None, :]
    return tl.load(pointer + cells, mask=exists, other=0.0).to(tl.float32)


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


@triton.jit
def load_channels(pointer, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[1, C] fp32 of a parameter; zero in the padding."""
    channels = tl.arange(0, BLOCK_C)
    return tl.load(pointer + channels, mask=channels < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def load_factor(layer_scale, drop_path, image, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """[1, C] or a scalar: what the branch of an image is multiplied by."""
    factor = 1.0
    if layer_scale is not None:
        factor = load_channels(layer_scale, C, BLOCK_C)
    if drop_path is not None:
        factor = factor * tl.load(drop_path + image).to(tl.float32)
    return factor
