"""The specification itself as a backend: serves every call, with N x N memory. The only backend that imports it."""

from __future__ import annotations

from ....dispatch import Backend
from ..._shared import requirements
from ..._shared.arguments import without_autocast
from .. import features, reference
from ..types import AttentionInputs, AttentionResult


def forward(inputs: AttentionInputs) -> AttentionResult:
    with without_autocast(inputs.query):  # fp32 is meant where the specification says it
        return reference.attention(inputs)


BACKEND = Backend(
    name="reference",
    requirements=requirements.anywhere(features.OF_REFERENCE),
    forward=forward,
)
