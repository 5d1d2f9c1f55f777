"""torch's own attention: scaled_dot_product_attention by backend, the formula compiled, FlexAttention, and the
variable-length kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers.base import Peer, needs_gpu
from benchmarks.peers.layouts import EAGER, Pack, heads_first, several_lengths
from benchmarks.shapes import Layout

_RECOMPILE_LIMIT = 64  # a compiled contender meets more shapes, dtypes and modes than torch's default of 8

# By whichever of its backends the context allows.
SDPA = heads_first(F.scaled_dot_product_attention)


def sdpa(layout: Layout, pack: Pack | None) -> list[Peer]:
    """``scaled_dot_product_attention``, once for each of its backends."""
    # ERROR is no backend, and OVERRIDEABLE belongs to devices that live outside torch.
    left_out = (SDPBackend.ERROR, SDPBackend.OVERRIDEABLE)
    backends = {name: b for name, b in SDPBackend.__members__.items() if b not in left_out}
    names = [f"torch:{name.removesuffix('_ATTENTION').lower()}" for name in backends]
    attend = SDPA.attend(layout, pack)
    return [Peer(n, attend, context=partial(sdpa_kernel, b)) for n, b in zip(names, backends.values(), strict=True)]


def compiled() -> Peer:
    """The formula on packed qkv by ``torch.compile``, anew for each shape at the first call."""
    return Peer("torch:compile", _compiled, context=recompiles)


def flex(layout: Layout, pack: Pack | None) -> Peer:
    """FlexAttention, compiled for each shape at the first call; uncompiled it holds N x N."""
    return Peer("torch:flex", heads_first(_flex).attend(layout, pack), context=recompiles)


def varlen(layout: Layout, pack: Pack | None) -> Peer:
    """``torch.nn.attention.varlen.varlen_attn``, for images of several lengths."""
    if layout != "multicrop":
        reason = "is for images of several lengths; with one length it is the kernel of torch:flash"
        return Peer("torch:varlen", _varlen, refuses=lambda *inputs: reason)
    return Peer("torch:varlen", partial(several_lengths(_varlen), pack=pack), refuses=needs_gpu)


def _compiled(qkv: Tensor) -> Tensor:
    return _compiled_formula()(qkv)


@cache
def _compiled_formula() -> Callable[..., Tensor]:
    return torch.compile(EAGER.packed, dynamic=False, fullgraph=True)


def _flex(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return _compiled_flex()(query, key, value)


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Each shape on its own, as a ViT's never changes; whole or not at all, or parts would run uncompiled in silence.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def recompiles() -> AbstractContextManager[object]:
    """Within, a compiled contender may meet every case of a run."""
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT)


def _varlen(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    bounds, longest = pack.cu_seqlens, pack.max_seqlen
    return varlen_attn(query, key, value, bounds, bounds, longest, longest)
