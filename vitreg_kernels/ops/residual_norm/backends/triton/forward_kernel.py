"""The residual, its norm and its statistics in one pass: a program holds its tokens in registers from load to store."""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl

from ....._triton.launch import Launch, strided
from ...._shared.arguments import in_rows
from ...._shared.row_tiles import row_tiles
from ...._shared.triton_rows import inside, load_tokens, locate, store_statistic, store_tokens
from ...types import NormInputs, NormOutputs
from .primitives import load_channels, load_factor


@triton.jit
def _residual_norm_fwd_kernel(
    residual,  # [B, N, C]; None without a branch
    normalized,  # [B, N, C]
    token_norms,  # [B, N] fp32
    mean,  # [B, N] fp32; None for RMSNorm
    rstd,  # [B, N] fp32
    x,  # [B, N, C]
    branch,  # [B, N, C] or None
    layer_scale,  # [C] or None
    drop_path,  # [B] or None
    weight,  # [C]
    bias,  # [C] or None
    tiles_of_image,
    num_tokens,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, tokens = locate(tl.program_id(0), tiles_of_image, ROWS)
    exists = inside(tokens, num_tokens, C, BLOCK_C)
    value = load_tokens(x, image, tokens, exists)
    if branch is not None:
        update = load_tokens(branch, image, tokens, exists)
        value += update * load_factor(layer_scale, drop_path, image, C, BLOCK_C)
        # What is normalized is what is stored: the backward has nothing else to start from.
        value = value.to(residual.dtype.element_ty).to(tl.float32)
        store_tokens(residual, value, image, tokens, num_tokens, exists, C)

    # By itself, though mean and variance would give it: they do not for an infinite token.
    square = tl.sum(value * value, 1)
    store_statistic(token_norms, tl.sqrt(square), image, tokens, num_tokens)
    if mean is not None:
        average = tl.sum(value, 1) / C
        store_statistic(mean, average, image, tokens, num_tokens)
        # Centred before it is squared: E[x^2] - E[x]^2 has nothing left of the variance where the mean is large.
        value = tl.where(exists, value - average[:, None], 0.0)
        square = tl.sum(value * value, 1)
    scale = tl.rsqrt(square / C + eps)
    store_statistic(rstd, scale, image, tokens, num_tokens)

    value = value * scale[:, None] * load_channels(weight, C, BLOCK_C)
    if bias is not None:
        value += load_channels(bias, C, BLOCK_C)
    store_tokens(normalized, value, image, tokens, num_tokens, exists, C)


def forward_launches(inputs: NormInputs, outputs: NormOutputs) -> list[Launch]:
    """The forward as launches, which write every element of ``outputs``."""
    tiles = row_tiles(inputs.x)
    arguments = {
        "x": strided(in_rows(inputs.x)),
        "branch": None if inputs.branch is None else strided(in_rows(inputs.branch)),
        "layer_scale": None if inputs.layer_scale is None else inputs.layer_scale.contiguous(),
        "drop_path": None if inputs.drop_path is None else inputs.drop_path.contiguous(),
        "weight": inputs.weight.contiguous(),
        "bias": None if inputs.bias is None else inputs.bias.contiguous(),
        **outputs._asdict(),
        "tiles_of_image": tiles.an_image,
        "num_tokens": inputs.x.shape[1],
        "eps": inputs.eps,
    }
    constants = {"C": inputs.x.shape[2], "BLOCK_C": tiles.block_c, "ROWS": tiles.rows}
    return [Launch(_residual_norm_fwd_kernel, (tiles.total,), arguments, constants, tiles.num_warps, 1)]
