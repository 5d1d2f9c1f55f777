"""How alike patches are to their neighbours, which outliers repeat (Darcet et al., fig. 5a), and to the CLS token."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import gaussian_kde
from torch import Tensor

from ..layout import TokenLayout
from .findings import Similarity

_FEWEST = 20  # values, below which a kernel density shows its kernel rather than them
_POINTS_A_BIN = 8


def neighbour_cosine(embeddings: Tensor, grid: tuple[int, int], valid: Tensor | None = None) -> Tensor:
    """Mean cosine of each patch with the neighbours that it has above, below, left and right: two to four.

    In a grid of one row or column it has one or two. A zero vector has cosine 0 with everything.

    Args:
        embeddings: ``[B, M, C]``, after the patch embedding and before positions are added, as the paper takes them.
        grid: rows and columns of the M patches.
        valid: ``[B, M]`` bool, patches that show the image; the others are nobody's neighbours. All by default.

    Returns:
        ``[B, M]`` in the embeddings' dtype; NaN for a patch that has no neighbour or is not valid itself.

    Raises:
        ValueError: if the grid has another number of patches.
    """
    rows, columns = grid
    if embeddings.dim() != 3 or embeddings.shape[1] != rows * columns:
        raise ValueError(
            f"embeddings must be [B, M, C] with the {rows * columns} patches of the grid {rows} x {columns}, not of "
            f"shape {tuple(embeddings.shape)}"
        )
    directions = F.normalize(embeddings, dim=-1).unflatten(1, grid)
    shown = torch.ones_like(embeddings[..., 0]) if valid is None else valid.to(embeddings.dtype)
    shown = shown.unflatten(1, grid)
    total, count = torch.zeros_like(shown), torch.zeros_like(shown)
    for dim in (1, 2):
        first, second = (slice(None),) * dim + (slice(None, -1),), (slice(None),) * dim + (slice(1, None),)
        pairs = shown[first] * shown[second]
        cosines = (directions[first] * directions[second]).sum(-1) * pairs
        for side in (first, second):
            total[side] += cosines
            count[side] += pairs
    return (total / count).flatten(1)


def cls_cosine(tokens: Tensor, layout: TokenLayout, valid: Tensor | None = None) -> Tensor:
    """Cosine of each patch with the CLS token, the first of several.

    Patches that come to point where CLS does have lost what they say of their place (DINOv3, arXiv 2508.10104).

    Args:
        tokens: ``[B, N, C]``, behind one block.
        layout: of the N tokens.
        valid: ``[B, M]`` bool, patches that show the image; all by default.

    Returns:
        ``[B, M]`` in the tokens' dtype; NaN for a patch that is not valid.

    Raises:
        ValueError: if the layout has no CLS token, or other tokens.
    """
    if not layout.num_cls_tokens:
        raise ValueError("there is no CLS token that patches could be compared with")
    cls, _, patches = layout.split(tokens)
    cosines = F.cosine_similarity(patches, cls[:, :1], dim=-1)
    return cosines if valid is None else cosines.masked_fill(~valid, torch.nan)


def density(values: np.ndarray, points: int | np.ndarray = 256) -> tuple[np.ndarray, np.ndarray]:
    """Where values lie, as a density: a Gaussian kernel density by Scott's rule (``scipy.stats.gaussian_kde``).

    A histogram of bins eight points wide instead, where there are fewer than 20 values or all are equal.

    Args:
        values: ``[T]``, finite.
        points: how many points to give the density at, so that it is all but 0 at the first and last; or the points
            themselves, equally far apart.

    Returns:
        The points, and the density at each; both ``[points]`` fp64.

    Raises:
        ValueError: if there are no values, or some are not finite.
    """
    values, estimate = _estimated(values)
    if isinstance(points, int):
        points = np.linspace(*_span(values, estimate), points)
    return points, _histogram(values, points) if estimate is None else estimate(points)


def by_kind(values: Tensor, outlier: Tensor) -> Similarity:
    """The densities of outliers and of the others, at the same points.

    Args:
        values: ``[T]``, each patch's cosine with something else.
        outlier: ``[T]`` bool, which of them are outliers at the output.

    Raises:
        ValueError: as ``density`` does.
    """
    if not values.numel():
        raise ValueError("there are no patches whose similarity could be shown")
    kinds = {"normal": values[~outlier].numpy(), "outlier": values[outlier].numpy()}
    some = {kind: of_kind for kind, of_kind in kinds.items() if of_kind.size}
    spans = np.array([_span(*_estimated(of_kind)) for of_kind in some.values()])
    points = np.linspace(spans.min(), spans.max(), 256)
    return Similarity(
        points=points.tolist(),
        densities={kind: density(of_kind, points)[1].tolist() for kind, of_kind in some.items()},
        means={kind: float(of_kind.mean()) for kind, of_kind in some.items()},
        counts={kind: of_kind.size for kind, of_kind in kinds.items()},
    )


def _estimated(values: np.ndarray) -> tuple[np.ndarray, gaussian_kde | None]:
    """The values in fp64, and their kernel density unless they are too few or too alike for one."""
    values = np.asarray(values, dtype=np.float64)
    if not values.size or not np.isfinite(values).all():
        raise ValueError(
            f"a density needs at least one value and only finite ones, not {values.size} of which "
            f"{np.isfinite(values).sum()} are finite"
        )
    # Values that differ by rounding alone are equal.
    many = values.size >= _FEWEST and np.ptp(values) > 1e-6 * np.abs(values).max()
    return values, gaussian_kde(values) if many else None


def _span(values: np.ndarray, estimate: gaussian_kde | None) -> tuple[float, float]:
    """From where to where a density is more than 0: three deviations of a kernel beyond the values, or some bins."""
    if estimate is None:
        margin = max(np.ptp(values), 0.1 * np.abs(values).max(), 0.1) / 4.0
    else:
        margin = 3.0 * estimate.factor * values.std(ddof=1)
    return values.min() - margin, values.max() + margin


def _histogram(values: np.ndarray, points: np.ndarray) -> np.ndarray:
    """The density of the bin that each point is in; a bin begins half a step before its first point."""
    step = points[1] - points[0]
    bins = -(-points.size // _POINTS_A_BIN)
    edges = points[0] + step * (_POINTS_A_BIN * np.arange(bins + 1) - 0.5)
    counts, _ = np.histogram(values, edges)
    return np.repeat(counts / (values.size * step * _POINTS_A_BIN), _POINTS_A_BIN)[: points.size]
