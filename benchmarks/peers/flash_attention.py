"""FlashAttention 2, 3 and 4, where they are installed: three packages with nearly one interface.

All take ``[B, N, H, D]`` and, of several lengths, ``[T, H, D]`` with ``cu_seqlens``. 2 has a kernel on packed qkv for
both, 3 for one length, 4 for none. The backend of ours that runs them knows how they are called.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from torch import Tensor

from benchmarks.peers.base import Peer
from benchmarks.peers.layouts import Pack, Ways, tokens_first
from benchmarks.shapes import Layout
from vitreg_kernels.ops.attention.backends import flash_attn


class _Release(NamedTuple):
    name: str
    module: str
    packed: bool  # has a kernel on packed qkv
    packed_varlen: bool


RELEASES = (
    _Release("flash-attn:2", "flash_attn", packed=True, packed_varlen=True),
    _Release("flash-attn:3", "flash_attn_interface", packed=True, packed_varlen=False),
    _Release("flash-attn:4", "flash_attn.cute", packed=False, packed_varlen=False),
)


def peers(layout: Layout, pack: Pack | None) -> list[Peer]:
    """One for each release, installed or not."""
    return [Peer(release.name, _ways(release).attend(layout, pack)) for release in RELEASES]


def _ways(release: _Release) -> Ways:
    attend = partial(flash_attn.attend, release.module)

    def varlen(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
        return flash_attn.attend_packed(release.module, query, key, value, pack.cu_seqlens, pack.max_seqlen)

    def packed(qkv: Tensor) -> Tensor:
        return flash_attn.call(release.module, "flash_attn_qkvpacked_func", qkv).flatten(2)

    def multicrop(qkv: Tensor, pack: Pack) -> Tensor:
        function = "flash_attn_varlen_qkvpacked_func"
        return flash_attn.call(release.module, function, qkv[0], pack.cu_seqlens, pack.max_seqlen).flatten(1)[None]

    ways = tokens_first(attend, varlen)
    if release.packed:
        ways = ways._replace(packed=packed)
    if release.packed_varlen:
        ways = ways._replace(multicrop=multicrop)
    return ways
