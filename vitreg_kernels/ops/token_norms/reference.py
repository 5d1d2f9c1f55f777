"""The specification of the ops: what every backend must compute, in plain torch, readable in one sitting."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import TokenLayout
from .bins import NUM_BINS, bin_edges
from .types import NormDistribution


def token_norms(x: Tensor) -> Tensor:
    """The L2 norm of each token ``[B, N, C]``, in fp32 (fp64 for fp64): ``[B, N]``."""
    return x.to(torch.promote_types(x.dtype, torch.float32)).square().sum(-1).sqrt()


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    """Count fp32 norms ``[B, N]`` into the distributions of their groups, ``[3]``, in place."""
    edges = bin_edges(norms.device)
    for group, of_group in enumerate(layout.split(norms)):
        finite = of_group[of_group.isfinite()]
        into.nonfinite[group, 0] += of_group.isnan().sum()
        into.nonfinite[group, 1] += of_group.isinf().sum()
        if finite.numel() == 0:
            continue
        bins = (torch.searchsorted(edges, finite, right=True) - 1).clamp(min=0)
        into.histogram[group] += torch.bincount(bins, minlength=NUM_BINS)
        into.sums[group, 0] += finite.double().sum()
        into.sums[group, 1] += finite.double().square().sum()
        into.extremes[group, 0] = torch.minimum(into.extremes[group, 0], finite.min())
        into.extremes[group, 1] = torch.maximum(into.extremes[group, 1], finite.max())
