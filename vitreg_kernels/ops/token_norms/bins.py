"""The bins that norms are counted in, spaced as floating-point numbers are: a bin's number is integer arithmetic.

An fp32 norm is ``2**exponent * (1 + mantissa)``. Its exponent and the first 6 bits of its mantissa are its bin: 64 bins
to an octave, at most 1.6 percent wide, from 2**-12 to 2**20. The first takes what is smaller too, the last what is
larger.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS_PER_OCTAVE = 64
NUM_BINS = 2048

# An fp32's bits, shifted, are its bin counted from 2**-127: the exponent's bits and the first 6 of the mantissa's 23.
SHIFT = 23 - 6
FIRST_BIN = (127 - 12) * BINS_PER_OCTAVE


def bin_edges(device: torch.device | str) -> Tensor:
    """Where each bin begins, and where the last one ends: ``[2049]`` fp32 from 0 to infinity.

    Bin i counts the norms of at least ``bin_edges[i]`` and less than ``bin_edges[i + 1]``.
    """
    bits = torch.arange(FIRST_BIN, FIRST_BIN + NUM_BINS + 1, dtype=torch.int32, device=device) << SHIFT
    edges = bits.view(torch.float32)
    edges[0], edges[-1] = 0.0, torch.inf
    return edges
