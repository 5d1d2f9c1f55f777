"""Gradients of the parameters: each is the upstream gradient of its tokens, summed over the batch.

No atomics and no partial sums in memory: a program owns a token's block of channels, adds up all images in a fixed
order in fp32, and writes the sum wherever it belongs, so the same call gives the same bits. Such blocks are more than
enough to fill a GPU where the position embedding wants its gradient; where only the prefix does, there is little to
read. The gradient of the patches needs no kernel, see ``autograd.py``. Nothing here was measured.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....._triton.launch import Launch, strided
from ...types import AssembleGradients, Sizes, num_prefix

# The images read at a time, by a cache line of each: 16 elements a thread.
_IMAGES, _BLOCK_C = 32, 64


@triton.jit
def _assemble_bwd_kernel(
    grad_tokens,  # [B, N, C]
    grad_cls_token,  # [K, C] or None
    grad_register_tokens,  # [R, C] or None
    grad_pos_embed,  # [rows, C] or None
    batch,
    num_cls_tokens,
    num_prefix,
    prefix_rows,  # the first so many tokens of the prefix have a row of pos_embed
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    IMAGES: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_of_token = tl.cdiv(C, BLOCK_C)
    channels = program % blocks_of_token * BLOCK_C + tl.arange(0, BLOCK_C)
    token = (program // blocks_of_token).to(tl.int64)
    cells = token * grad_tokens.strides[1] + channels.to(tl.int64) * grad_tokens.strides[2]
    of_images = tl.zeros([IMAGES, BLOCK_C], tl.float32)
    for first in range(0, batch, IMAGES):
        images = first + tl.arange(0, IMAGES)
        of_images += tl.load(
            grad_tokens.pointer + (images.to(tl.int64) * grad_tokens.strides[0])[:, None] + cells[None, :],
            mask=(images < batch)[:, None] & (channels < C)[None, :],
            other=0.0,
        ).to(tl.float32)
    total = tl.sum(of_images, 0)
    if grad_cls_token is not None:
        _leave(grad_cls_token, total, token, token < num_cls_tokens, channels, C)
    if grad_register_tokens is not None:
        register = token - num_cls_tokens
        _leave(grad_register_tokens, total, register, (register >= 0) & (token < num_prefix), channels, C)
    if grad_pos_embed is not None:
        row = tl.where(token < num_prefix, token, token - num_prefix + prefix_rows)
        _leave(grad_pos_embed, total, row, (token < prefix_rows) | (token >= num_prefix), channels, C)


@triton.jit
def _leave(pointer, total, row, exists, channels, C: tl.constexpr):
    """Store [BLOCK_C] in a row of a contiguous [rows, C] tensor, if there is such a row."""
    tl.store(pointer + row * C + channels, total.to(pointer.dtype.element_ty), mask=exists & (channels < C))


def backward_launch(grad_tokens: Tensor, sizes: Sizes, gradients: AssembleGradients) -> Launch:
    """The backward as a launch, which writes every element of the gradients that are not ``None``."""
    batch, tokens, channels = grad_tokens.shape
    arguments = {
        "grad_tokens": strided(grad_tokens),
        **{f"grad_{name}": gradient for name, gradient in gradients._asdict().items()},
        "batch": batch,
        "num_cls_tokens": sizes.cls_tokens,
        "num_prefix": num_prefix(sizes),
        "prefix_rows": sizes.prefix_rows,
    }
    constants = {"C": channels, "BLOCK_C": _BLOCK_C, "IMAGES": _IMAGES}
    summed = num_prefix(sizes) if gradients.pos_embed is None else tokens
    grid = (summed * triton.cdiv(channels, _BLOCK_C),)
    return Launch(_assemble_bwd_kernel, grid, arguments, constants, 4, 1)
