"""Eager overhead of the public functions over the raw backend call, on tensors too small to hide it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import peers
from benchmarks.results import Row, Writer
from vitreg_kernels import functional
from vitreg_kernels.measure import timing

GOALS_US = {False: 25.0, True: 35.0}  # by whether gradients are wanted
SHAPE = (1, 1, 16, 16)
_REPETITIONS = 20  # calls a sample; one is too short for the clock
_BUDGET_S = 1.0


class Call(NamedTuple):
    """A public function, the raw call that does the same job, and tensors that both take."""

    ours: Callable[..., Tensor]
    raw: Callable[..., Tensor]
    tensors: Callable[[bool], list[Tensor]]


def run(writer: Writer) -> Iterator[Row]:
    """Measures each function on the CPU, without and with gradients; writes and yields one row each."""
    for name in CALLS:
        for requires_grad in (False, True):
            measured = writer.find(kind="overhead", call=name, requires_grad=requires_grad)
            yield from measured or writer.extend([measure(name, requires_grad)])


def measure(name: str, requires_grad: bool) -> Row:
    """One row, without its ``machine``."""
    call = CALLS[name]
    timings = timing.interleave(
        {"raw": timing.Variant(_repeated(call.raw)), "ours": timing.Variant(_repeated(call.ours))},
        [call.tensors(requires_grad)],
        device=torch.device("cpu"),
        budget_s=_BUDGET_S,
    )
    raw_us, ours_us = (1e3 * timings[who].median_ms / _REPETITIONS for who in ("raw", "ours"))
    return {
        "kind": "overhead",
        "call": name,
        "requires_grad": requires_grad,
        "shape": list(SHAPE),
        "raw_us": raw_us,
        "ours_us": ours_us,
        "overhead_us": ours_us - raw_us,
        "goal_us": GOALS_US[requires_grad],
        "samples": timings["ours"].samples,
    }


def query_key_value(requires_grad: bool) -> list[Tensor]:
    """Query, key and value ``[B, H, N, D]`` in the layout they have in a model: heads of a ``[B, N, C]`` projection."""
    batch, heads, tokens, head_dim = SHAPE
    return [x.transpose(1, 2).requires_grad_(requires_grad) for x in torch.randn(3, batch, tokens, heads, head_dim)]


def packed(requires_grad: bool) -> list[Tensor]:
    """One packed projection ``[B, N, 3, H, D]``, as the module hands it on."""
    batch, heads, tokens, head_dim = SHAPE
    return [torch.randn(batch, tokens, 3, heads, head_dim, requires_grad=requires_grad)]


CALLS = {
    "register_attention": Call(functional.register_attention, F.scaled_dot_product_attention, query_key_value),
    "register_attention_qkv": Call(functional.register_attention_qkv, peers.sdpa, packed),
}


def _repeated(attend: Callable[..., Tensor]) -> Callable[[list[Tensor]], None]:
    def call(tensors: list[Tensor]) -> None:
        for _ in range(_REPETITIONS):
            attend(*tensors)

    return call
