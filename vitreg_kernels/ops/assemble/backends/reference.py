"""The specification itself as a backend: serves every call. The only backend that imports it."""

from __future__ import annotations

from torch import Tensor

from ....dispatch import Backend
from ..._shared import requirements
from ..._shared.arguments import without_autocast
from .. import features, reference
from ..types import AssembleInputs


def forward(inputs: AssembleInputs) -> Tensor:
    with without_autocast(inputs.patches):  # whose cat does not know every mixture of dtypes
        return reference.assemble_tokens(inputs)


BACKEND = Backend(
    name="reference",
    requirements=requirements.anywhere(features.ALL),
    forward=forward,
)
