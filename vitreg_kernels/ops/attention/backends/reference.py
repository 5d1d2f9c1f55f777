"""The specification itself as a backend: serves every call, with N x N memory. The only backend that imports it."""

from __future__ import annotations

import torch

from ...._runtime.dispatch import Request, Requirements, unmet
from .. import features, reference
from ..types import AttentionInputs, AttentionResult

NAME = "reference"
OPAQUE = False
REQUIREMENTS = Requirements(
    devices=("cpu", "cuda", "mps", "xpu"),
    dtypes=(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    head_dims=(1, 2**31 - 1),
    features=tuple(f for f in features.ALL if f != features.PACKING_COMPILED),
)


def not_supported_reasons(request: Request) -> list[str]:
    return unmet(REQUIREMENTS, request)


def not_default_reasons(request: Request) -> list[str]:
    return []


def forward(inputs: AttentionInputs) -> AttentionResult:
    with torch.autocast(inputs.query.device.type, enabled=False):  # fp32 is meant where the specification says it
        return reference.attention(inputs)
