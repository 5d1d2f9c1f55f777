"""The specification itself as a backend: serves every call. The only backend that imports it."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._runtime.arguments import DTYPES
from ...._runtime.dispatch import Request, Requirements, unmet
from .. import features, reference
from ..types import AssembleInputs

NAME = "reference"
OPAQUE = False
REQUIREMENTS = Requirements(devices=("cpu", "cuda", "mps", "xpu"), dtypes=DTYPES, features=features.ALL)


def not_supported_reasons(request: Request) -> list[str]:
    return unmet(REQUIREMENTS, request)


def not_default_reasons(request: Request) -> list[str]:
    return []


def forward(inputs: AssembleInputs) -> Tensor:
    with torch.autocast(inputs.patches.device.type, enabled=False):  # whose cat does not know every mixture of dtypes
        return reference.assemble_tokens(inputs)
