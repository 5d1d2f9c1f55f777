"""Our own backends, each by its name."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from benchmarks.peers.base import Peer
from benchmarks.peers.layouts import Pack, Ways, split
from benchmarks.shapes import NUM_PREFIX_TOKENS, Layout
from vitreg_kernels import Explanation, explain, functional
from vitreg_kernels.ops.attention.backends import BACKENDS

OPAQUE = tuple(f"vitreg:{backend.name}" for backend in BACKENDS if backend.opaque)  # our own kernels


def peers(layout: Layout, pack: Pack | None) -> list[Peer]:
    """One for every backend, usable or not."""
    names = [backend.name for backend in BACKENDS]
    return [
        Peer(f"vitreg:{n}", _ways(n).attend(layout, pack), ours=True, refuses=partial(_reasons, n, pack)) for n in names
    ]


def default(pack: Pack | None, *inputs: Tensor) -> str:
    """Name of the contender that a call which names no backend gets."""
    return f"vitreg:{_explained(None, pack, inputs).backend}"


def _ways(backend: str) -> Ways:
    def packed(qkv: Tensor) -> Tensor:
        return functional.register_attention_qkv(qkv, num_prefix_tokens=NUM_PREFIX_TOKENS, backend=backend)

    def separate(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return functional.register_attention(query, key, value, num_prefix_tokens=NUM_PREFIX_TOKENS, backend=backend)

    def multicrop(qkv: Tensor, pack: Pack) -> Tensor:
        return functional.register_attention_qkv(
            qkv,
            num_prefix_tokens=NUM_PREFIX_TOKENS,
            cu_seqlens=pack.cu_seqlens,
            max_seqlen=pack.max_seqlen,
            backend=backend,
        )

    return Ways(packed, separate, multicrop)


def _reasons(backend: str, pack: Pack | None, *inputs: Tensor) -> str | None:
    explanation = _explained(backend, pack, inputs)
    return None if explanation.backend == backend else "; ".join(explanation.reasons[backend])


def _explained(backend: str | None, pack: Pack | None, inputs: tuple[Tensor, ...]) -> Explanation:
    query, key, value = split(*inputs) if len(inputs) == 1 else inputs
    return explain(
        query,
        key,
        value,
        num_prefix_tokens=NUM_PREFIX_TOKENS,
        cu_seqlens=pack and pack.cu_seqlens,
        max_seqlen=pack and pack.max_seqlen,
        backend=backend,
    )
