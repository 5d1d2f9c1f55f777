"""The ceilings of this machine, measured in the run whose figures are held against them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, Literal, NamedTuple

import torch

from benchmarks.shapes import DTYPES, DType
from vitreg_kernels.measure import timing

# Sides of square matrices. Small ones do not fill a GPU; bf16 on a CPU without bf16 units never gets past the first.
_SIDES = {"cpu": (256, 512, 1024, 2048), "cuda": (2048, 4096, 8192)}
_BUDGET_S = 0.15  # each product, the loop on registers of each dtype, and the copy


class Roofline(NamedTuple):
    """Ceilings of one device.

    Attributes:
        product_gflops: GFLOP/s of the fastest square matrix product in each dtype.
        copy_gbps: GB/s, read and written, of a copy that fits no cache.
        register_gflops: on a CPU, GFLOP/s of the instructions that multiply each dtype, with nothing else to do and all
            in registers; ``None`` without the native library, which has that loop.
        threads: of torch's on a CPU, with which they were measured; ``None`` on a GPU, or of several.
    """

    product_gflops: dict[DType, float]
    copy_gbps: float
    register_gflops: dict[DType, float] | None = None
    threads: int | None = None

    def peak_gflops(self, dtype: DType) -> float:
        """GFLOP/s within reach of a kernel on ``dtype`` inputs.

        A kernel may widen bf16 to fp32 and multiply there, as torch's does on a CPU without bf16 units, so the ceiling
        of bf16 is the faster of the two dtypes'. No matrix product of a library's need be as fast as the CPU.
        """
        found = (self.product_gflops, self.register_gflops or self.product_gflops)
        return max(gflops[name] for gflops in found for name in ("fp32", dtype))

    def peak_source(self, dtype: DType) -> Literal["registers", "product"]:
        """Whose that figure is."""
        return "registers" if self.peak_gflops(dtype) in (self.register_gflops or {}).values() else "product"

    def raised_to(self, other: Roofline) -> Roofline:
        """The higher of the two ceilings in everything."""
        return Roofline(
            _highest(self.product_gflops, other.product_gflops),
            max(self.copy_gbps, other.copy_gbps),
            _highest(self.register_gflops or {}, other.register_gflops or {}) or None,
            self.threads if self.threads == other.threads else None,
        )


def highest(rows: Iterable[dict[str, Any]], threads: int | None = None) -> Roofline | None:
    """The highest ceilings that the rows of a run hold: what its speeds are shares of. ``None`` if they hold none.

    With ``threads`` they are those of so many threads, else of any number.
    """
    found = [
        Roofline(**{name: row[name] for name in Roofline._fields})
        for row in rows
        if row["kind"] == "roofline" and threads in (None, row["threads"])
    ]
    return reduce(Roofline.raised_to, found) if found else None


def measure(device: torch.device) -> Roofline:
    """Takes about a second, on as many threads as torch has. A ceiling, not a typical speed: the best of several calls.

    The loop on registers is as fast in every call, but when another program runs, which its median leaves out.
    """
    return Roofline(
        {name: _product_gflops(dtype, device) for name, dtype in DTYPES.items()},
        _copy_gbps(device),
        _register_gflops(device),
        torch.get_num_threads() if device.type == "cpu" else None,
    )


def _highest(a: dict[DType, float], b: dict[DType, float]) -> dict[DType, float]:
    return {dtype: max(found[dtype] for found in (a, b) if dtype in found) for dtype in a | b}


def _register_gflops(device: torch.device) -> dict[DType, float] | None:
    if device.type != "cpu" or not hasattr(torch.ops.vitreg_cpu, "peak_gflops"):
        return None
    return {name: torch.ops.vitreg_cpu.peak_gflops(dtype, _BUDGET_S) for name, dtype in DTYPES.items()}


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
