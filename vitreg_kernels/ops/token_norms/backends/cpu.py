"""This library's C++ kernels for CPUs: each token is read once, and so is each norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._native import library
from ....layout import TokenLayout
from ..._shared import requirements
from ..._shared.arguments import in_rows
from .. import features
from ..backend import TokenNormsBackend
from ..types import NormDistribution


def forward(x: Tensor) -> Tensor:
    """The norms of tokens: those of ``residual_layer_norm``'s backend ``cpu``, to the last bit."""
    norms = x.new_empty(x.shape[:2], dtype=torch.float32)
    torch.ops.vitreg_cpu.token_norms(in_rows(x), norms)
    return norms


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    """Count norms into the distributions of their groups."""
    torch.ops.vitreg_cpu.accumulate_token_norms(norms, layout.num_cls_tokens, layout.num_registers, *into)


BACKEND = TokenNormsBackend(
    name="cpu",
    requirements=requirements.on_cpu(features.ALL),
    forward=forward,
    accumulate=accumulate,
    opaque=True,
    faults=library.faults,
)
