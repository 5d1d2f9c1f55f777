"""torch's own kernels, each called by itself with what scaled_dot_product_attention would put around it.

No choice is made and no switch is read or set: torch's switches are the whole process's, and the user's. Each takes
``(query, key, value, mask, dropout_p, scale)``, tensors of unit stride in the last dimension, and gives the output.
The fused ones have a first derivative by autograd, and refuse a second and a forward-mode one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from ....._symbolic import exporting
from ...._shared import levels
from ...._shared.arguments import autocast_dtype

Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor | None, float, float], Tensor]

_FLASH_GRANULE = 8  # channels of a head that flash loads at once on a GPU
_MASK_GRANULE = 16  # numbers of a mask's row that the memory-efficient kernel's rows begin at a multiple of


def flash(query: Tensor, key: Tensor, value: Tensor, mask: None, dropout_p: float, scale: float) -> Tensor:
    """On a CPU and on a GPU. No mask."""
    if query.device.type == "cpu":
        return torch._scaled_dot_product_flash_attention_for_cpu(query, key, value, dropout_p, scale=scale)[0]
    head_dim = query.shape[-1]
    if spare := -head_dim % _FLASH_GRANULE:  # channels of zeros change no logit
        query, key, value = (functional.pad(x, (0, spare)) for x in (query, key, value))
    output = torch._scaled_dot_product_flash_attention(query, key, value, dropout_p, scale=scale)[0]
    return output[..., :head_dim] if spare else output


def cudnn(query: Tensor, key: Tensor, value: Tensor, mask: None, dropout_p: float, scale: float) -> Tensor:
    """On a GPU. No mask."""
    keep = _backward_may_follow(query, key, value)
    return torch._scaled_dot_product_cudnn_attention(query, key, value, None, keep, dropout_p, scale=scale)[0]


def efficient(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float) -> Tensor:
    """On a GPU."""
    if mask is None:
        keep = _backward_may_follow(query, key, value)
    else:
        keep = _backward_may_follow(query, key, value, mask)
        mask = _in_aligned_rows(_added(mask, query.dtype), query)
    return torch._scaled_dot_product_efficient_attention(query, key, value, mask, keep, dropout_p, scale=scale)[0]


def formula(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float, scale: float) -> Tensor:
    """Anywhere: torch's own formula, in fp32 at least. It has all derivatives, and N x N memory."""
    mask = None if mask is None else _added(mask, query.dtype)
    exact = nullcontext()
    if autocast_dtype(query) is not None:  # which would round what is fp32 on purpose
        exact = torch.autocast(query.device.type, enabled=False)
    with exact:
        return torch._scaled_dot_product_attention_math(query, key, value, mask, dropout_p, scale=scale)[0]


def _backward_may_follow(*tensors: Tensor) -> bool:
    """Whether the log-sum-exp is to be kept for a backward. Of what is exported or transformed nobody knows."""
    if exporting() or levels.are_active():
        return True
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the logits."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, -torch.inf)


def _in_aligned_rows(mask: Tensor, query: Tensor) -> Tensor:
    """An additive mask as ``[B, H, N, N]``, a window of rows that begin where the kernel can load them.

    It is made longer before it is made larger, so that a mask of keys stays a row an image.
    """
    batch, heads, tokens, _ = query.shape
    mask = mask.expand(*mask.shape[:-1], tokens).contiguous()
    if spare := -tokens % _MASK_GRANULE:
        mask = functional.pad(mask, (0, spare))[..., :tokens]
    return mask.expand(batch, heads, tokens, tokens)
