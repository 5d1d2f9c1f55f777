"""Arguments of a call checked, or one sentence: what was given, what was expected, what to do.

Reads shapes and dtypes only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...layout import TokenLayout
from .._shared.arguments import DTYPES, described
from .bins import NUM_BINS
from .types import GROUPS, NormDistribution

_OF_INTO = {
    "histogram": ([len(GROUPS), NUM_BINS], torch.int64),
    "sums": ([len(GROUPS), 2], torch.float64),
    "extremes": ([len(GROUPS), 2], torch.float32),
    "nonfinite": ([len(GROUPS), 2], torch.int64),
}


def validated_tokens(x: Tensor) -> Tensor:
    """Tokens ``[B, N, C]`` without their gradient.

    Raises:
        TypeError, ValueError: if x is no such tensor.
    """
    if not isinstance(x, Tensor) or x.ndim != 3:
        raise ValueError(f"x must be a [batch, tokens, channels] tensor, got {described(x)}")
    _check_elements("x", x)
    return x.detach()


def validated_norms(norms: Tensor, layout: TokenLayout) -> Tensor:
    """Norms ``[B, N]``, in order of the layout, in fp32 and without their gradient.

    Raises:
        TypeError, ValueError: if they are no such tensor, or their N does not fit the layout.
    """
    if not isinstance(norms, Tensor) or norms.ndim != 2:
        raise ValueError(f"norms must be a [batch, tokens] tensor, got {described(norms)}")
    _check_elements("norms", norms)
    check_layout(norms, layout)
    return norms.detach().float()


def check_layout(x: Tensor, layout: TokenLayout) -> None:
    """Raises: TypeError, ValueError: if the layout is none, or the N of x ``[B, N, ...]`` does not fit it."""
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout must be a TokenLayout, got a {type(layout).__name__}")
    layout.check(x)


def check_into(into: NormDistribution, norms: Tensor) -> None:
    """Raises: TypeError, ValueError: if ``into`` cannot take the counts of three groups of norms."""
    if not isinstance(into, NormDistribution):
        raise TypeError(f"into must be a NormDistribution, got a {type(into).__name__}")
    for name, (shape, dtype) in _OF_INTO.items():
        x = getattr(into, name)
        if not isinstance(x, Tensor) or list(x.shape) != shape or x.dtype != dtype or x.device != norms.device:
            wanted = f"{shape} {str(dtype).removeprefix('torch.')} on {norms.device}"
            raise ValueError(f"into.{name} must be {wanted}, got {described(x)}; NormDistribution.zeros makes one")


def _check_elements(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be fp32, fp16, bf16 or fp64, got {described(x)}")
    if not all(x.shape[1:]):
        raise ValueError(f"there must be at least one token and channel, got {name} {described(x)}")
