"""A machine, ceilings, rows and contenders that cost nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks import attention
from benchmarks.machine import Machine
from benchmarks.peers import Peer, eager
from benchmarks.results import Row
from benchmarks.roofline import Roofline
from benchmarks.shapes import Case
from vitreg_kernels import UnsupportedError
from vitreg_kernels.measure import timing


@pytest.fixture
def machine() -> Machine:
    return Machine(
        device="Some CPU (2 GHz)",
        processor="Some CPU (2 GHz)",
        cores=2,
        threads=2,
        capability="AVX2",
        system="Linux x86_64",
        python="3.11.7",
        packages={"vitreg_kernels": "0.1.0", "torch": "2.13.0"},
        commit="0123456789abcdef",
        dirty=False,
        sources="0123456789abcdef",
    )


@pytest.fixture
def ceilings() -> Roofline:
    return Roofline({"fp32": 100.0, "bf16": 10.0}, 20.0)


@pytest.fixture
def contenders(clock: Any) -> list[Peer]:
    def unsupported(qkv: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"no kernel for this\nof shape {tuple(qkv.shape)}. Try another")

    def decline(qkv: torch.Tensor) -> torch.Tensor:
        raise UnsupportedError("not built here")

    def crash(qkv: torch.Tensor) -> torch.Tensor:
        raise IndexError("out of its own bounds")

    def slow(qkv: torch.Tensor) -> torch.Tensor:
        clock.sleep(0.01)
        return eager(qkv)

    return [
        Peer("vitreg:ours", eager, ours=True),
        Peer("vitreg:knows", eager, ours=True, refuses=lambda qkv: "runs on the moon only"),
        Peer("vitreg:wrong", lambda qkv: 1.01 * eager(qkv), ours=True),
        Peer("vitreg:crashes", crash, ours=True),
        Peer("vitreg:declines", decline, ours=True),
        Peer("other:right", slow),
        Peer("other:raises", unsupported),
    ]


@pytest.fixture
def race(
    machine: Machine, ceilings: Roofline, contenders: list[Peer], monkeypatch: pytest.MonkeyPatch
) -> Callable[[Case], list[Row]]:
    """Races the contenders for the shortest time; rows as a result file holds them."""
    monkeypatch.setattr(
        timing, "last_level_cache", lambda device: 2**12
    )  # or a tiny input would be copied 60 000 times

    def run(case: Case) -> list[Row]:
        rows = attention.race(case, contenders, ceilings, torch.device("cpu"), budget_s=0.0)
        return [{**row, "machine": machine} for row in rows]

    return run


@pytest.fixture(autouse=True)
def _no_native_kernels(change_backends):
    """What these tests expect of the backends of a CPU may not hang on whether there was a compiler."""
    change_backends("cpu", faults=lambda: ["there are no native kernels: away for this test"])
