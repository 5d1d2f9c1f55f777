"""How ``[B, N, C]`` is cut into tiles of whole tokens; needs no triton and reads no tensor data.

A tile is a few tokens of one image with all their channels, which a program holds in registers: every input is read and
every output written once. Tiles do not cross images, so that strides and drop-path factors are those of one image.
Nothing here was measured.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

_ELEMENTS_OF_A_TILE = 2048

# A thread keeps so many elements of each tensor where it only reads and writes them.
_FORWARD_ELEMENTS_OF_A_THREAD = 16


class RowTiles(NamedTuple):
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


def row_tiles(x: Tensor, elements_of_a_thread: int = _FORWARD_ELEMENTS_OF_A_THREAD) -> RowTiles:
    """The tiles of ``[B, N, C]``, their warps so many that a thread keeps that number of elements."""
    batch, tokens, channels = x.shape
    block_c = max(16, 1 << (channels - 1).bit_length())
    rows = max(1, _ELEMENTS_OF_A_TILE // block_c)
    an_image = -(-tokens // rows)
    return RowTiles(rows, block_c, an_image, batch * an_image, rows * block_c // (32 * elements_of_a_thread))
