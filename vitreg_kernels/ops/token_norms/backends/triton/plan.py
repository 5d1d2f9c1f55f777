"""How norms are shared out to programs that count them; needs no triton, reads no data. Nothing here was measured."""

from __future__ import annotations

import torch
from torch import Tensor

NORMS_OF_A_PROGRAM = 1024
GROUPS = 4  # a power of two; the last is empty
QUANTITIES = 4  # sum, sum of squares, minimum, maximum


def empty_partial(norms: Tensor) -> Tensor:
    """``[programs, 4, 4]`` fp64, uninitialised: each program's quantities of groups."""
    programs = -(-norms.numel() // NORMS_OF_A_PROGRAM)
    return norms.new_empty((programs, QUANTITIES, GROUPS), dtype=torch.float64)
