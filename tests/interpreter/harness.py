"""Runs the kernels of a call on buffers with NaN guard bands and holds every result against the fp64 reference.

The interpreter reads and writes out of bounds without a word. So every tensor here is a view into a larger one full of
NaN: a read beyond the view poisons the result, a write beyond it leaves a number where NaN was, and an element that no
kernel wrote is still NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from cases import oracle as oracle_of
from torch import Tensor

from vitreg_kernels.measure.cases.attention import GRADIENTS
from vitreg_kernels.ops.attention.backends import triton as backend
from vitreg_kernels.ops.attention.backends.triton.backward_kernels import backward_launches
from vitreg_kernels.ops.attention.backends.triton.plan import ForwardBuffers, launch_plan
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES, AttentionInputs, Rope

BAND = 512


class Guarded(NamedTuple):
    """A tensor inside a larger one full of NaN."""

    view: Tensor
    memory: Tensor

    def check_written(self, name: str) -> None:
        """Every element of the view was written, nothing else was."""
        assert not self.view.isnan().any(), f"{name}: NaN, or an element that no kernel wrote"
        inside = torch.zeros_like(self.memory, dtype=torch.bool)
        inside.as_strided(self.view.shape, self.view.stride(), self.view.storage_offset()).fill_(True)
        assert self.memory[~inside].isnan().all(), f"{name}: written outside its bounds"


def guarded(shape: Sequence[int], dtype: torch.dtype, strides: Sequence[int] | None = None) -> Guarded:
    strides = torch.empty(shape, device="meta").stride() if strides is None else strides
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    memory = torch.full((extent + 2 * BAND,), math.nan, dtype=dtype)
    return Guarded(memory.as_strided(shape, strides, BAND), memory)


def guarded_like(values: Tensor) -> Tensor:
    """The same values in the same strides between guard bands."""
    copy = guarded(values.shape, values.dtype, values.stride()).view
    copy.copy_(values)
    return copy


def random_qkv(batch: int, heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as views of one guarded packed ``[B, N, 3, H, D]``."""
    qkv = guarded_like(torch.randn(batch, tokens, 3, heads, head_dim).to(dtype))
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def random_rope(*shape: int, interleaved: bool) -> Rope:
    """A rotation whose angle differs even between the two members of a pair: the two must not be mixed up."""
    angle = torch.rand(*shape) * 2 * math.pi
    return Rope(guarded_like(angle.cos()), guarded_like(angle.sin()), interleaved)


def packed_bounds(lengths: Sequence[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def run(inputs: AttentionInputs, grad_output: Tensor, arch: int) -> dict[str, Tensor]:
    """Output, gradients and all statistics, from guarded buffers whose bands are checked."""
    query = inputs.query
    batch, heads, tokens, head_dim = query.shape
    prefix = inputs.num_prefix_tokens
    plan = launch_plan(inputs, "forward", arch)

    gradient = guarded((batch, tokens, 3, heads, head_dim), query.dtype)
    written = {
        "output": guarded((batch, tokens, heads, head_dim), query.dtype),
        "lse": guarded((batch, heads, tokens), torch.float32),
        "normalizer": guarded((batch, heads, tokens), torch.float32),
        "normalization": guarded((batch, heads, tokens), torch.float32),
        "square_norm": guarded((batch, heads, tokens), torch.float32),
        "received_attention": guarded((batch, heads, tokens), torch.float32),
        "prefix_attention": guarded((batch, heads, prefix, tokens), torch.float32),
        "delta": guarded((batch, heads, tokens), torch.float32),
        "gradient": gradient,
    }
    max_logit = guarded((plan.images, heads, plan.num_tiles), torch.float32)
    max_logit.view.fill_(-math.inf)
    written["max_logit"] = max_logit

    output = written["output"].view.transpose(1, 2)
    lse, delta = written["lse"].view, written["delta"].view
    normalizer, normalization = written["normalizer"].view, written["normalization"].view
    gradients = gradient.view.permute(2, 0, 3, 1, 4).unbind(0)
    statistics = ("max_logit", "square_norm", "received_attention", "prefix_attention")
    buffers = ForwardBuffers(output, lse, normalizer, *(written[name].view for name in statistics))
    launches = [
        *backend._forward_launches(inputs, buffers, arch),
        *backward_launches(inputs, output, lse, delta, normalization, grad_output, *gradients, arch),
    ]
    for launch in launches:
        launch.run()
    for name, buffer in written.items():
        buffer.check_written(name)
    return {
        "output": output,
        **dict(zip(GRADIENTS, gradients, strict=True)),
        "lse": lse,
        "prefix_attention": written["prefix_attention"].view,
        "received_attention": written["received_attention"].view,
        "max_logit": max_logit.view.amax(-1),
        "token_norms": written["square_norm"].view.sum(1).sqrt(),
    }


def check(inputs: AttentionInputs, *, grad_output: Tensor | None = None, arch: int = 80) -> dict[str, Tensor]:
    """Run a call forward and backward and hold everything it gives to the accuracy rule."""
    if grad_output is None:
        grad_output = guarded_like(torch.randn(inputs.query.shape).to(inputs.query.dtype))
    qkv = torch.stack((inputs.query, inputs.key, inputs.value), 2).transpose(1, 3)
    options = {
        name: getattr(inputs, name) for name in ("scale", "num_prefix_tokens", "attn_mask", "rope", "cu_seqlens")
    }
    oracle = oracle_of(qkv, grad_output=grad_output, outputs=OUTPUT_NAMES, **options)
    actual = run(inputs, grad_output, arch)
    failures = [f"{name}: {error}" for name, error in oracle.compare(actual).items() if not error.passed]
    assert not failures, "\n".join(failures)
    return actual


def call(
    tokens: int,
    prefix: int = 0,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    batch: int = 1,
    heads: int = 1,
    **changes: object,
) -> AttentionInputs:
    """A call on random packed qkv."""
    query, key, value = random_qkv(batch, heads, tokens, head_dim, dtype)
    inputs = AttentionInputs(query, key, value, scale=head_dim**-0.5, num_prefix_tokens=prefix)
    return inputs._replace(**changes)


def with_masked_keys_of(inputs: AttentionInputs, held: float) -> AttentionInputs:
    """The call, its masked keys and their values all of one number."""
    hidden = ~inputs.attn_mask.transpose(-2, -1)
    for x in (inputs.key, inputs.value):
        x.masked_fill_(hidden, held)
    return inputs
