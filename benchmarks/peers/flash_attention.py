"""FlashAttention 2, 3 and 4, where they are installed: three packages with nearly one interface.

All take ``[B, N, H, D]`` and, of several lengths, ``[T, H, D]`` with ``cu_seqlens``. 2 has a kernel on packed qkv for
both, 3 for one length, 4 for none. Older builds of 3 return the log-sum-exp beside the output, and 4 always does.
"""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from torch import Tensor

from benchmarks.peers.base import Peer
from benchmarks.peers.layouts import Pack, Ways, tokens_first
from benchmarks.shapes import Layout


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
    def call(function: str, *arguments: Any, **options: Any) -> Tensor:
        # Imported by each call, which costs nothing from the second on: what is missing says so when it is asked.
        result = getattr(importlib.import_module(release.module), function)(*arguments, **options)
        return result[0] if isinstance(result, tuple) else result

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return call("flash_attn_func", query, key, value)

    def varlen(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
        # By name: their places differ between the releases.
        bounds = {"cu_seqlens_q": pack.cu_seqlens, "cu_seqlens_k": pack.cu_seqlens}
        longest = {"max_seqlen_q": pack.max_seqlen, "max_seqlen_k": pack.max_seqlen}
        return call("flash_attn_varlen_func", query, key, value, **bounds, **longest)

    def packed(qkv: Tensor) -> Tensor:
        return call("flash_attn_qkvpacked_func", qkv).flatten(2)

    def multicrop(qkv: Tensor, pack: Pack) -> Tensor:
        output = call("flash_attn_varlen_qkvpacked_func", qkv[0], pack.cu_seqlens, pack.max_seqlen)
        return output.flatten(1)[None]

    ways = tokens_first(attend, varlen)
    if release.packed:
        ways = ways._replace(packed=packed)
    if release.packed_varlen:
        ways = ways._replace(multicrop=multicrop)
    return ways
