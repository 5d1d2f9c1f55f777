"""What the CLS token and the registers attend to, and which tokens nearly all others attend to.

From the rows of attention that ``record`` keeps, those of the prefix, and from the mean over all rows; never from all
N x N probabilities.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..layout import TokenLayout
from .findings import Attention

# Fesser et al. (arXiv 2606.08105): at least 90% of the queries put at least half of their attention on a sink.
_SINK_ATTENTION = 0.5
_SINK_QUERIES = 0.9


def attention_maps(attention: Tensor, layout: TokenLayout, grid: tuple[int, int]) -> Tensor:
    """The attention of CLS and registers over the image, by head; ``.mean(1)`` averages over heads.

    Only the patches' part of each row, which therefore sums to less than 1: to 1 less ``shares``' ``on_prefix``.

    Args:
        attention: ``[B, H, P, N]``.
        layout: the order of the tokens.
        grid: rows and columns of the patches.

    Returns:
        ``[B, H, P, rows, columns]``, a view.

    Raises:
        ValueError: if the attention has other tokens than the layout and the grid.
    """
    _check(attention, layout, grid[0] * grid[1])
    return attention[..., layout.patches].unflatten(-1, grid)


def colour_limits(maps: Tensor) -> tuple[float, float]:
    """Smallest and largest finite value of maps of patches, for one scale over all images of a model; 0 and 1 if none.

    CLS and registers have no place in it: one register's norm or share can be ten times that of any patch, and on a
    scale that holds it the patches are all of one colour.

    Args:
        maps: of patches alone, any shape.
    """
    finite = maps[maps.isfinite()]
    return (float(finite.min()), float(finite.max())) if finite.numel() else (0.0, 1.0)


def prefix_names(layout: TokenLayout) -> list[str]:
    """``"cls"`` (``"cls 0"``, ``"cls 1"`` of several) and ``"register 0"`` on, in the order of the tokens."""
    many = layout.num_cls_tokens > 1
    return [f"cls {i}" if many else "cls" for i in range(layout.num_cls_tokens)] + [
        f"register {i}" for i in range(layout.num_registers)
    ]


def shares(attention: Tensor, layout: TokenLayout, outlier: Tensor | None = None, *, layer: int) -> list[Attention]:
    """Where the attention of each CLS token and register goes, averaged over heads and images.

    Args:
        attention: ``[B, H, P, N]`` of one layer.
        layout: the order of the tokens.
        outlier: ``[B, M]`` bool, patches that are outliers, if that is known.
        layer: which block it is, from 0.

    Raises:
        ValueError: if the attention has other tokens than the layout, or the outliers are of other patches.
    """
    _check(attention, layout)
    expected = (attention.shape[0], attention.shape[3] - layout.num_prefix_tokens)
    if outlier is not None and outlier.shape != expected:
        raise ValueError(f"outlier must be [B, M] = {list(expected)}, not of shape {tuple(outlier.shape)}")
    rows = attention.double()
    on_prefix = rows[..., : layout.num_prefix_tokens].sum(-1).mean((0, 1)).tolist()
    if outlier is None or not outlier.any():
        on_outliers, among_patches = [None] * len(on_prefix), None
    else:
        on_outliers = torch.einsum("bhpm,bm->bhp", rows[..., layout.patches], outlier.double()).mean((0, 1)).tolist()
        among_patches = outlier.double().mean().item()
    return [
        Attention(layer, name, prefix, outliers, among_patches)
        for name, prefix, outliers in zip(prefix_names(layout), on_prefix, on_outliers, strict=True)
    ]


class Sinks(NamedTuple):
    """How many queries put at least half of their attention on each token.

    Attributes:
        at_least, at_most: ``[B, H, N]`` fp64, bounds on the share of the N queries that do.
    """

    at_least: Tensor
    at_most: Tensor

    @property
    def certain(self) -> Tensor:
        """``[B, H, N]`` bool, tokens that are sinks whatever the rows of attention were."""
        return self.at_least >= _SINK_QUERIES

    @property
    def possible(self) -> Tensor:
        """``[B, H, N]`` bool, those and tokens that may be; all others are not."""
        return self.at_most >= _SINK_QUERIES


def sinks(received: Tensor, attention: Tensor) -> Sinks:
    """Which tokens are attention sinks: at least 90% of the queries put at least half of their attention on them.

    That definition (Fesser et al., arXiv 2606.08105) is about all N x N probabilities, which fused attention never
    holds. What it tells bounds the share from both sides: the queries of the prefix are counted exactly, from their
    rows; the others put s on a token in all, and if k of M of them put at least half on it, s is at least k / 2 and at
    most k + (M - k) / 2. A token that receives .95 on average is a sink for certain and one below .45 is none; between
    these only all probabilities would tell.

    Args:
        received: ``[B, H, N]``, the attention that each token receives, averaged over all N queries.
        attention: ``[B, H, P, N]``, the rows of the first P queries.

    Raises:
        ValueError: if they are of other images, heads or tokens.
    """
    if attention.dim() != 4 or received.shape != attention.shape[:2] + attention.shape[3:]:
        raise ValueError(
            f"received [B, H, N] and attention [B, H, P, N] must be of the same images, heads and tokens, not of "
            f"shapes {tuple(received.shape)} and {tuple(attention.shape)}"
        )
    prefix, tokens = attention.shape[2:]
    rows = attention.double()
    others = tokens - prefix
    put = received.double() * tokens - rows.sum(2)
    known = (rows >= _SINK_ATTENTION).sum(2)
    least = (put - _SINK_ATTENTION * others) / (1.0 - _SINK_ATTENTION)
    most = put / _SINK_ATTENTION
    return Sinks(*((known + count.clamp(0.0, others)) / tokens for count in (least, most)))


def _check(attention: Tensor, layout: TokenLayout, patches: int | None = None) -> None:
    prefix = layout.num_prefix_tokens
    patches = layout.num_patches if patches is None else patches
    right = attention.dim() == 4 and attention.shape[2] == prefix and attention.shape[3] >= prefix
    if not right or patches not in (None, attention.shape[3] - prefix):
        expected = "" if patches is None else f" and {patches} patches"
        raise ValueError(
            f"attention must be [B, H, P, N] of {prefix} CLS and register tokens{expected}, not of shape "
            f"{tuple(attention.shape)}"
        )
