"""How the backward is cut into programs; needs no triton and reads no tensor data. Nothing here was measured."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from ...._shared.row_tiles import RowTiles, row_tiles
from ...types import NormGradients, NormGradInputs

# Half the forward's, since the partial sums of the parameters' gradients take registers too.
_ELEMENTS_OF_A_THREAD = 8
# Few, since each leaves a row of partial sums behind.
_PROGRAMS_OF_A_MULTIPROCESSOR = 2


class ParameterSums(NamedTuple):
    """``[programs, C]`` fp32: each program's share of a parameter's gradient; ``None`` if that is not asked for."""

    layer_scale: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def empty_sums(inputs: NormGradInputs, gradients: NormGradients) -> ParameterSums:
    """Uninitialised sums, for the gradients that are asked for."""
    residual = inputs.residual
    shape = backward_programs(backward_tiles(residual), residual.device), residual.shape[2]
    asked = (gradients.layer_scale, gradients.weight, gradients.bias)
    return ParameterSums(*(None if x is None else residual.new_empty(shape, dtype=torch.float32) for x in asked))


def backward_tiles(x: Tensor) -> RowTiles:
    """Tile after tile a program, see ``backward_programs``."""
    return row_tiles(x, _ELEMENTS_OF_A_THREAD)


def backward_programs(tiles: RowTiles, device: torch.device) -> int:
    """As many as a GPU runs at once, or as there are tiles."""
    return min(tiles.total, _PROGRAMS_OF_A_MULTIPROCESSOR * multiprocessors(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a CUDA device; an A100's elsewhere, where it decides nothing but the order of a sum."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 108
