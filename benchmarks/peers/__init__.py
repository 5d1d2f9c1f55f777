"""The contenders of the attention races: our backends, and what they are measured against, one library a file.

Not here: which shapes are raced (``benchmarks.shapes``), or the race (``benchmarks.contest``).
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.peers import flash_attention, onnxruntime, pytorch, vitreg, xformers
from benchmarks.peers.base import Attend, Peer, Tensors, attempt
from benchmarks.peers.layouts import EAGER, Pack, Ways, pack_of
from benchmarks.shapes import Layout, Size
from vitreg_kernels._triton import mode

__all__ = [
    "EAGER",
    "Attend",
    "Pack",
    "Peer",
    "Tensors",
    "Ways",
    "attempt",
    "eager",
    "everyone",
    "interpreter_reason",
    "pack_of",
    "peers",
    "sdpa",
    "vitreg",
]

eager, sdpa = EAGER.packed, pytorch.SDPA.packed


def peers(size: Size) -> list[Peer]:
    """The contenders of ``python -m benchmarks``, on packed qkv, usable or not; the formula is the last."""
    packed: tuple[Layout, None] = ("packed", None)
    ours = [p.unless(interpreter_reason) if p.name == "vitreg:triton" else p for p in vitreg.peers(*packed)]
    flex = pytorch.flex(*packed).unless(partial(_flex_reason, size))
    torchs = [*pytorch.sdpa(*packed), pytorch.compiled(), flex]
    return [*ours, *torchs, onnxruntime.peer(), xformers.peer(*packed), Peer("eager", eager)]


def everyone(layout: Layout, pack: Pack | None) -> list[Peer]:
    """Every backend of ours and every library there is an adapter for, usable or not."""
    torchs = [*pytorch.sdpa(layout, pack), pytorch.flex(layout, pack), pytorch.varlen(layout, pack)]
    return [*vitreg.peers(layout, pack), *torchs, xformers.peer(layout, pack), *flash_attention.peers(layout, pack)]


def interpreter_reason(*inputs: Tensor) -> str | None:
    """Why our own kernels are not raced in this process, if they are not."""
    if mode.INTERPRETING:
        return "runs under Triton's interpreter here, whose speed says nothing about a GPU's"
    return None


def _flex_reason(size: Size, qkv: Tensor) -> str | None:
    if qkv.is_cuda:
        return None
    if size == "quick":
        return "takes seconds to compile for every shape, too slow for the quick size on a CPU; the full size races it"
    # torch's own words for it get lost in the compiler.
    return "has no backward on a CPU" if qkv.requires_grad else None
