"""Principal components of the patch tokens of all images, as colours that compare between them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from sklearn.decomposition import PCA
from torch import Tensor


class PcaMaps(NamedTuple):
    """K principal components of the tokens of all images.

    Attributes:
        colours: of each image ``[rows, columns, K]`` fp32 in [0, 1], a component a channel; 0 outside the foreground,
            and 0.5 elsewhere of a component that does not vary between the percentiles.
        components: ``[K, C]`` fp32, of length 1, the loading that is largest in magnitude positive; 0 of a component
            that does not vary.
        mean: ``[C]`` fp32, of the tokens.
        explained: ``[K]`` fp32, shares of the variance.
    """

    colours: list[Tensor]
    components: Tensor
    mean: Tensor
    explained: Tensor


def joint_pca(
    tokens: Sequence[Tensor],
    *,
    components: int = 3,
    foreground: Sequence[Tensor] | None = None,
    clip: tuple[float, float] = (2, 98),
) -> PcaMaps:
    """Fit one PCA to the patches of all images and colour them by it.

    Components have no sign of their own; here the loading of largest magnitude is positive, so that colours do not flip
    between runs. (They still can between two fits in which two loadings of opposite signs are about equally large.)

    Args:
        tokens: of each image ``[rows, columns, C]``, any floating-point dtype; grids may differ. A tensor
            ``[B, rows, columns, C]`` will do.
        components: K.
        foreground: of each image ``[rows, columns]`` bool, the patches to fit and colour; all by default.
        clip: percentiles, over the foreground of all images, that become 0 and 1.

    Raises:
        ValueError: if there are fewer patches or channels than components, tokens are not finite, or shapes or
            percentiles do not fit.
    """
    if not 0 <= clip[0] < clip[1] <= 100:
        raise ValueError(f"clip must be two rising percentiles between 0 and 100, not {clip}")
    masks = [torch.ones(each.shape[:2], dtype=torch.bool) for each in tokens] if foreground is None else foreground
    _check(tokens, masks)
    # In fp64: the covariance of tokens far from zero loses in fp32 what the small components are made of.
    chosen = [each[mask].double().numpy() for each, mask in zip(tokens, masks, strict=True)]
    patches = np.concatenate(chosen) if chosen else np.empty((0, 0))
    if components < 1 or min(patches.shape) < components:
        raise ValueError(
            f"{components} components need at least as many patches and channels, and at least 1, not "
            f"{patches.shape[0]} patches of {patches.shape[1]} channels"
        )
    if not np.isfinite(patches).all():
        bad = int((~np.isfinite(patches).all(1)).sum())
        raise ValueError(f"{bad} of {len(patches)} patch tokens are NaN or infinite; leave these images out")

    mean, loadings, explained = _fit(patches, components)
    coordinates = (patches - mean) @ loadings.T
    low, high = np.percentile(coordinates, clip, axis=0)
    varies = high - low > np.sqrt(_negligible(patches))
    scaled = np.where(varies, (coordinates - low) / np.where(varies, high - low, 1), 0.5).clip(0, 1)
    colours, start = [], 0
    for mask in masks:
        count = int(mask.sum())
        image = torch.zeros(*mask.shape, components)
        image[mask] = torch.from_numpy(scaled[start : start + count]).float()
        colours.append(image)
        start += count
    return PcaMaps(colours, *(torch.from_numpy(each).float() for each in (loadings, mean, explained)))


def _fit(patches: np.ndarray, components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean ``[C]``, loadings ``[K, C]`` with their signs fixed, and shares of the variance ``[K]``."""
    mean, floor = patches.mean(0), _negligible(patches)
    loadings, explained = np.zeros((components, patches.shape[1])), np.zeros(components)
    if patches.var(0).sum() > floor:
        fit = PCA(components, random_state=0).fit(patches)
        varies = fit.explained_variance_ > floor
        loadings[varies], explained[varies] = fit.components_[varies], fit.explained_variance_ratio_[varies]
        largest = np.take_along_axis(loadings, np.abs(loadings).argmax(1)[:, None], axis=1)
        loadings *= np.where(largest < 0, -1, 1)
    return mean, loadings, explained


def _negligible(patches: np.ndarray) -> float:
    """The variance that rounding to fp32 alone gives tokens of this size; scaled to colours it would be noise."""
    return float(np.finfo(np.float32).eps ** 2 * np.square(patches).sum(1).mean())


def _check(tokens: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    if len(masks) != len(tokens):
        raise ValueError(f"foreground must have a mask for each of {len(tokens)} images, not {len(masks)}")
    for index, (each, mask) in enumerate(zip(tokens, masks, strict=True)):
        if each.dim() != 3 or each.shape[2] != tokens[0].shape[-1]:
            raise ValueError(
                f"tokens of image {index} must be [rows, columns, C] with the C of the others, "
                f"{tokens[0].shape[-1]}, not of shape {tuple(each.shape)}"
            )
        if mask.dtype != torch.bool or mask.shape != each.shape[:2]:
            raise ValueError(
                f"foreground of image {index} must be bool of shape {tuple(each.shape[:2])}, not {mask.dtype} of shape "
                f"{tuple(mask.shape)}"
            )
