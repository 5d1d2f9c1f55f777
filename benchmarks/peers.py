"""The contenders of the attention race.

All do one job, that of attention in a ViT block: from the packed projection ``[B, N, 3, H, D]`` to ``[B, N, C]``. What
a contender needs around its kernel, such as copies of strided views or three gradients stacked into one, counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache, partial
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import NUM_PREFIX_TOKENS, Size
from vitreg_kernels import UnsupportedError, explain, functional
from vitreg_kernels._runtime import triton_mode
from vitreg_kernels.ops.attention.backends import BACKENDS

Tensors = dict[str, Tensor]
Result = TypeVar("Result")
_RECOMPILE_LIMIT = 64  # a compiled contender meets more shapes, dtypes and modes than torch's default of 8


def _never_refuses(qkv: Tensor) -> str | None:
    return None


class Peer(NamedTuple):
    """One contender.

    Attributes:
        name: as rows and pictures show it.
        attend: ``[B, N, 3, H, D]`` to ``[B, N, C]``; raises where it cannot serve the call.
        ours: it is a backend of vitreg_kernels, not something to be measured against.
        context: entered around each call, outside the clock.
        refuses: its reason for not serving an input, where it can tell without running.
    """

    name: str
    attend: Callable[[Tensor], Tensor]
    ours: bool = False
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    refuses: Callable[[Tensor], str | None] = _never_refuses


class Stopped(NamedTuple):
    """Why a contender gave no result.

    Attributes:
        reason: in its own words.
        failed: it is ours and did not refuse (``UnsupportedError``) but broke.
    """

    reason: str
    failed: bool


def peers(size: Size) -> list[Peer]:
    """Every backend of vitreg_kernels; torch's SDPA by backend, FlexAttention, xformers, the formula; usable or not."""
    names = [backend.NAME for backend in BACKENDS]
    ours = [Peer(f"vitreg:{n}", partial(_attend, n), ours=True, refuses=partial(_reasons, n)) for n in names]
    torchs = [Peer(f"torch:{n}", sdpa, context=partial(sdpa_kernel, b)) for n, b in _sdpa_backends().items()]
    compiled = Peer("torch:flex", flex, context=_recompiles, refuses=partial(_flex_reason, size))
    return [*ours, *torchs, compiled, Peer("xformers", xformers, refuses=_xformers_reason), Peer("eager", eager)]


def attempt(peer: Peer, job: Callable[..., Result], qkv: Tensor, *arguments: Tensor) -> Result | Stopped:
    """``job(peer.attend, qkv, *arguments)``, or why the peer does not do it."""

    def call() -> Result:
        with peer.context():
            return job(peer.attend, qkv, *arguments)

    reason = peer.refuses(qkv)
    return guarded(call, ours=peer.ours) if reason is None else Stopped(reason, failed=False)


def guarded(call: Callable[[], Result], *, ours: bool) -> Result | Stopped:
    """``call()``, or what stopped it: of a peer any error is a refusal, of ours ``UnsupportedError`` only.

    torch says why an SDPA kernel does not apply in warnings, so those are part of the reason.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            return call()
        except UnsupportedError as error:
            return Stopped(str(error), failed=False)
        except Exception as error:  # a contender may be anybody's code, and whatever stops it is its reason
            reason = " ".join([f"{type(error).__name__}: {error}", *(str(w.message) for w in caught)])
            return Stopped(reason, failed=ours)


def sdpa(qkv: Tensor) -> Tensor:
    """torch's ``scaled_dot_product_attention``, by whichever of its backends the context allows."""
    return _merge_heads(F.scaled_dot_product_attention(*_split(qkv)))


def flex(qkv: Tensor) -> Tensor:
    """torch's FlexAttention, compiled for the shapes of ``qkv`` at the first call; uncompiled it holds N x N."""
    return _merge_heads(_compiled_flex()(*_split(qkv)))


def xformers(qkv: Tensor) -> Tensor:
    """xformers' memory-efficient attention, called directly: the same kernel as ``vitreg:xformers`` without us."""
    from xformers.ops import memory_efficient_attention

    return memory_efficient_attention(*qkv.unbind(2)).flatten(2)


def eager(qkv: Tensor) -> Tensor:
    """The formula in plain torch, in the input's dtype; in fp64 it is what every contender is held against."""
    query, key, value = _split(qkv)
    return _merge_heads((query @ key.mT * query.shape[-1] ** -0.5).softmax(-1) @ value)


def _attend(backend: str, qkv: Tensor) -> Tensor:
    return functional.register_attention_qkv(qkv, num_prefix_tokens=NUM_PREFIX_TOKENS, backend=backend)


def _reasons(backend: str, qkv: Tensor) -> str | None:
    if backend == "triton" and triton_mode.INTERPRETING:
        return "runs under Triton's interpreter here, whose speed says nothing about a GPU's"
    explanation = explain(*_split(qkv), num_prefix_tokens=NUM_PREFIX_TOKENS, backend=backend)
    return None if explanation.backend == backend else "; ".join(explanation.reasons[backend])


@cache
def _compiled_flex() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    # Each shape on its own, as a ViT's never changes; whole or not at all, or parts would run uncompiled in silence.
    return torch.compile(flex_attention, dynamic=False, fullgraph=True)


def _recompiles() -> AbstractContextManager[object]:
    import torch._dynamo

    return torch._dynamo.config.patch(recompile_limit=_RECOMPILE_LIMIT)


def _flex_reason(size: Size, qkv: Tensor) -> str | None:
    if qkv.is_cuda:
        return None
    if size == "quick":
        return "compiles anew for every shape, too slow for the quick size on a CPU; the full size races it"
    # torch's own words for it get lost in the compiler.
    return "has no backward on a CPU" if qkv.requires_grad else None


def _xformers_reason(qkv: Tensor) -> str | None:
    return None if qkv.is_cuda else f"runs on cuda, not on {qkv.device.type}"


def _sdpa_backends() -> dict[str, SDPBackend]:
    # ERROR is no backend, and OVERRIDEABLE belongs to devices that live outside torch.
    left_out = (SDPBackend.ERROR, SDPBackend.OVERRIDEABLE)
    members = SDPBackend.__members__.items()
    return {name.removesuffix("_ATTENTION").lower(): b for name, b in members if b not in left_out}


def _split(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value ``[B, H, N, D]``: views of the packed projection."""
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def _merge_heads(output: Tensor) -> Tensor:
    return output.transpose(1, 2).flatten(2)
