"""Sums and products are fused whatever triton's default is: in what is launched, replayed and compiled offline."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

import triton.language as tl  # noqa: E402
from triton import knobs  # noqa: E402

from benchmarks.host_cost import NoGPU, active  # noqa: E402
from vitreg_kernels._triton import replay  # noqa: E402
from vitreg_kernels._triton.launch import Launch  # noqa: E402
from vitreg_kernels._triton.offline import compilation, compile_launch  # noqa: E402


@triton.jit
def _multiply_and_add_kernel(x, out, LENGTH: tl.constexpr):
    column = tl.arange(0, LENGTH)
    values = tl.load(x + column)
    tl.store(out + column, values * values + values)


def multiply_and_add(x: Tensor, out: Tensor) -> list[Launch]:
    return [Launch(_multiply_and_add_kernel, (1,), {"x": x, "out": out}, {"LENGTH": 128}, 1, 1)]


@pytest.fixture(autouse=True)
def _off_by_default() -> Iterator[None]:
    with knobs.language.scope():
        knobs.language.default_fp_fusion = False
        yield


def test_compiled_offline() -> None:
    (launch,) = multiply_and_add(*torch.empty(2, 128, device="meta"))
    used = compile_launch(launch, 90)
    assert (used.instructions["FFMA"], used.instructions["FMUL"]) == (4, 0)  # of 128 numbers on 32 threads


def test_launched_and_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "_known", {})
    kernels = []
    with active(NoGPU(lambda kernel, *_: kernels.append(kernel))):
        (launch,) = multiply_and_add(*torch.empty(2, 128))
        compiled = launch.run()
        for _ in range(2):
            replay.run_launches(multiply_and_add, *torch.empty(2, 128).unbind())
        assert compiled.metadata.enable_fp_fusion
        assert compiled.hash == compilation(launch, 90).key
    assert len(kernels) == 3
    assert len(set(kernels)) == 1
