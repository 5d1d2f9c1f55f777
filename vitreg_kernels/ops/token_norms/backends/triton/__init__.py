"""This library's Triton kernels for norms and for counting them. Importing this package does not import triton.

Not here: how a launch reaches a GPU, the interpreter or the offline compiler (``_triton``).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....._triton import mode
from ....._triton.launch import Launch
from ....._triton.replay import run_launches
from .....layout import TokenLayout
from ...._shared import requirements
from ... import features
from ...backend import TokenNormsBackend
from ...types import GROUPS, NormDistribution
from .plan import empty_partial


def forward(x: Tensor) -> Tensor:
    """The norms of tokens."""
    norms = x.new_empty(x.shape[:2], dtype=torch.float32)
    run_launches(_norms_launches, x, norms)
    return norms


def accumulate(norms: Tensor, layout: TokenLayout, into: NormDistribution) -> None:
    """Count norms into the distributions of their groups."""
    norms = norms.contiguous()
    run_launches(_counting_launches, norms, layout, into, empty_partial(norms))


def launches(x: Tensor, layout: TokenLayout) -> list[Launch]:
    """Every kernel that the statistics of tokens ``[B, N, C]`` would launch, without running any.

    Works on ``meta`` tensors, so kernels can be compiled for GPUs that are not there.
    """
    norms = x.new_empty(x.shape[:2], dtype=torch.float32)
    into = NormDistribution.zeros((len(GROUPS),), x.device)
    return [*_norms_launches(x, norms), *_counting_launches(norms, layout, into, empty_partial(norms))]


def _norms_launches(x: Tensor, norms: Tensor) -> list[Launch]:
    from .norms_kernel import norms_launches

    return norms_launches(x, norms)


def _counting_launches(norms: Tensor, layout: TokenLayout, into: NormDistribution, partial: Tensor) -> list[Launch]:
    from .counting_kernels import counting_launches

    return counting_launches(norms, layout, into, partial)


BACKEND = TokenNormsBackend(
    name="triton",
    requirements=requirements.on_triton(features.ALL, channels=(1, 4096)),
    forward=forward,
    accumulate=accumulate,
    opaque=True,
    default=requirements.TRITON_DEFAULT,
    faults=mode.faults,
)
