"""Sizes and memory layouts of tokens ``[B, N, C]`` that the cases of several ops share."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Shape = tuple[int, int, int]

# ViT-S at 224 px: the shape that each kind of call is checked at.
SHAPE: Shape = (2, 261, 384)
# Local crops of DINO at the widths of larger ViTs, the widest that every kernel serves, and no multiple of a vector's.
SHAPES: tuple[Shape, ...] = tuple((3, 54, channels) for channels in (768, 1024, 1280, 1536, 4096, 100))


def uniform(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers between -2 and 2 on the generator's device.

    Of normal numbers the few largest would decide the largest error of the eager formula, and so whether a backend
    passes would be luck.
    """
    return torch.rand(shape, generator=generator, device=generator.device).mul(4).sub(2).to(dtype)


def permuted(x: Tensor) -> Tensor:
    """The same ``[B, N, C]`` numbers, dense in the order of a convolution's ``[B, C, N]``."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def size(shape: Sequence[int]) -> str:
    """A shape as the name of a case."""
    return " x ".join(map(str, shape))


def short(dtype: torch.dtype) -> str:
    """A dtype in four letters."""
    return {torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
