"""Memory full of NaN, around inputs and in place of what is uninitialised.

A kernel that reads beyond a tensor takes in NaN, and an element that it never writes is NaN, where other memory might
hold zeros, or the right answer of the call before.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

BAND = 2**19  # elements each side: more than a tile of 128 tokens of 16 heads of 64 channels in a packed qkv


def guarded(values: Tensor) -> Tensor:
    """The same floating-point values in the same strides, in the middle of memory that is NaN elsewhere."""
    return _copied(values, BAND, math.nan)


def copied(values: Tensor) -> Tensor:
    """The same values in the same strides in memory of their own; an expanded tensor stays one."""
    return _copied(values, 0, 0)


def _copied(values: Tensor, band: int, around: float) -> Tensor:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(values.shape, values.stride(), strict=True))
    memory = values.new_full((max(extent, 0) + 2 * band,), around)
    once = values[tuple(slice(1) if stride == 0 else slice(None) for stride in values.stride())]
    memory.as_strided(once.shape, values.stride(), band).copy_(once)
    return memory.as_strided(values.shape, values.stride(), band)


@contextmanager
def poisoned(device: torch.device) -> Iterator[None]:
    """Within, ``torch.empty`` and its like give NaN.

    By torch's deterministic mode, which does that and is here told to warn only, so it chooses no other kernels.

    Raises:
        RuntimeError: if this torch does not fill memory on ``device``.
    """
    deterministic = torch.utils.deterministic
    before = (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled())
    filled_before = deterministic.fill_uninitialized_memory
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?is).*determinis")
        torch.use_deterministic_algorithms(True, warn_only=True)
        deterministic.fill_uninitialized_memory = True
        try:
            if not torch.empty(1, device=device).isnan().item():
                raise RuntimeError(f"torch {torch.__version__} does not fill uninitialised memory on {device}")
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
            deterministic.fill_uninitialized_memory = filled_before
