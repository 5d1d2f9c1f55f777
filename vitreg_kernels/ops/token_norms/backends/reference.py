"""The specification itself as a backend: serves every call. The only backend that imports it.

On a GPU its counting waits for the device, which has to say how many norms are finite.
"""

from __future__ import annotations

from torch import Tensor

from ...._runtime.arguments import DTYPES
from ...._runtime.dispatch import Request, Requirements, unmet
from ....layout import TokenLayout
from .. import features, reference
from ..types import NormDistribution

NAME = "reference"
OPAQUE = False
REQUIREMENTS = Requirements(devices=("cpu", "cuda", "mps", "xpu"), dtypes=DTYPES, features=features.ALL)


def not_supported_reasons(request: Request) -> list[str]:
    return unmet(REQUIREMENTS, request) + features.statistics_reasons(request)


def not_default_reasons(request: Request) -> list[str]:
    return []


def forward(x: Tensor) -> Tensor:
    return reference.token_norms(x)


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    reference.accumulate(norms, layout, into)
