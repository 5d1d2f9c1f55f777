"""This library's Triton kernels for norms and for counting them. Importing this package does not import triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ....._runtime import triton_mode
from ....._runtime.dispatch import Request, Requirements, unmet
from ....._runtime.launch import Launch, run_all
from .....layout import TokenLayout
from ... import features
from ...types import GROUPS, NormDistribution

NAME = "triton"
OPAQUE = True
REQUIREMENTS = Requirements(
    # In Triton's interpreter the kernels run on CPU tensors; it holds bf16 as raw bits and computes garbage with it.
    devices=("cpu",) if triton_mode.INTERPRETING else ("cuda",),
    dtypes=(torch.float32, torch.float16)
    if triton_mode.INTERPRETING
    else (torch.float32, torch.float16, torch.bfloat16),
    features=features.ALL,
    min_capability=(8, 0),
    channels=(1, 4096),  # a token lies in the registers of one program
)


def not_supported_reasons(request: Request) -> list[str]:
    reasons = unmet(REQUIREMENTS, request)
    if request.device in REQUIREMENTS.devices:
        reasons += triton_mode.faults()
    return reasons


def not_default_reasons(request: Request) -> list[str]:
    if triton_mode.INTERPRETING:
        return ["has not been measured on the interpreter, which is slow; name it to use it"]
    major, minor = request.capability
    return [f"has not been measured on compute capability {major}.{minor} yet; name it to use it"]


def forward(x: Tensor) -> Tensor:
    """The norms of tokens."""
    from .norms_kernel import norms_launches

    norms = x.new_empty(x.shape[:2], dtype=torch.float32)
    run_all(norms_launches(x, norms), x)
    return norms


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    """Count norms into the distributions of their groups."""
    from .counting_kernels import counting_launches

    run_all(counting_launches(norms, layout, into), norms)


def launches(x: Tensor, layout: TokenLayout) -> list[Launch]:
    """Every kernel that the statistics of tokens ``[B, N, C]`` would launch, without running any.

    Works on ``meta`` tensors, so kernels can be compiled for GPUs that are not there.
    """
    from .counting_kernels import counting_launches
    from .norms_kernel import norms_launches

    norms = x.new_empty(x.shape[:2], dtype=torch.float32)
    into = NormDistribution.zeros((len(GROUPS),), x.device)
    return [*norms_launches(x, norms), *counting_launches(norms, layout, into)]
