"""The specification itself as a backend: serves every call, with N x N memory. The only backend that imports it."""

from __future__ import annotations

import torch

from ....dispatch import Backend
from ..._shared import requirements
from .. import features, reference
from ..types import AttentionInputs, AttentionResult


def forward(inputs: AttentionInputs) -> AttentionResult:
    with torch.autocast(inputs.query.device.type, enabled=False):  # fp32 is meant where the specification says it
        return reference.attention(inputs)


BACKEND = Backend(
    name="reference",
    requirements=requirements.anywhere(features.OF_REFERENCE),
    forward=forward,
)
