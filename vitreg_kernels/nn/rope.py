"""DINOv3's rotary position embedding of a grid of patches."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ..ops.attention.types import Rope
from .tracing import as_leaf, traced

_CACHED_GRIDS = 8  # the crops of a training run, with room to spare


def patch_rope(
    grid: tuple[int, int], head_dim: int, *, base: float = 100.0, device: torch.device, dtype: torch.dtype
) -> Rope:
    """The rotation of each patch, by its height in the first half of the angles and by its width in the second.

    The centre of a patch lies at ``(2 * row + 1) / rows - 1`` and ``(2 * column + 1) / columns - 1``, so that an image
    of any shape spans -1 to 1 both ways. Angle i of the D/4 of either is ``2 pi * coordinate / base^(4 i / D)``; the
    D/2 angles turn channels d and d + D/2 together.

    Args:
        grid: rows and columns of patches.
        head_dim: D, a multiple of 4.
        base: longest period, as a multiple of half an image.
        device, dtype: of the result; at least fp32, because a rounded angle is a patch in another place.

    Returns:
        ``Rope`` of ``[M, D]`` cos and sin.

    Source: Siméoni et al., "DINOv3" (arXiv 2508.10104), section 3.2, without its augmentation of the coordinates.
    """
    exponents = torch.arange(head_dim // 4, device=device, dtype=dtype) * (4 / head_dim)
    frequencies = 2 * math.pi / base**exponents
    rows, columns = ((2 * torch.arange(n, device=device, dtype=dtype) + 1) / n - 1 for n in grid)
    by_row, by_column = rows[:, None, None] * frequencies, columns[:, None] * frequencies
    angles = torch.cat(torch.broadcast_tensors(by_row, by_column), dim=-1).flatten(0, 1).tile(2)
    return Rope(angles.cos(), angles.sin())


class PatchRope(nn.Module):
    """``patch_rope``, remembered for the grids met last.

    Has no parameters, no buffers and no place in a state dict.

    Args:
        head_dim: D, a multiple of 4.
        base: longest period, as a multiple of half an image.
    """

    def __init__(self, head_dim: int, base: float) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.base = base
        self._cache: dict[tuple, Rope] = {}

    def forward(self, grid: tuple[int, int], x: Tensor) -> Rope:
        """The rotation of a grid of patches, on the device of ``x`` and in its dtype, or fp32 if that is narrower."""
        if traced(x):
            return as_leaf(self, grid, x=x)
        options = {"base": self.base, "device": x.device, "dtype": torch.promote_types(x.dtype, torch.float32)}
        # A graph computes it: a tensor from here would be baked into it. Nor is a mode's tensor, a fake one say, kept.
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack():
            return patch_rope(grid, self.head_dim, **options)
        key = (grid, options["device"], options["dtype"])
        if key not in self._cache:
            if len(self._cache) == _CACHED_GRIDS:
                del self._cache[next(iter(self._cache))]
            with torch.inference_mode(False):  # evaluation may come first, and training take what it left
                self._cache[key] = patch_rope(grid, self.head_dim, **options)
        return self._cache[key]

    def extra_repr(self) -> str:
        return f"{self.head_dim}, base={self.base}"
