"""The specification itself as a backend: serves every call. The only backend that imports it."""

from __future__ import annotations

import torch

from ...._runtime.arguments import DTYPES
from ...._runtime.dispatch import Request, Requirements, unmet
from .. import features, reference
from ..types import NormInputs, ResidualNorm

NAME = "reference"
OPAQUE = False
REQUIREMENTS = Requirements(devices=("cpu", "cuda", "mps", "xpu"), dtypes=DTYPES, features=features.ALL)


def not_supported_reasons(request: Request) -> list[str]:
    return unmet(REQUIREMENTS, request)


def not_default_reasons(request: Request) -> list[str]:
    return []


def forward(inputs: NormInputs) -> ResidualNorm:
    with torch.autocast(inputs.x.device.type, enabled=False):  # fp32 is meant where the specification says it
        return reference.residual_layer_norm(inputs)
