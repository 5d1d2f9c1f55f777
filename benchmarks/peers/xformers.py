"""xformers' memory-efficient attention, called directly: the same kernel as ``vitreg:xformers`` without us."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.base import Peer, needs_gpu
from benchmarks.peers.layouts import Pack, tokens_first
from benchmarks.shapes import Layout


def peer(layout: Layout, pack: Pack | None) -> Peer:
    """The one contender."""
    return Peer("xformers", WAYS.attend(layout, pack), refuses=needs_gpu)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(query, key, value)


def _varlen(query: Tensor, key: Tensor, value: Tensor, pack: Pack) -> Tensor:
    from xformers.ops import memory_efficient_attention

    mask = _block_diagonal(tuple(pack.lengths), query.device)
    return memory_efficient_attention(query[None], key[None], value[None], attn_bias=mask)[0]


@lru_cache(maxsize=8)  # as training loops keep it: a mask is made on the host and copied to the GPU
def _block_diagonal(lengths: tuple[int, ...], device: torch.device) -> Any:
    from xformers.ops.fmha import BlockDiagonalMask

    return BlockDiagonalMask.from_seqlens(lengths, device=device)


WAYS = tokens_first(_attend, _varlen)
