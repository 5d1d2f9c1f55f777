"""The sequence in one launch: a program reads a tile of tokens where they lie and writes it where it belongs.

A tile is a few tokens of one image, all of the prefix or all patches, by a block of channels. The compiler reads its
patches along whichever stride is 1: the channels' of contiguous memory, or the patches' of a convolution's result. It
turns the tile of the latter in shared memory before it is written. Tiles are counted from the first patch, not from the
first token, so that reads along the patches are aligned. Nothing here was measured.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....._triton.launch import Launch, strided
from ...types import AssembleInputs, num_prefix, sizes_of

# 64 bytes of a 16-bit patch's row of channels-outer memory, by as many channels as divide a ViT's without a rest.
_ROWS, _BLOCK_C = 32, 128


@triton.jit
def _assemble_fwd_kernel(
    patches,  # [B, M, C]
    cls_token,  # [K, C] or None
    register_tokens,  # [R, C] or None
    pos_embed,  # [rows, C] or None
    tokens,  # [B, N, C]
    num_cls_tokens,
    num_registers,
    num_patches,
    prefix_rows,  # the first so many tokens of the prefix have a row of pos_embed
    prefix_tiles,
    tiles_of_image,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_of_tile = tl.cdiv(C, BLOCK_C)
    channels = program % blocks_of_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    tile = program // blocks_of_tile
    image = (tile // tiles_of_image).to(tl.int64)
    tile = tile % tiles_of_image
    num_prefix = num_cls_tokens + num_registers
    tokens += image * (num_prefix + num_patches) * C
    if tile < prefix_tiles:
        token = tile * ROWS + tl.arange(0, ROWS)
        value = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if cls_token is not None:
            value += _rows(cls_token, token, token < num_cls_tokens, channels, C)
        if register_tokens is not None:
            register = token - num_cls_tokens
            value += _rows(register_tokens, register, (register >= 0) & (register < num_registers), channels, C)
        if pos_embed is not None:
            value += _rows(pos_embed, token, token < prefix_rows, channels, C)
        _store(tokens, value, token, token < num_prefix, channels, C)
    else:
        patch = (tile - prefix_tiles) * ROWS + tl.arange(0, ROWS)
        exists = patch < num_patches
        along_patches = (patches.pointer + image * patches.strides[0]) + patch.to(tl.int64) * patches.strides[1]
        along_channels = channels.to(tl.int64) * patches.strides[2]
        value = tl.load(
            along_patches[:, None] + along_channels[None, :], mask=exists[:, None] & (channels < C)[None, :], other=0.0
        ).to(tl.float32)
        if pos_embed is not None:
            value += _rows(pos_embed, prefix_rows + patch, exists, channels, C)
        _store(tokens, value, num_prefix + patch, exists, channels, C)


@triton.jit
def _rows(pointer, rows, exists, channels, C: tl.constexpr):
    """[ROWS, BLOCK_C] fp32 of a contiguous [rows, C] tensor; zero where there is none."""
    cells = rows.to(tl.int64)[:, None] * C + channels[None, :]
    return tl.load(pointer + cells, mask=exists[:, None] & (channels < C)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _store(pointer, value, rows, exists, channels, C: tl.constexpr):
    """Store [ROWS, BLOCK_C] to a contiguous [rows, C] tensor: the one time that it is rounded."""
    cells = rows.to(tl.int64)[:, None] * C + channels[None, :]
    tl.store(pointer + cells, value.to(pointer.dtype.element_ty), mask=exists[:, None] & (channels < C)[None, :])


def forward_launch(inputs: AssembleInputs, tokens: Tensor) -> Launch:
    """The forward as a launch, which writes every element of the contiguous ``tokens``."""
    batch, _, channels = tokens.shape
    patches, cls_token, register_tokens, pos_embed, _ = inputs
    sizes = sizes_of(*inputs)
    prefix_tiles = triton.cdiv(num_prefix(sizes), _ROWS)
    tiles_of_image = prefix_tiles + triton.cdiv(sizes.patches, _ROWS)
    arguments = {
        "patches": strided(patches),
        "cls_token": None if cls_token is None else cls_token.contiguous(),
        "register_tokens": None if register_tokens is None else register_tokens.contiguous(),
        "pos_embed": None if pos_embed is None else pos_embed.contiguous(),
        "tokens": tokens,
        "num_cls_tokens": sizes.cls_tokens,
        "num_registers": sizes.registers,
        "num_patches": sizes.patches,
        "prefix_rows": sizes.prefix_rows,
        "prefix_tiles": prefix_tiles,
        "tiles_of_image": tiles_of_image,
    }
    constants = {"C": channels, "BLOCK_C": _BLOCK_C, "ROWS": _ROWS}
    grid = (batch * tiles_of_image * triton.cdiv(channels, _BLOCK_C),)
    return Launch(_assemble_fwd_kernel, grid, arguments, constants, 4, 1)
