"""Token norms at the widths of ViTs, and how norms are counted, NaN and infinite ones among them. Without gradients."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from ...functional import token_norm_stats, token_norms
from ...layout import TokenLayout
from ...ops.token_norms.features import norms_request, statistics_request
from ..oracle import Call, Tensors
from .tensors import SHAPE, SHAPES, Shape, permuted, size, uniform


def call(x: Tensor, *, name: str = "") -> Call:
    """A call of ``token_norms``, of tokens ``[B, N, C]``."""
    channels = x.shape[2]
    return Call(name=name, request=norms_request(x), function=_norms, arguments={"x": x}, terms=lambda tensor: channels)


def statistics_call(norms: Tensor, layout: TokenLayout, *, name: str = "") -> Call:
    """A call of ``token_norm_stats``, of norms ``[B, N]``. Its counts are given as fp64, which holds them exactly."""
    count = norms.numel()
    return Call(
        name=name,
        request=statistics_request(norms),
        function=_statistics,
        arguments={"norms": norms, "layout": layout},
        terms=lambda tensor: count,
    )


def calls(dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Each kind of call once, and the widths of ViTs."""
    yield from kinds(SHAPE, dtype, device)
    for shape in SHAPES:
        yield contiguous(shape, dtype, device)


def kinds(shape: Shape, dtype: torch.dtype, device: torch.device) -> Iterator[Call]:
    """Each kind of call, of tokens ``[B, N, C]`` and of their norms."""
    yield contiguous(shape, dtype, device)
    generator = torch.Generator(device).manual_seed(3)
    yield call(permuted(uniform(generator, dtype, *shape)), name=f"{size(shape)}, permuted")
    norms = 30 * (1 + uniform(generator, torch.float32, *shape[:2]).square())
    norms[0, :3], norms[-1, -1] = torch.tensor([math.nan, math.inf, 0.0], device=device), 1e30
    yield statistics_call(norms, TokenLayout(), name=f"{size(shape[:2])} norms, statistics")


def contiguous(shape: Shape, dtype: torch.dtype, device: torch.device) -> Call:
    """A call of contiguous tokens ``[B, N, C]``."""
    numbers = partial(uniform, torch.Generator(device).manual_seed(2), dtype)
    return call(numbers(*shape), name=size(shape))


def _norms(backend: str, x: Tensor) -> Tensors:
    return {"token_norms": token_norms(x, backend=backend)}


def _statistics(backend: str, norms: Tensor, layout: TokenLayout) -> Tensors:
    groups = token_norm_stats(norms, layout, backend=backend)._asdict()
    found = {f"{group} {name}": x for group, its in groups.items() for name, x in its._asdict().items()}
    return {name: x if x.is_floating_point() else x.double() for name, x in found.items()}
