"""The contenders of the attention race.

All do one job, that of attention in a ViT block: from the packed projection ``[B, N, 3, H, D]`` to ``[B, N, C]``. What
a contender needs around its kernel, such as copies of strided views or three gradients stacked into one, counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.shapes import NUM_PREFIX_TOKENS
from vitreg_kernels import explain, functional
from vitreg_kernels._runtime import triton_mode
from vitreg_kernels.ops.attention.backends import BACKENDS

Tensors = dict[str, Tensor]


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


def peers() -> list[Peer]:
    """Every backend of vitreg_kernels, every backend of torch's SDPA, and the formula; usable here or not."""
    names = [backend.NAME for backend in BACKENDS]
    ours = [Peer(f"vitreg:{n}", partial(_attend, n), ours=True, refuses=partial(_reasons, n)) for n in names]
    torchs = [Peer(f"torch:{n}", sdpa, context=partial(sdpa_kernel, b)) for n, b in _sdpa_backends().items()]
    return [*ours, *torchs, Peer("eager", eager)]


def attempt(peer: Peer, job: Callable[..., Tensors], qkv: Tensor, *arguments: Tensor) -> Tensors | str:
    """``job(peer.attend, qkv, *arguments)``, or why the peer cannot do it, in its own words.

    torch says why an SDPA kernel does not apply in warnings, so those are part of the reason.
    """
    reason = peer.refuses(qkv)
    if reason is not None:
        return reason
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            with peer.context():
                return job(peer.attend, qkv, *arguments)
        except Exception as error:  # a contender may be anybody's code, and whatever stops it is its reason
            return " ".join([f"{type(error).__name__}: {error}", *(str(w.message) for w in caught)])


def sdpa(qkv: Tensor) -> Tensor:
    """torch's ``scaled_dot_product_attention``, by whichever of its backends the context allows."""
    return _merge_heads(F.scaled_dot_product_attention(*_split(qkv)))


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
