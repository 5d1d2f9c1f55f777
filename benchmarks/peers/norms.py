"""The contenders of the race of residual norms: our backends, torch eager and compiled, and xformers.

All take x, the branch, layer scale, weight and, of a LayerNorm, bias; and give the residual, its norm and the length of
each of its tokens. What a kernel needs around it counts as its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.peers import pytorch
from benchmarks.peers.base import Peer, needs_gpu
from vitreg_kernels import functional
from vitreg_kernels.ops.residual_norm.backends import BACKENDS

EPS = 1e-6
OPAQUE = tuple(f"vitreg:{backend.name}" for backend in BACKENDS if backend.opaque)  # our own kernels

Three = tuple[Tensor, Tensor, Tensor]


def peers(*, rms: bool) -> list[Peer]:
    """Every backend of ours and every library there is an adapter for, usable or not; of LayerNorm or of RMSNorm."""
    ours = [Peer(f"vitreg:{b.name}", partial(ours_by, b.name, rms=rms), ours=True) for b in BACKENDS]
    compiled = Peer("torch:compile", partial(_compiled, rms=rms), context=pytorch.recompiles)
    xformers = Peer("xformers", _xformers, refuses=needs_gpu)
    if not rms:
        xformers = xformers.unless(lambda *inputs: "has rms_norm_add, and no LayerNorm")
    return [*ours, Peer("eager", partial(eager, rms=rms)), compiled, xformers]


def ours_by(
    backend: str,
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    rms: bool,
) -> Three:
    """By one of our backends; ``"reference"`` is what every contender is held against."""
    return functional.residual_layer_norm(
        x, branch, layer_scale=layer_scale, weight=weight, bias=bias, eps=EPS, rms=rms, backend=backend
    )


def eager(
    x: Tensor, branch: Tensor, layer_scale: Tensor, weight: Tensor, bias: Tensor | None = None, *, rms: bool
) -> Three:
    """As it is written in a model."""
    residual = x + layer_scale * branch
    if rms:
        normalized = F.rms_norm(residual, weight.shape, weight, EPS)
    else:
        normalized = F.layer_norm(residual, weight.shape, weight, bias, EPS)
    return residual, normalized, _lengths(residual)


def _lengths(residual: Tensor) -> Tensor:
    dtype = torch.promote_types(residual.dtype, torch.float32)
    return torch.linalg.vector_norm(residual.detach(), dim=-1, dtype=dtype)


def _compiled(*inputs: Tensor, rms: bool) -> Three:
    return _compiler()(*inputs, rms=rms)


@cache
def _compiler() -> Callable[..., Three]:
    # Each shape on its own, as a ViT's never changes; whole or not at all, or parts would run uncompiled in silence.
    return torch.compile(eager, dynamic=False, fullgraph=True)


def _xformers(x: Tensor, branch: Tensor, layer_scale: Tensor, weight: Tensor) -> Three:
    from xformers.ops.rmsnorm import rms_norm_add

    residual = layer_scale * branch
    normalized = rms_norm_add(residual, x, weight, EPS)  # writes the sum in place of its first argument
    return residual, normalized, _lengths(residual)
