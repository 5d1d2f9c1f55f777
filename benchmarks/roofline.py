"""The ceilings of this machine, measured in the run whose figures are held against them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, NamedTuple

import torch

from benchmarks import timing
from benchmarks.shapes import DTYPES, DType

# Sides of square matrices. Small ones do not fill a GPU; bf16 on a CPU without bf16 units never gets past the first.
_SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192)}
_BUDGET_S = 0.15  # each product, and the copy


class Roofline(NamedTuple):
    """Ceilings of one device.

    Attributes:
        product_gflops: GFLOP/s of the fastest square matrix product in each dtype.
        copy_gbps: GB/s, read and written, of a copy that fits no cache.
    """

    product_gflops: dict[DType, float]
    copy_gbps: float

    def peak_gflops(self, dtype: DType) -> float:
        """GFLOP/s within reach of a kernel on ``dtype`` inputs.

        A kernel may widen bf16 to fp32 and multiply there, as torch's does on a CPU without bf16 units, so the ceiling
        of bf16 is the faster of the two products.
        """
        return max(self.product_gflops["fp32"], self.product_gflops[dtype])

    def raised_to(self, other: Roofline) -> Roofline:
        """The higher of the two ceilings in everything."""
        products = {dtype: max(gflops, other.product_gflops[dtype]) for dtype, gflops in self.product_gflops.items()}
        return Roofline(products, max(self.copy_gbps, other.copy_gbps))


def highest(rows: Iterable[dict[str, Any]]) -> Roofline | None:
    """The highest ceilings that the rows of a run hold: what its speeds are shares of. ``None`` if they hold none."""
    found = [Roofline(row["product_gflops"], row["copy_gbps"]) for row in rows if row["kind"] == "roofline"]
    return reduce(Roofline.raised_to, found) if found else None


def measure(device: torch.device) -> Roofline:
    """Takes about a second. Each figure is the best of several calls: a ceiling, not a typical speed."""
    return Roofline({name: _product_gflops(dtype, device) for name, dtype in DTYPES.items()}, _copy_gbps(device))


def _product_gflops(dtype: torch.dtype, device: torch.device) -> float:
    best = 0.0
    for side in _SIDES[device.type]:
        a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
        seconds = _fastest(lambda _, a=a, b=b: a @ b, device)
        best = max(best, 2 * side**3 / seconds / 1e9)
        if 8 * seconds > _BUDGET_S:  # one product of the next size, 8 times the work, would spend it all
            break
    return best


def _copy_gbps(device: torch.device) -> float:
    source = torch.zeros(max(4 * timing.last_level_cache(device), 2**27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _fastest(lambda _: target.copy_(source), device) / 1e9


def _fastest(call: Callable[[None], object], device: torch.device) -> float:
    """Seconds of the fastest call."""
    timings = timing.interleave({"call": timing.Variant(call)}, [None], device=device, budget_s=_BUDGET_S)
    return timings["call"].min_ms / 1e3
