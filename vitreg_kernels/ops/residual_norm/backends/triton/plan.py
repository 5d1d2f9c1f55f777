"""How a call is cut into programs; needs no triton and reads no tensor data.

A tile is a few tokens of one image with all their channels, which a program holds in registers: every input is read and
every output written once. Tiles do not cross images, so that strides and drop-path factors are those of one image.
Nothing here was measured. A thread keeps 16 elements of each tensor in the forward and 8 in the backward, whose
partial sums take registers too, so that a multiprocessor has room for several programs.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

_ELEMENTS_OF_A_TILE = 2048
_FORWARD_ELEMENTS_OF_A_THREAD = 16
_BACKWARD_ELEMENTS_OF_A_THREAD = 8
# Few, since each leaves a row of partial sums behind.
_BACKWARD_PROGRAMS_OF_A_MULTIPROCESSOR = 2


class Tiles(NamedTuple):
    """Tiles of ``[B, N, C]``.

    Attributes:
        rows: tokens of a tile.
        block_c: channels of a tile, the power of two from C.
        an_image: tiles of an image.
        total: tiles of all images.
        num_warps: that share a tile.
    """

    rows: int
    block_c: int
    an_image: int
    total: int
    num_warps: int


def forward_tiles(x: Tensor) -> Tiles:
    """One tile a program."""
    return _tiles(x, _FORWARD_ELEMENTS_OF_A_THREAD)


def backward_tiles(x: Tensor) -> Tiles:
    """Tile after tile a program, see ``backward_programs``."""
    return _tiles(x, _BACKWARD_ELEMENTS_OF_A_THREAD)


def backward_programs(tiles: Tiles, device: torch.device) -> int:
    """As many as a GPU runs at once, or as there are tiles."""
    return min(tiles.total, _BACKWARD_PROGRAMS_OF_A_MULTIPROCESSOR * multiprocessors(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; an A100's elsewhere, where it decides nothing but the order of a sum."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108


def in_rows(x: Tensor) -> Tensor:
    """A tensor whose channels lie side by side: itself, or a contiguous copy. Its other strides may be anything."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def strides(**tensors: Tensor | None) -> dict[str, int]:
    """Strides of ``[B, N, C]`` tensors as kernel arguments: ``x_stride_b``, ``x_stride_n``...; 0 for an absent one."""
    return {
        f"{name}_stride_{axis}": 0 if x is None else x.stride(i)
        for name, x in tensors.items()
        for i, axis in enumerate("bn")
    }


def _tiles(x: Tensor, elements_of_a_thread: int) -> Tiles:
    batch, tokens, channels = x.shape
    block_c = max(16, 1 << (channels - 1).bit_length())
    rows = max(1, _ELEMENTS_OF_A_TILE // block_c)
    an_image = -(-tokens // rows)
    return Tiles(rows, block_c, an_image, batch * an_image, rows * block_c // (32 * elements_of_a_thread))
