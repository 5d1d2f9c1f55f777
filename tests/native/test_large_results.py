"""Results that no cache holds: written past the caches, into huge pages; the same numbers as of a small call."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from vitreg_kernels._runtime import native
from vitreg_kernels.functional import residual_layer_norm

pytestmark = pytest.mark.skipif(bool(native.faults()), reason="; ".join(native.faults()))

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Two results of 20 MiB and more are written together, past 32 MiB.
ROWS_OF_20_MIB = {torch.float32: 2 * 5120, torch.bfloat16: 4 * 5120, torch.float16: 4 * 5120}


def normalize(x, branch, channels):
    """Outputs, and gradients of the tokens."""
    leaves = [t.detach().requires_grad_() for t in (x, branch)]
    weight = torch.linspace(0.5, 1.5, channels, dtype=x.dtype)
    result = residual_layer_norm(*leaves, layer_scale=weight, weight=weight, bias=weight, backend="native")
    gradients = torch.autograd.grad([result.residual, result.normalized], leaves, [x, branch])
    return [*(t.detach() for t in result), *gradients]


@pytest.mark.parametrize("dtype", list(ROWS_OF_20_MIB), ids=str)
@pytest.mark.parametrize("channels", [512, 544, 520])
def test_rows_of_a_large_call_are_those_of_small_ones(dtype, channels):
    """544 channels end in half a sweep; rows of 520 begin nowhere that can be written past the caches."""
    x, branch = torch.randn(2, 1, ROWS_OF_20_MIB[dtype], channels).to(dtype)
    whole = normalize(x, branch, channels)
    parts = [normalize(*pair, channels) for pair in zip(x.split(4096, 1), branch.split(4096, 1), strict=True)]
    for large, small in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(large, torch.cat(small, 1))


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this system gives nobody huge pages"
)
@pytest.mark.parametrize("op", ["residual_norm", "attention"])
def test_fresh_results_are_in_huge_pages(op):
    from vitreg_kernels.functional import register_attention

    if op == "attention":
        result = register_attention(*torch.ones(3, 40, 16, 256, 64), backend="native")
    else:
        x = torch.ones(1, 20480, 512)
        result = residual_layer_norm(x, x, weight=torch.ones(512), backend="native").normalized
    assert result.nbytes >= 40 * 2**20  # which the allocator always takes from the system anew
    assert huge_bytes(result) >= result.nbytes - 2 * 2**21


def huge_bytes(x):
    """In huge pages, of the mappings that hold a tensor."""
    found = 0
    for mapping in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, end = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
        if first < x.data_ptr() + x.nbytes and end > x.data_ptr():
            found += 1024 * int(re.search(r"AnonHugePages: +(\d+)", mapping)[1])
    return found
