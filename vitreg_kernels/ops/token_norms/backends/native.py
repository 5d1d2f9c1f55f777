"""This library's native CPU kernels: each token is read once, and so is each norm."""

from __future__ import annotations

import torch
from torch import Tensor

from ...._runtime import native
from ...._runtime.dispatch import Request, Requirements, unmet
from ....layout import TokenLayout
from .. import features
from ..types import NormDistribution

NAME = "native"
OPAQUE = True
REQUIREMENTS = Requirements(
    devices=("cpu",), dtypes=(torch.float32, torch.float16, torch.bfloat16), features=features.ALL
)


def not_supported_reasons(request: Request) -> list[str]:
    reasons = unmet(REQUIREMENTS, request)
    if request.device in REQUIREMENTS.devices:
        reasons += native.faults()
    return reasons


def not_default_reasons(request: Request) -> list[str]:
    return []


def forward(x: Tensor) -> Tensor:
    """The norms of tokens: those of ``residual_layer_norm``'s native backend, to the last bit."""
    norms = x.new_empty(x.shape[:2], dtype=torch.float32)
    torch.ops.vitreg_native.token_norms(native.in_rows(x), norms)
    return norms


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    """Count norms into the distributions of their groups."""
    torch.ops.vitreg_native.accumulate_token_norms(norms, layout.num_cls_tokens, layout.num_registers, *into)
