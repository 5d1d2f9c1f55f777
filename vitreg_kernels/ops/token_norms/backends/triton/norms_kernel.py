"""The norms of tokens in one pass, cut into the tiles that residual_norm's forward takes: it takes the same norms."""

# ruff: noqa: ANN001, ANN202  (what a kernel takes is traced, not annotated; shapes stand in comments)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ....._triton.launch import Launch, strided
from ...._shared.arguments import in_rows
from ...._shared.row_tiles import row_tiles
from ...._shared.triton_rows import inside, load_tokens, locate, store_statistic


@triton.jit
def _token_norms_kernel(
    x,  # [B, N, C]
    norms,  # [B, N] fp32
    tiles_of_image,
    num_tokens,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    image, tokens = locate(tl.program_id(0), tiles_of_image, ROWS)
    value = load_tokens(x, image, tokens, inside(tokens, num_tokens, C, BLOCK_C))
    store_statistic(norms, tl.sqrt(tl.sum(value * value, 1)), image, tokens, num_tokens)


def norms_launches(x: Tensor, norms: Tensor) -> list[Launch]:
    """The norms of tokens ``[B, N, C]`` as launches, which write every element of ``norms``, contiguous."""
    tiles = row_tiles(x)
    arguments = {
        "x": strided(in_rows(x)),
        "norms": norms,
        "tiles_of_image": tiles.an_image,
        "num_tokens": x.shape[1],
    }
    constants = {"C": x.shape[2], "BLOCK_C": tiles.block_c, "ROWS": tiles.rows}
    return [Launch(_token_norms_kernel, (tiles.total,), arguments, constants, tiles.num_warps, 1)]
