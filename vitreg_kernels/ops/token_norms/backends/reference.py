"""The specification itself as a backend: serves every call. The only backend that imports it.

On a GPU its counting waits for the device, which has to say how many norms are finite.
"""

from __future__ import annotations

from torch import Tensor

from ....dispatch import Request
from ....layout import TokenLayout
from ..._shared import requirements
from .. import features, reference
from ..backend import TokenNormsBackend
from ..types import NormDistribution


def forward(x: Tensor) -> Tensor:
    return reference.token_norms(x)


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    reference.accumulate(norms, layout, into)


def refuses(request: Request) -> list[str]:
    reasons = features.statistics_reasons(request)
    if request.device == "meta" and features.STATISTICS in request.features:
        reasons.append("counting asks how many norms are finite, which the meta device cannot tell")
    return reasons


BACKEND = TokenNormsBackend(
    name="reference",
    requirements=requirements.anywhere(features.ALL),
    forward=forward,
    accumulate=accumulate,
    refuses=refuses,
)
