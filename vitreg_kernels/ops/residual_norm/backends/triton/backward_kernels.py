"""Gradients of the tokens in one pass, with those of the parameters as partial sums, and a small kernel to add these.

With x_hat = (residual - mean) * rstd and g = weight * grad_normalized, a token's gradient through the norm is
``rstd * (g - mean(g) - x_hat * mean(g * x_hat))``; for RMSNorm there is no mean of g. (Ba et al., arXiv 1607.06450.)

No atomics: a program adds up its tiles in a fixed order and leaves one row, so the same call gives the same bits.
"""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....._triton.launch import Launch, Strided, strided
from ...._shared.arguments import in_rows
from ...._shared.triton_rows import inside, load_statistic, load_tokens, locate, store_tokens
from ...types import NormGradients, NormGradInputs
from . import plan
from .primitives import load_channels, load_factor

_REDUCED_AT_ONCE = 32  # partial sums, by as many channels


@triton.jit
def _residual_norm_bwd_kernel(
    grad_residual,  # [B, N, C] or None
    grad_normalized,  # [B, N, C] or None
    residual,  # [B, N, C]
    mean,  # [B, N] fp32; None for RMSNorm
    rstd,  # [B, N] fp32
    branch,  # [B, N, C]; None where layer_scale wants no gradient
    layer_scale,  # [C] or None
    drop_path,  # [B] or None
    weight,  # [C]
    grad_x,  # [B, N, C] or None
    grad_branch,  # [B, N, C] or None
    layer_scale_sums,  # [programs, C] fp32 or None
    weight_sums,  # [programs, C] fp32 or None
    bias_sums,  # [programs, C] fp32 or None
    tiles_of_image,
    num_tiles,
    num_tokens,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    program = tl.program_id(0)
    of_layer_scale = tl.zeros([ROWS, BLOCK_C], tl.float32)
    of_weight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    of_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for tile in range(program, num_tiles, tl.num_programs(0)):
        image, tokens = locate(tile, tiles_of_image, ROWS)
        exists = inside(tokens, num_tokens, C, BLOCK_C)
        gradient = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if grad_normalized is not None:
            upstream = load_tokens(grad_normalized, image, tokens, exists)
            x_hat = load_tokens(residual, image, tokens, exists)
            scale = load_statistic(rstd, image, tokens, num_tokens)
            if mean is not None:
                x_hat -= load_statistic(mean, image, tokens, num_tokens)
            x_hat *= scale
            if weight_sums is not None:
                of_weight += upstream * x_hat
            if bias_sums is not None:
                of_bias += upstream
            # Zero in the padding and beyond the image, where x_hat need not be.
            upstream *= load_channels(weight, C, BLOCK_C)
            along = tl.sum(upstream * x_hat, 1)[:, None] / C
            through = upstream - x_hat * along
            if mean is not None:
                through -= tl.sum(upstream, 1)[:, None] / C
            gradient += scale * through
        if grad_residual is not None:
            gradient += load_tokens(grad_residual, image, tokens, exists)
        if grad_x is not None:
            store_tokens(grad_x, gradient, image, tokens, num_tokens, exists, C)
        if grad_branch is not None:
            factor = load_factor(layer_scale, drop_path, image, C, BLOCK_C)
            store_tokens(grad_branch, gradient * factor, image, tokens, num_tokens, exists, C)
        if layer_scale_sums is not None:
            update = load_tokens(branch, image, tokens, exists)
            if drop_path is not None:
                update *= tl.load(drop_path + image).to(tl.float32)
            of_layer_scale += gradient * update
    if layer_scale_sums is not None:
        _leave(layer_scale_sums, of_layer_scale, program, C)
    if weight_sums is not None:
        _leave(weight_sums, of_weight, program, C)
    if bias_sums is not None:
        _leave(bias_sums, of_bias, program, C)


@triton.jit
def _leave(sums, of_rows, program, C: tl.constexpr):
    """Store the sum of [R, C] as this program's row of [programs, C]."""
    channels = tl.arange(0, of_rows.shape[1])
    tl.store(sums + program * C + channels, tl.sum(of_rows, 0), mask=channels < C)


@triton.jit
def _residual_norm_sum_kernel(
    layer_scale_sums,  # [programs, C] fp32 or None
    weight_sums,
    bias_sums,
    grad_layer_scale,  # [C] or None
    grad_weight,
    grad_bias,
    num_rows,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if grad_layer_scale is not None:
        _add_up(layer_scale_sums, grad_layer_scale, num_rows, C, BLOCK)
    if grad_weight is not None:
        _add_up(weight_sums, grad_weight, num_rows, C, BLOCK)
    if grad_bias is not None:
        _add_up(bias_sums, grad_bias, num_rows, C, BLOCK)


@triton.jit
def _add_up(sums, gradient, num_rows, C: tl.constexpr, BLOCK: tl.constexpr):
    """This program's channels of a [programs, C] tensor, summed over its rows."""
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        exists = (rows < num_rows)[:, None] & (channels < C)[None, :]
        total += tl.load(sums + rows[:, None] * C + channels[None, :], mask=exists, other=0.0)
    tl.store(gradient + channels, tl.sum(total, 0).to(gradient.dtype.element_ty), mask=channels < C)


def backward_launches(inputs: NormGradInputs, gradients: NormGradients, sums: plan.ParameterSums) -> list[Launch]:
    """The backward as launches, which write every element of ``sums`` and of the gradients that are not ``None``."""
    residual = in_rows(inputs.residual)
    _, tokens, channels = residual.shape
    tiles = plan.backward_tiles(residual)
    programs = plan.backward_programs(tiles, residual.device)

    partial = {f"{name}_sums": x for name, x in sums._asdict().items()}

    def rows(x: Tensor | None) -> Strided | None:
        return None if x is None else strided(in_rows(x))

    arguments = {
        "grad_residual": rows(inputs.grad_residual),
        "grad_normalized": rows(inputs.grad_normalized),
        "residual": strided(residual),
        "branch": None if gradients.layer_scale is None else rows(inputs.branch),
        "mean": inputs.mean,
        "rstd": inputs.rstd,
        "layer_scale": None if inputs.layer_scale is None else inputs.layer_scale.contiguous(),
        "drop_path": None if inputs.drop_path is None else inputs.drop_path.contiguous(),
        "weight": inputs.weight.contiguous(),
        "grad_x": gradients.x,
        "grad_branch": gradients.branch,
        **partial,
        "tiles_of_image": tiles.an_image,
        "num_tiles": tiles.total,
        "num_tokens": tokens,
    }
    constants = {"C": channels, "BLOCK_C": tiles.block_c, "ROWS": tiles.rows}
    found = [Launch(_residual_norm_bwd_kernel, (programs,), arguments, constants, tiles.num_warps, 1)]
    if any(x is not None for x in partial.values()):
        arguments = {
            **partial,
            "grad_layer_scale": gradients.layer_scale,
            "grad_weight": gradients.weight,
            "grad_bias": gradients.bias,
            "num_rows": programs,
        }
        constants = {"C": channels, "BLOCK": _REDUCED_AT_ONCE}
        grid = (-(-channels // _REDUCED_AT_ONCE),)
        found.append(Launch(_residual_norm_sum_kernel, grid, arguments, constants, 4, 1))
    return found
