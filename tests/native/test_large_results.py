"""Results that no cache holds: written past the caches, into huge pages; the same numbers as of a small call."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vitreg_kernels._native import library
from vitreg_kernels.functional import residual_layer_norm

pytestmark = pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults()))

ROOT = Path(__file__).parents[2]
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# A forward moves four tensors of 40 MiB and more: over 120 MiB, for which no CPU's caches are taken to have room.
ROWS_OF_40_MIB = {torch.float32: 4 * 5120, torch.bfloat16: 8 * 5120, torch.float16: 8 * 5120}


def normalize(x, branch, channels):
    """Outputs, and gradients of the tokens."""
    leaves = [t.detach().requires_grad_() for t in (x, branch)]
    weight = torch.linspace(0.5, 1.5, channels, dtype=x.dtype)
    result = residual_layer_norm(*leaves, layer_scale=weight, weight=weight, bias=weight, backend="cpu")
    gradients = torch.autograd.grad([result.residual, result.normalized], leaves, [x, branch])
    return [*(t.detach() for t in result), *gradients]


QUICK = ((torch.float32, 512), (torch.bfloat16, 520), (torch.float16, 544))


@pytest.mark.parametrize(
    ("dtype", "channels"),
    [
        pytest.param(dtype, channels, marks=() if (dtype, channels) in QUICK else pytest.mark.slow)
        for dtype in ROWS_OF_40_MIB
        for channels in (512, 544, 520)
    ],
)
def test_rows_of_a_large_call_are_those_of_small_ones(dtype, channels):
    """544 channels end in half a sweep; rows of 520 begin nowhere that can be written past the caches."""
    x, branch = torch.randn(2, 1, ROWS_OF_40_MIB[dtype], channels).to(dtype)
    whole = normalize(x, branch, channels)
    parts = [normalize(*pair, channels) for pair in zip(x.split(1024, 1), branch.split(1024, 1), strict=True)]
    for large, small in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(large, torch.cat(small, 1))


CALLS = """
import re
from pathlib import Path

import numpy
import torch
from vitreg_kernels.functional import register_attention, residual_layer_norm

def huge_bytes(x):
    found = 0
    for mapping in re.split(r"\\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, end = (int(address, 16) for address in mapping.split(maxsplit=1)[0].split("-"))
        if first < x.data_ptr() + x.nbytes and end > x.data_ptr():
            found += sum(1024 * int(size) for size in re.findall(r"AnonHugePages: +(\\d+)", mapping))
    return found

x = torch.ones(1, 20480, 512)
normalized = residual_layer_norm(x, x, weight=torch.ones(512), backend="cpu").normalized
attended = register_attention(*torch.ones(3, 40, 16, 256, 64), backend="cpu")
asked = torch.from_numpy(numpy.ones(40 * 2**17))  # NumPy asks for them too
print(*(f"{result.nbytes} {huge_bytes(result)}" for result in (normalized, attended, x, asked)), sep="\\n")
"""


@pytest.mark.skipif(
    not HUGE_PAGES.exists() or "[never]" in HUGE_PAGES.read_text(), reason="this system gives nobody huge pages"
)
def test_fresh_results_are_in_huge_pages():
    """Of the mappings that hold a result. In a process of its own: memory that was there before stays as it is."""
    done = subprocess.run([sys.executable, "-c", CALLS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    normalized, attended, ones, asked = (map(int, line.split()) for line in done.stdout.splitlines())
    if not tuple(asked)[1]:
        pytest.skip("this system gives nobody huge pages, whatever it says")
    for size, huge in (normalized, attended):
        assert size == 40 * 2**20
        assert huge >= size - 2 * 2**21
    if "[madvise]" in HUGE_PAGES.read_text():
        assert tuple(ones) == (40 * 2**20, 0), "torch asked for them, and the above shows nothing"
