"""The one way from another library's attention module into the op."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import functional
from ...ops.attention.types import AttentionOutputs, Rope

Taker = tuple[str, Callable[[Tensor | None], None]]


@dataclass
class Attend:
    """Calls the op for one patched module, and hands its statistics to whoever captures them.

    Attributes:
        num_prefix_tokens: P of the model; ``None`` if it is not known.
        backend: the backend asked for.
        takers: statistics that are taken of every call, each a name and what to do with it, or with None when a call
            begins. A copy of the module has none: they belong to the module that is captured.
    """

    num_prefix_tokens: int | None = None
    backend: str | None = None
    takers: list[Taker] = field(default_factory=list)

    def begin(self) -> None:
        """A call begins: what was taken of the one before is no longer the latest, even if this one takes none."""
        for _, take in tuple(self.takers):
            take(None)

    def heads(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        """``register_attention``: ``[B, H, N, D]`` each; ``options`` are its own, mask, rope and the like.

        Key and value may have fewer heads than the query: head h of the query then attends with head h * Hkv // H.
        """
        if key.shape[1] != query.shape[1]:
            groups = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return self._call(functional.register_attention, query, key, value, **options)

    def packed(self, qkv: Tensor, **options: Any) -> Tensor:
        """``register_attention_qkv`` of ``[B, N, 3, H, D]``: ``[B, N, C]``."""
        return self._call(functional.register_attention_qkv, qkv, **options)

    def _call(self, op: Callable[..., Any], *tensors: Tensor, **options: Any) -> Tensor:
        takers = tuple(self.takers)  # another thread may begin or end a capture meanwhile
        if not takers:
            return op(*tensors, **options, backend=self.backend)
        if self.num_prefix_tokens is not None:
            options.setdefault("num_prefix_tokens", self.num_prefix_tokens)
        output, statistics = op(*tensors, **options, outputs=wanted_by(takers), backend=self.backend)
        hand_over(statistics, takers)
        return output

    def __getstate__(self) -> dict[str, Any]:
        return {"num_prefix_tokens": self.num_prefix_tokens, "backend": self.backend, "takers": []}


def wanted_by(takers: Sequence[Taker]) -> tuple[str, ...]:
    """The statistics that somebody takes."""
    return tuple(dict.fromkeys(name for name, _ in takers))


def hand_over(statistics: AttentionOutputs, takers: Sequence[Taker]) -> None:
    """Give the statistics of a call to who takes them."""
    for name, take in takers:
        take(getattr(statistics, name))


def rope_on_patches(cos: Tensor, sin: Tensor, patches: int, *, interleaved: bool = False) -> Rope | None:
    """The rotation as the op takes it, or None if it must be carried out before: by head, or learnt.

    Args:
        cos, sin: ``[M, D]``, or ``[B or 1, H or 1, M, D]``, the form that multiplies ``[B, H, M, D]``.
        patches: M of the call.
        interleaved: which channels form a pair, as in ``Rope``.

    Raises:
        ValueError: if there are not M rows.
    """
    if cos.shape[-2] != patches:
        raise ValueError(
            f"the rotation has {cos.shape[-2]} rows for {patches} patches; num_prefix_tokens of the model must be the "
            "tokens that are not rotated"
        )
    if torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad):
        return None
    if cos.dim() > 2:
        if cos.shape[-3] != 1:
            return None
        cos, sin = cos.squeeze(-3), sin.squeeze(-3)  # [B, M, D], or [M, D] of what had three dimensions
    return Rope(cos, sin, interleaved)
