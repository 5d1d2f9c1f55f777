"""The op's rules for function transforms: its formula, its gradient's, and many calls as one.

A mapped dimension joins the batch. Where each call has parameters, or gradients of parameters, of its own, as in
ensembles and per-sample gradients, no kernel call can do that, and the formula is mapped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._shared.transforms import Dims, Mapped, Rules, joined, parted
from . import reference, schema
from .types import AssembleInputs, Sizes, num_prefix


def _forward(*arguments: Any) -> tuple[Tensor]:
    *call, _backend = arguments
    return (reference.assemble_tokens(AssembleInputs(*call)),)


def _backward(grad_tokens: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    *sizes, cls_token, register_tokens, pos_embed, _backend = arguments
    sizes = Sizes(*sizes)
    prefix = num_prefix(sizes)
    summed = grad_tokens.to(torch.promote_types(grad_tokens.dtype, torch.float32)).sum(0, keepdim=True)
    rows = None if pos_embed is None else torch.cat((summed[:, : sizes.prefix_rows], summed[:, prefix:]), dim=1)
    found = (
        (summed[:, : sizes.cls_tokens], cls_token),
        (summed[:, sizes.cls_tokens : prefix], register_tokens),
        (rows, pos_embed),
    )
    return tuple(schema.without_elements(grad_tokens) if dtype is None else x.to(dtype) for x, dtype in found)


def _fold(size: int, in_dims: Dims, arguments: tuple, kernel: Callable[..., tuple[Tensor, ...]]) -> Mapped | None:
    patches, *others = arguments
    if any(dim is not None for dim in in_dims[1:]):
        return None
    (tokens,) = kernel(joined(patches, in_dims[0], size), *others)
    return (parted(tokens, size),), (0,)


def _fold_nothing(*_: Any) -> None:
    """All that the backward gives is gradients of parameters."""


FORWARD = Rules(_forward, _fold, derivable=(0, 1, 2, 3))
BACKWARD = Rules(_backward, _fold_nothing, derivable=(0,))
