"""The specification itself as a backend: serves every call. The only backend that imports it.

On a GPU its counting waits for the device, which has to say how many norms are finite.
"""

from __future__ import annotations

from torch import Tensor

from ....layout import TokenLayout
from ..._shared import requirements
from .. import features, reference
from ..backend import TokenNormsBackend
from ..types import NormDistribution


def forward(x: Tensor) -> Tensor:
    return reference.token_norms(x)


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    reference.accumulate(norms, layout, into)


BACKEND = TokenNormsBackend(
    name="reference",
    requirements=requirements.anywhere(features.ALL),
    forward=forward,
    accumulate=accumulate,
    refuses=features.statistics_reasons,
)
