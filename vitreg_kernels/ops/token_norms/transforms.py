"""The ops' rules for function transforms. They have no derivative; a mapped dimension joins the batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._shared.transforms import Dims, Mapped, Rules, joined, parted, side_by_side
from . import reference, schema

_DISTRIBUTION = slice(3, 7)  # where ``accumulate_token_norms`` has it among its arguments


def _forward(x: Tensor, _backend: str) -> tuple[Tensor]:
    return (reference.token_norms(x),)


def _fold(size: int, in_dims: Dims, arguments: tuple, kernel: Callable[..., tuple[Tensor, ...]]) -> Mapped:
    x, backend = arguments
    (norms,) = kernel(joined(x, in_dims[0], size), backend)
    return (parted(norms, size),), (0,)


FORWARD = Rules(_forward, _fold)


def _accumulate(info: Any, in_dims: Dims, norms: Tensor, *arguments: Any) -> tuple[None, None]:
    """Into one distribution all at once, into one each by one call each."""
    op = torch.ops.vitreg.accumulate_token_norms
    if all(dim is None for dim in in_dims[_DISTRIBUTION]):
        op(joined(norms, in_dims[0], info.batch_size), *arguments)
        return None, None
    each = [
        side_by_side(x, dim, info.batch_size) if isinstance(x, Tensor) else [x] * info.batch_size
        for x, dim in zip((norms, *arguments), in_dims, strict=True)
    ]
    for call in zip(*each, strict=True):
        op(*call)
    return None, None


torch.library.register_vmap("vitreg::accumulate_token_norms", _accumulate, lib=schema.LIBRARY)
