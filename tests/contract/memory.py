"""Memory to call an op in: other strides, far away, or between bands of NaN."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

LAYOUTS = ("permuted", "sliced", "strided")

BAND = 512
FAR = 2**31 + 64
_SLOT = 2**14  # elements between the beginnings of tensors that lie far away


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same numbers in other strides."""
    if layout == "permuted":  # dense, its dimensions in the opposite order
        order = tuple(reversed(range(x.ndim)))
        return x.permute(order).contiguous().permute(order)
    if layout == "strided":  # no unit stride anywhere
        return x.repeat_interleave(2, -1)[..., ::2]
    wide = x.new_zeros([size + 3 for size in x.shape])  # a window of something larger, at an odd offset
    window = wide[tuple(slice(1, -2) for _ in x.shape)]
    return window.copy_(x)


def far(x: Tensor, axis: int, memory: Tensor, slot: int) -> Tensor:
    """The same numbers with the last index of an axis 2^31 elements away from the first.

    A 32-bit product lands as far before the tensor, where ``memory`` holds other numbers.
    """
    shape = [1 if i == axis else size for i, size in enumerate(x.shape)]
    assert math.prod(shape) <= _SLOT
    strides = list(torch.empty(shape, device="meta").stride())
    strides[axis] = -(-FAR // (x.shape[axis] - 1))
    # By data, or a tensor that was saved for the backward would be told that its memory has changed.
    return memory.data.as_strided(x.shape, strides, FAR + slot * _SLOT).copy_(x)


def far_memory() -> Tensor:
    """Of which only the pages that hold a value are ever committed."""
    return torch.empty(2 * FAR + 2**20, dtype=torch.float16)


def guarded(values: Tensor) -> Tensor:
    """The same numbers in the same strides between bands of NaN: a read beyond them poisons the result."""
    return _between_bands(values)[0].copy_(values)


def _between_bands(like: Tensor) -> tuple[Tensor, Tensor]:
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, like.stride(), strict=True))
    memory = torch.full((max(extent, 0) + 2 * BAND,), math.nan, dtype=like.dtype)
    return memory.as_strided(like.shape, like.stride(), BAND), memory


@contextmanager
def guarded_allocations() -> Iterator[None]:
    """Within, what is allocated without being filled lies in NaN: an element that no kernel writes stays NaN.

    Raises:
        AssertionError: at the end, if something was written outside what was allocated.
    """
    allocated: list[tuple[Tensor, Tensor]] = []

    def banded(allocate):
        def call(*arguments, **options):
            tensor = allocate(*arguments, **options)
            if not tensor.is_floating_point() or tensor.numel() == 0:
                return tensor
            allocated.append(_between_bands(tensor))
            return allocated[-1][0]

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (torch, "empty"),
            (torch, "empty_like"),
            (Tensor, "new_empty"),
            (Tensor, "new_empty_strided"),
        ):
            patch.setattr(owner, name, banded(getattr(owner, name)))
        yield
    assert allocated, "nothing was allocated here"
    for view, memory in allocated:
        inside = torch.zeros_like(memory, dtype=torch.bool)
        inside.as_strided(view.shape, view.stride(), BAND).fill_(True)
        assert memory[~inside].isnan().all(), f"written outside a tensor of {tuple(view.shape)}"
