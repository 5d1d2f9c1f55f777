"""The Triton kernels: a program holds a few whole tokens in registers, reads each number once and writes it once."""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitreg_kernels._triton.launch import Launch, strided
from vitreg_kernels.ops._shared.arguments import in_rows
from vitreg_kernels.ops._shared.row_tiles import row_tiles
from vitreg_kernels.ops._shared.triton_rows import inside, load_tokens, locate, store_tokens

from .reference import EPS


@triton.jit
def _unit_tokens_fwd_kernel(
    x,  # [B, N, C]
    unit,  # [B, N, C], contiguous
    tiles_of_image,
    num_tokens,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):
    image, tokens = locate(tl.program_id(0), tiles_of_image, ROWS)
    exists = inside(tokens, num_tokens, C, BLOCK_C)
    value = load_tokens(x, image, tokens, exists)  # [ROWS, BLOCK_C] fp32
    scale = tl.rsqrt(tl.sum(value * value, 1) + EPS)
    store_tokens(unit, value * scale[:, None], image, tokens, num_tokens, exists, C)


@triton.jit
def _unit_tokens_bwd_kernel(
    grad_unit,  # [B, N, C]
    x,  # [B, N, C]
    grad_x,  # [B, N, C], contiguous
    tiles_of_image,
    num_tokens,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    EPS: tl.constexpr,
):
    """dx = scale * (g - u (u . g)), with u = scale * x: what is along the token cannot change its length."""
    image, tokens = locate(tl.program_id(0), tiles_of_image, ROWS)
    exists = inside(tokens, num_tokens, C, BLOCK_C)
    value = load_tokens(x, image, tokens, exists)
    gradient = load_tokens(grad_unit, image, tokens, exists)
    scale = tl.rsqrt(tl.sum(value * value, 1) + EPS)[:, None]
    unit = value * scale
    along = tl.sum(unit * gradient, 1)[:, None]
    store_tokens(grad_x, scale * (gradient - unit * along), image, tokens, num_tokens, exists, C)


def forward_launch(x: Tensor, unit: Tensor) -> Launch:
    """The forward as a launch, which writes every element of ``unit``."""
    return _launch(_unit_tokens_fwd_kernel, x, {"x": strided(in_rows(x)), "unit": unit})


def backward_launch(grad_unit: Tensor, x: Tensor, grad_x: Tensor) -> Launch:
    """The backward as a launch, which writes every element of ``grad_x``."""
    arguments = {"grad_unit": strided(in_rows(grad_unit)), "x": strided(in_rows(x)), "grad_x": grad_x}
    return _launch(_unit_tokens_bwd_kernel, x, arguments)


def _launch(kernel: object, x: Tensor, arguments: dict) -> Launch:
    tiles = row_tiles(x)
    arguments = {**arguments, "tiles_of_image": tiles.an_image, "num_tokens": x.shape[1]}
    constants = {"C": x.shape[2], "BLOCK_C": tiles.block_c, "ROWS": tiles.rows, "EPS": EPS}
    return Launch(kernel, (tiles.total,), arguments, constants, tiles.num_warps, 1)
