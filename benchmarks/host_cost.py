"""What a launch costs the host: calls of the Triton backend with a driver that launches nothing.

Times are microseconds a call over an op that does nothing but allocate the same results, so they are what this library
and triton's Python add. The launch by the CUDA driver is not in them. Needs no GPU, but triton.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, TypeVar
from zlib import crc32

import torch
from torch import Tensor
from torch.nn import functional as F
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

import vitreg_kernels  # noqa: F401  (registers the ops)
from benchmarks.results import Row, Writer
from vitreg_kernels.ops.attention.types import empty_output

SHAPE = (1, 1, 16, 16)  # [B, H, N, D], so small that a CPU's scaled_dot_product_attention is host cost too
GOALS_US = {"forward": 30.0, "backward": 45.0}
_SAMPLES = 2000

Driver = TypeVar("Driver", bound="NoGPU")

_LIBRARY = torch.library.Library("vitreg_host_cost", "DEF")
_LIBRARY.define("forward(Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor[])")
_LIBRARY.define("backward(Tensor grad_output, Tensor query, Tensor key, Tensor value) -> (Tensor, Tensor, Tensor)")


def _empty_forward(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, list[Tensor]]:
    return empty_output(query), [query.new_empty(query.shape[:3], dtype=torch.float32)]


def _empty_backward(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return empty_output(query), empty_output(key), empty_output(value)


_LIBRARY.impl("forward", _empty_forward, "CompositeExplicitAutograd")
_LIBRARY.impl("backward", _empty_backward, "CompositeExplicitAutograd")


class NoGPU:
    """Stands in for triton's driver of an sm_90 GPU: kernels are compiled, and launches told to ``launched``.

    Attributes:
        launched: called with the kernel's name and a digest of its code, and grid, stream, hooks and arguments.
        stream: the current one.
    """

    def __init__(self, launched: Callable[..., None] = lambda *launch: None) -> None:
        self.launched = launched
        self.stream = 0
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            load_binary=lambda name, binary, shared, device: (None, f"{name} {crc32(binary):x}", 0, 0, 1024),
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """What triton launches a compiled kernel with. It outlives this driver, so it asks for the active one."""

        def launch(*given: Any) -> None:
            *grid, stream, kernel, _, _, enter_hook, exit_hook = given[:9]
            driver.active.launched(kernel, tuple(grid), stream, (enter_hook, exit_hook), given[9:])

        return launch

    def get_current_device(self) -> int:
        return 127  # no GPU that is there, so that none is ever given a kernel that was loaded here

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@contextmanager
def active(fake: Driver) -> Iterator[Driver]:
    """Triton launches with this driver meanwhile."""
    before = driver._active
    driver.set_active(fake)
    try:
        yield fake
    finally:
        driver._active = before


def measure(samples: int, fake: NoGPU | None = None) -> dict[str, float]:
    """Microseconds a call, the median of interleaved calls; of ours what they take over the op that only allocates."""
    query, key, value, grad_output = torch.randn(4, *SHAPE, dtype=torch.bfloat16)
    call = (None, None, None, False, None, 0, 1, 0.25)
    ops, empty = torch.ops.vitreg, torch.ops.vitreg_host_cost
    calls = {
        "forward": lambda: ops.attention_forward(query, key, value, *call, "lse", "triton"),
        "backward": lambda: ops.attention_backward(grad_output, query, key, value, *call, output, lse, "triton"),
        "empty forward": lambda: empty.forward(query, key, value),
        "empty backward": lambda: empty.backward(grad_output, query, key, value),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(query, key, value),
    }
    with torch.no_grad(), active(fake or NoGPU()):
        output, (lse,) = calls["forward"]()
        taken = [{name: _microseconds(timed) for name, timed in calls.items()} for _ in range(samples)]
    median = {name: statistics.median(sample[name] for sample in taken) for name in calls}
    return {
        "forward": median["forward"] - median["empty forward"],
        "backward": median["backward"] - median["empty backward"],
        "scaled_dot_product_attention": median["scaled_dot_product_attention"],
    }


def _microseconds(call: Callable[[], object]) -> float:
    start = time.perf_counter_ns()
    call()
    return (time.perf_counter_ns() - start) / 1e3


def run(writer: Writer) -> Iterator[Row]:
    """Measures the forward and the backward; writes and yields a row each."""
    done = writer.find(kind="launch_cost")
    yield from done or writer.extend(_rows())


def _rows() -> list[Row]:
    us = measure(_SAMPLES)
    return [
        {
            "kind": "launch_cost",
            "call": call,
            "shape": list(SHAPE),
            "ours_us": us[call],
            "sdpa_us": us["scaled_dot_product_attention"],
            "goal_us": goal,
            "samples": _SAMPLES,
        }
        for call, goal in GOALS_US.items()
    ]
