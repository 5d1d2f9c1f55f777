"""Calls of the ops around attention to check on a GPU: the named cases of each op, and the sizes of a training step."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from vitreg_kernels.measure.cases import CASES, assemble, residual_norm, token_norms
from vitreg_kernels.measure.oracle import Call
from vitreg_kernels.ops import catalogue

OPS = tuple(op for op in catalogue.OPS.values() if op.name != "attention")

_TINY = (2, 9, 48)
_SHAPE = (4, 261, 1024)
_SHAPES = ((64, 261, 1024), *((4, 261, channels) for channels in (384, 768, 1280, 1536, 4096)))


def calls(dtype: torch.dtype, device: torch.device, *, dry: bool) -> Iterator[Call]:
    """Calls of each op in a dtype, the largest first; in a dry run each kind once, and tiny."""
    for shape in () if dry else _SHAPES:
        yield residual_norm.full(shape, dtype, device)
        yield token_norms.contiguous(shape, dtype, device)
    for cases in (residual_norm, token_norms, assemble):
        yield from cases.kinds(_TINY if dry else _SHAPE, dtype, device)
    for op in () if dry else OPS:
        yield from CASES[op.name](dtype, device)
