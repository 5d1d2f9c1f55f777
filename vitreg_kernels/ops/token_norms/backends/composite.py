"""torch's own vector_norm; counting as torch ops that wait for nothing and give the same bits every time.

All groups are counted at once: one histogram with 2 bins more a group, for NaN and infinite norms.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ....layout import TokenLayout
from ..._shared import requirements
from .. import features
from ..backend import TokenNormsBackend
from ..bins import FIRST_BIN, NUM_BINS, SHIFT
from ..types import GROUPS, NormDistribution

_NAN, _INF = NUM_BINS, NUM_BINS + 1
_ALL_BINS = NUM_BINS + 2


def forward(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    bins = (norms.view(torch.int32) >> SHIFT).sub_(FIRST_BIN).clamp_(0, NUM_BINS - 1)
    bins.masked_fill_(norms.isnan(), _NAN).masked_fill_(norms.isinf(), _INF)
    spoilt = bins >= NUM_BINS

    tokens = torch.arange(norms.shape[1], device=norms.device)
    group_of_token = (tokens >= layout.num_cls_tokens).long() + (tokens >= layout.num_prefix_tokens)
    places = (bins + group_of_token * _ALL_BINS).flatten()
    # Not bincount, which waits for the device to learn how many bins there are. Integer sums have no order.
    counts = places.new_zeros(len(GROUPS) * _ALL_BINS).scatter_add_(0, places, torch.ones_like(places))
    counts = counts.view(len(GROUPS), _ALL_BINS)
    into.histogram.add_(counts[:, :NUM_BINS])
    into.nonfinite.add_(counts[:, NUM_BINS:])

    # Over the batch first, which all groups have in common; then each group over its tokens.
    wide = norms.double().masked_fill_(spoilt, 0.0)
    sums = torch.stack((wide, wide.square()), -1).sum(0)
    lowest = norms.masked_fill(spoilt, math.inf).amin(0)
    highest = norms.masked_fill(spoilt, -math.inf).amax(0)
    for group, of_group in enumerate((layout.cls, layout.registers, layout.patches)):
        if not lowest[of_group].numel():
            continue
        into.sums[group].add_(sums[of_group].sum(0))
        smallest, largest = into.extremes[group].unbind()
        torch.minimum(smallest, lowest[of_group].amin(), out=smallest)
        torch.maximum(largest, highest[of_group].amax(), out=largest)


BACKEND = TokenNormsBackend(
    name="composite",
    requirements=requirements.anywhere(features.ALL),
    forward=forward,
    accumulate=accumulate,
    refuses=features.statistics_reasons,
)
