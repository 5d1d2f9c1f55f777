"""TokenCut, which cuts the graph of an image's patches in two (Wang et al., arXiv 2202.11539)."""

from __future__ import annotations

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor

from .found import Found, box_around, checked

# Eigenvalues lie between 0 and 2, and rounding moves them by about 1e-15 times their number.
_SAME = 1e-10


def tokencut(
    features: Tensor, grid: tuple[int, int], *, tau: float = 0.2, eps: float = 1e-5, valid: Tensor | None = None
) -> list[Found]:
    """The object of each image: one side of the normalised cut of its patches' graph.

    Two patches are joined by an edge of weight 1 if the cosine of their features is above ``tau``, else of weight
    ``eps``, which keeps the graph connected. With these weights A and their sums D, x is the second eigenvector of
    (D - A) x = λ D x. It is split at its mean; the seed is the patch where it is largest in magnitude, the first of
    several, and its side is the foreground. The box is around the part of it that is connected with the seed.

    There is no box if another cut is as good, as when the cosines of all patches are above ``tau``: x is then any
    vector, so the foreground is left empty, and the seed is the first patch.

    The eigenproblem is dense, M x M in fp64, and its cost grows with the cube of M.

    Args:
        features: ``[B, M, C]`` of the patches; of the last block's keys in the paper.
        grid: rows and columns of patches.
        tau: cosine above which two patches are alike.
        eps: weight of all other edges.
        valid: ``[B, M]`` bool, the patches that show the image; the others are as if they were not there.

    Raises:
        ValueError: if the shapes do not fit each other, an image has fewer than two valid patches, a feature is not
            finite, or ``tau`` is not in [-1, 1) or ``eps`` not in (0, 1).
    """
    if not -1 <= tau < 1:
        raise ValueError(f"tau is a cosine, and must be in [-1, 1), not {tau}")
    if not 0 < eps < 1:
        raise ValueError(f"eps must be above 0, which keeps the graph connected, and below 1, not {eps}")
    features, valid = checked(features, grid, valid, at_least=2)
    features = F.normalize(features, dim=2)
    return [_cut(*image, grid, tau, eps) for image in zip(features, valid, strict=True)]


def _cut(features: Tensor, valid: Tensor, grid: tuple[int, int], tau: float, eps: float) -> Found:
    """Of one image's ``[M, C]`` features of length 1."""
    kept = features[valid]
    weights = torch.where(kept @ kept.T > tau, 1.0, eps).double().numpy(force=True)
    values, vector = second_eigenvector(weights)
    positions = valid.nonzero().flatten()
    mask = torch.zeros_like(valid)
    if values[1] - values[0] <= _SAME:
        return Found(None, int(positions[0]), mask, None)

    magnitude = np.abs(vector)
    own = int(np.flatnonzero(magnitude >= magnitude.max() * (1 - _SAME))[0])  # rounding does not break ties
    vector = vector * np.sign(vector[own])
    mask[positions] = torch.from_numpy(vector > vector.mean()).to(mask.device)
    seed = int(positions[own])
    return Found(box_around(seed, mask, grid), seed, mask, None)


def second_eigenvector(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (D - A) x = λ D x with A the ``weights`` ``[V, V]`` of a connected graph and D the diagonal of their sums.

    Returns:
        The second and third eigenvalue, infinity if there are but two; and the second's eigenvector ``[V]`` fp64.
    """
    sums = np.diag(weights.sum(1))
    last = min(2, len(weights) - 1)
    values, vectors = scipy.linalg.eigh(sums - weights, sums, subset_by_index=[1, last])
    return np.append(values, np.inf)[:2], vectors[:, 0]
