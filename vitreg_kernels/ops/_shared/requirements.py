"""What backends of one kind require, said once for all ops."""

from __future__ import annotations

from typing import Literal

import torch

from ..._triton import mode
from ...dispatch import ANY_CAPABILITY, ANY_SIZE, Requirements
from . import observers
from .arguments import DTYPES

SM_80_AND_NEWER = (80, ANY_CAPABILITY[1])

# The interpreter is slow: there a kernel runs only if it is named.
TRITON_DEFAULT: Literal["if measured", "never"] = "never" if mode.INTERPRETING else "if measured"

_WITHOUT_DOUBLE = (torch.float32, torch.float16, torch.bfloat16)


def anywhere(features: tuple[str, ...]) -> Requirements:
    """Of plain torch code: every device and dtype."""
    return Requirements(
        devices=("cpu", "cuda", "mps", "xpu", "meta"), dtypes=DTYPES, features=(*features, *observers.OF_TORCH)
    )


def on_cpu(features: tuple[str, ...], *, head_dims: tuple[int, int] = ANY_SIZE) -> Requirements:
    """Of the C++ library."""
    served = (*features, *observers.OF_KERNELS)
    return Requirements(("cpu",), _WITHOUT_DOUBLE, head_dims, served, features_if_named=observers.OF_NAMED_KERNELS)


def on_triton(
    features: tuple[str, ...],
    *,
    head_dims: tuple[int, int] = ANY_SIZE,
    channels: tuple[int, int] = ANY_SIZE,
    not_interpreted: tuple[str, ...] = (),
) -> Requirements:
    """Of Triton kernels: an A100 or newer, or, where Triton's interpreter is on, a CPU.

    Args:
        features: that the kernels serve.
        head_dims, channels: as of ``Requirements``.
        not_interpreted: features that the interpreter does not serve. It holds bf16 as raw bits and computes garbage
            with it, so bf16 is none of its dtypes either.
    """
    features = (*features, *observers.OF_KERNELS)
    if_named = observers.OF_NAMED_KERNELS
    if mode.INTERPRETING:
        dtypes = (torch.float32, torch.float16)
        served = tuple(feature for feature in features if feature not in not_interpreted)
        return Requirements(("cpu",), dtypes, head_dims, served, channels=channels, features_if_named=if_named)
    return Requirements(
        ("cuda",),
        _WITHOUT_DOUBLE,
        head_dims,
        features,
        capabilities=SM_80_AND_NEWER,
        channels=channels,
        features_if_named=if_named,
    )
