"""The one way from an attention module into the op, and what is taken of a call on that way."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ... import functional
from ...ops.attention.types import AttentionOutputs, Rope, unpack_qkv

OPERANDS = ("query", "key", "value")

Taker = tuple[str, Callable[[Tensor | None], None]]


@dataclass
class Attend:
    """Calls the op for one patched module, and hands its statistics to whoever captures them.

    Attributes:
        num_prefix_tokens: P of the model; ``None`` if it is not known.
        backend: the backend asked for.
        takers: what is taken of every call, each the name of a statistic or an operand and what to do with it, or with
            None when a call begins. A copy of the module has none: they belong to the module that is captured.
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
        if self.takers and self.num_prefix_tokens is not None:
            options.setdefault("num_prefix_tokens", self.num_prefix_tokens)
        return self.call(op, *tensors, **options, backend=self.backend)

    def call(
        self, op: Callable[..., Any], *tensors: Tensor, outputs: Sequence[str] = (), **options: Any
    ) -> Tensor | tuple[Tensor, AttentionOutputs]:
        """``op(*tensors, outputs=outputs, **options)``, asked for what is taken besides ``outputs``.

        Args:
            op: ``register_attention``, ``register_attention_qkv`` or what takes and gives the same.
            tensors: query, key and value ``[B, H, N, D]``, or all in one ``[B, N, 3, H, D]``.
            outputs, options: its own.
        """
        takers = tuple(self.takers)  # another thread may begin or end a capture meanwhile
        if not takers:
            return op(*tensors, outputs=outputs, **options)
        wanted = tuple(dict.fromkeys((*outputs, *(name for name, _ in takers if name not in OPERANDS))))
        result = op(*tensors, outputs=wanted, **options)
        output, statistics = result if wanted else (result, None)
        for name, take in takers:
            take(_operand(name, tensors) if name in OPERANDS else getattr(statistics, name))
        asked = {name: getattr(statistics, name) for name in outputs}
        return (output, AttentionOutputs(**asked)) if outputs else output

    def __getstate__(self) -> dict[str, Any]:
        return {"num_prefix_tokens": self.num_prefix_tokens, "backend": self.backend, "takers": []}


def _operand(name: str, tensors: Sequence[Tensor]) -> Tensor:
    """A copy of the query, key or value of a call: a view would keep the whole of a packed qkv."""
    heads = unpack_qkv(*tensors) if len(tensors) == 1 else tensors
    return heads[OPERANDS.index(name)].detach().clone(memory_format=torch.contiguous_format)


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
