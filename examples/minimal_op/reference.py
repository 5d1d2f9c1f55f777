"""The specification: what every backend must compute, in plain torch.

Run in fp64 it is what the accuracy rule takes for exact; run in the inputs' own dtype it is the eager formula that a
backend's error is held against.
"""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-12


def unit_tokens(x: Tensor) -> Tensor:
    """``x / sqrt(sum(x^2) + EPS)`` of each token of ``[B, N, C]``, computed in fp32 (fp64 for fp64), contiguous."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().sum(-1, keepdim=True) + EPS).rsqrt()
    return (wide * scale).to(x.dtype).contiguous()
