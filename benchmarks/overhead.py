"""Eager overhead of the public function over the raw backend call, on tensors too small to hide it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import timing
from benchmarks.results import Row, Writer
from vitreg_kernels import functional

GOAL_US = 25.0
SHAPE = (1, 1, 16, 16)
CALLS: dict[str, Callable[..., Tensor]] = {
    "raw": F.scaled_dot_product_attention,
    "ours": functional.register_attention,
}
_REPETITIONS = 20  # calls a sample; one is too short for the clock
_BUDGET_S = 1.0


def run(writer: Writer) -> Iterator[Row]:
    """Measures on the CPU, without and with gradients; writes and yields one row each."""
    for requires_grad in (False, True):
        if writer.find(kind="overhead", requires_grad=requires_grad):
            yield from writer.find(kind="overhead", requires_grad=requires_grad)
        else:
            yield from writer.extend([measure(requires_grad)])


def measure(requires_grad: bool) -> Row:
    """One row, without its ``machine``."""
    timings = timing.interleave(
        {name: timing.Variant(_repeated(attend)) for name, attend in CALLS.items()},
        [tiny_tensors(requires_grad)],
        device=torch.device("cpu"),
        budget_s=_BUDGET_S,
    )
    raw_us, ours_us = (1e3 * timings[name].median_ms / _REPETITIONS for name in ("raw", "ours"))
    return {
        "kind": "overhead",
        "requires_grad": requires_grad,
        "shape": list(SHAPE),
        "raw_us": raw_us,
        "ours_us": ours_us,
        "overhead_us": ours_us - raw_us,
        "goal_us": GOAL_US,
        "samples": timings["ours"].samples,
    }


def tiny_tensors(requires_grad: bool) -> list[Tensor]:
    """Query, key and value ``[B, H, N, D]`` in the layout they have in a model: heads of a ``[B, N, C]`` projection."""
    batch, heads, tokens, head_dim = SHAPE
    return [x.transpose(1, 2).requires_grad_(requires_grad) for x in torch.randn(3, batch, tokens, heads, head_dim)]


def _repeated(attend: Callable[..., Tensor]) -> Callable[[list[Tensor]], None]:
    def call(query_key_value: list[Tensor]) -> None:
        for _ in range(_REPETITIONS):
            attend(*query_key_value)

    return call
