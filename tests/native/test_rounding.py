"""How native kernels read and write 16-bit numbers: as torch does, for every one of them."""

from __future__ import annotations

import pytest
import torch

from vitreg_kernels._native import library
from vitreg_kernels.functional import residual_layer_norm

pytestmark = pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults()))

every_half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
# Whole vectors of any instruction set, and tails of one lane and more.
every_width = pytest.mark.parametrize("channels", [64, 17, 5])


def residual(x, branch, channels):
    """x + branch by the kernel, rounded to x's dtype; both ``[numbers]``."""
    padding = -len(x) % channels
    x, branch = (torch.nn.functional.pad(t, (0, padding)).view(1, -1, channels) for t in (x, branch))
    result = residual_layer_norm(x, branch, weight=torch.ones(channels), backend="cpu").residual
    return result.flatten()[: result.numel() - padding]


def assert_same_numbers(actual, expected):
    """Bit for bit, but for the many ways to write NaN."""
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    numbers = ~expected.isnan()
    bits = torch.int16 if expected.dtype.itemsize == 2 else torch.int32
    assert torch.equal(actual[numbers].view(bits), expected[numbers].view(bits))


@every_half
@every_width
def test_every_number_is_read(dtype, channels):
    everything = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    actual = residual(torch.zeros(2**16), everything, channels)
    # 0 + -0 is 0; and so that subnormal numbers are not only read but kept.
    assert_same_numbers(actual, torch.zeros(2**16) + everything.float())


@every_half
@every_width
def test_rounding_is_to_the_nearest_and_ties_go_to_even(dtype, channels):
    """Around every number of the dtype: itself, half way to the next, and one bit of fp32 to either side of that."""
    least = torch.arange(2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    low, high = least[:-1].float(), least[1:].float()
    half = (low.double() + high.double()).div(2).float()
    near = [low, half, torch.nextafter(half, low), torch.nextafter(half, high)]
    numbers = torch.cat([sign * x for x in near for sign in (1.0, -1.0)])
    numbers = torch.cat((numbers, torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-45])))
    numbers = numbers[(numbers != 0) | ~numbers.signbit()]  # 0 + -0 is 0
    actual = residual(torch.zeros(len(numbers), dtype=dtype), numbers, channels)
    assert_same_numbers(actual, numbers.to(dtype))
