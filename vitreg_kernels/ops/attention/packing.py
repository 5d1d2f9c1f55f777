"""Packed images on the host, for backends whose kernels do not read ``cu_seqlens`` themselves."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, pairwise

from torch import Tensor


def lengths(cu_seqlens: Tensor, tokens: int) -> list[int]:
    """Tokens of each image. Reads ``cu_seqlens`` on the host, which waits for a GPU.

    Raises:
        ValueError: if the lengths are not positive or do not add up to ``tokens``.
    """
    bounds = cu_seqlens.tolist()
    each = [end - start for start, end in pairwise(bounds)]
    if bounds[0] != 0 or bounds[-1] != tokens or min(each) < 1:
        raise ValueError(f"cu_seqlens must rise from 0 to the {tokens} packed tokens, got {bounds}")
    return each


def runs_of_equal_length(cu_seqlens: Tensor, tokens: int) -> Iterator[tuple[int, int, int]]:
    """Neighbouring images of one length, as (first token, number of images, tokens an image).

    A run can be viewed as a batch, so a multi-crop pack of 2 x 261 and 8 x 54 tokens is two calls, not ten. Reads
    ``cu_seqlens`` on the host.
    """
    start = 0
    for length, images in groupby(lengths(cu_seqlens, tokens)):
        count = len(list(images))
        yield start, count, length
        start += count * length


def as_batch(packed: Tensor, start: int, count: int, length: int) -> Tensor:
    """``[1, H, sum of N, D]`` -> the run's images as a ``[count, H, length, D]`` view."""
    run = packed[0, :, start : start + count * length]
    return run.unflatten(1, (count, length)).transpose(0, 1)
