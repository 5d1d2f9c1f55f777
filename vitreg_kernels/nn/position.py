"""Learnt position rows on another grid than the one they were learnt on."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._symbolic import exporting, known
from ..ops._shared.arguments import without_autocast


def resample_positions(
    pos_embed: Tensor,
    grid: tuple[int, int],
    *,
    from_grid: tuple[int, int],
    num_prefix_rows: int = 0,
    antialias: bool = True,
    offset: float = 0.0,
) -> Tensor:
    """Position rows for another grid of patches: bicubic interpolation in fp32 (or wider), each axis by its own scale.

    With ``antialias`` and no offset as timm, and DINOv2's and Hugging Face's models with registers, do it; with an
    offset of 0.1 and no antialiasing as DINOv2's models without registers do: there the scale of the sampling grid is
    ``(rows + offset) / from_grid[0]``, not ``rows / from_grid[0]``, and so for the columns.

    The interpolation is separable, and is done as two matrix products: their backward repeats bit for bit, which that
    of ``F.interpolate`` does not on a CUDA device, and compiles with dynamic sizes.

    Args:
        pos_embed: ``[1, num_prefix_rows + from_grid[0] * from_grid[1], C]``, the rows of prefix tokens first, then
            those of the patches, row by row of the grid; any floating dtype.
        grid: rows and columns of patches wanted.
        from_grid: rows and columns of patches that ``pos_embed`` was learnt on, which its number of rows does not tell.
        num_prefix_rows: rows that belong to no patch and pass as they are.
        antialias: whether shrinking averages over all rows it covers.
        offset: see above.

    Returns:
        ``[1, num_prefix_rows + M, C]`` in the dtype of ``pos_embed``; ``pos_embed`` itself if the grid fits.

    Raises:
        ValueError: if the rows of the patches are not as many as ``from_grid`` has.
    """
    height, width = from_grid
    num_rows = pos_embed.shape[1] - num_prefix_rows
    if height * width != num_rows or not num_rows:
        raise ValueError(
            f"pos_embed has {pos_embed.shape[1]} rows, {num_prefix_rows} of them for prefix tokens, and the other "
            f"{num_rows} are no grid of {height} x {width}"
        )
    if known((grid[0] == height) & (grid[1] == width)):
        return pos_embed
    prefix, patches = pos_embed.split((num_prefix_rows, num_rows), dim=1)
    wide = patches.to(torch.promote_types(pos_embed.dtype, torch.float32))
    if offset and exporting():
        by_row, by_column = _interpolations_of_any_size(grid, from_grid, wide, antialias=antialias, offset=offset)
    else:
        by_row, by_column = (
            _interpolation(count, side, wide, antialias=antialias, offset=offset)
            for count, side in zip(grid, from_grid, strict=True)
        )
    with without_autocast(wide):
        rows = (by_row @ wide.reshape(height, -1)).unflatten(1, (width, -1))  # [rows, width, C]
        patches = (by_column @ rows).flatten(0, 1)
    return torch.cat((prefix, patches[None].to(pos_embed.dtype)), dim=1)


@torch.no_grad()
def _interpolation(count: int, side: int, like: Tensor, *, antialias: bool, offset: float) -> Tensor:
    """Bicubic interpolation from ``side`` points to ``count`` as a matrix ``[count, side]``: of every unit vector."""
    units = torch.eye(side, device=like.device, dtype=like.dtype)[None, None]
    target = {"scale_factor": ((count + offset) / side, 1.0)} if offset else {"size": (count, side)}
    return F.interpolate(units, mode="bicubic", antialias=antialias, **target)[0, 0]


@torch.no_grad()
def _interpolations_of_any_size(
    grid: tuple[int, int], from_grid: tuple[int, int], like: Tensor, *, antialias: bool, offset: float
) -> list[Tensor]:
    """The same matrices for a graph that torch.export makes for sizes it does not know.

    ``F.interpolate`` would bind the graph to the scale of its example, so points are sampled where that would sample
    them. Without an offset it keeps a grid that fits as it is; with one it is told to, as ``resample_positions`` does.
    """
    if antialias:
        raise ValueError(
            f"interpolate_offset={offset} and antialias=True, which no published model has, cannot be exported"
        )
    counts = [torch.full((), count, device=like.device) for count in grid]
    fits = (counts[0] == from_grid[0]) & (counts[1] == from_grid[1])
    found = []
    for count, side in zip(grid, from_grid, strict=True):
        points = torch.arange(count, device=like.device, dtype=like.dtype)
        places = torch.arange(side, device=like.device, dtype=like.dtype)
        # To -1 ... 1 from edge to edge of the points, which lie in the middles.
        along = (2 * points + 1) / (count + offset) - 1
        across = (2 * places + 1) / side - 1
        where = torch.stack(torch.broadcast_tensors(across[None, :], along[:, None]), -1)
        units = torch.eye(side, device=like.device, dtype=like.dtype)[None, None]
        sampled = F.grid_sample(units, where[None], mode="bicubic", padding_mode="border", align_corners=False)[0, 0]
        found.append(torch.where(fits, (points[:, None] == places).to(like.dtype), sampled))
    return found
