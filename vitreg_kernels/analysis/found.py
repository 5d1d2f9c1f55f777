"""One object found on an image without annotations: what LOST and TokenCut have in common."""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy import ndimage
from torch import Tensor


class Found(NamedTuple):
    """The object of one image.

    Attributes:
        box: in patches: left, top, right, bottom, the last two exclusive; None if there is none.
        seed: index of the patch that the object is grown from.
        mask: ``[M]`` bool, all patches of the foreground; the box is around those that are connected with the seed.
        positive_share: share of positive entries of the Gram matrix, 0 to 1; None of TokenCut. If it is 1, every patch
            resembles every other one, and the box is the whole image whatever is on it.
    """

    box: tuple[int, int, int, int] | None
    seed: int
    mask: Tensor
    positive_share: float | None


def box_around(seed: int, mask: Tensor, grid: tuple[int, int]) -> tuple[int, int, int, int] | None:
    """The box around the patches of ``mask`` ``[M]`` that the seed reaches by edges of patches; None if it is not one.

    Returns:
        In patches: left, top, right, bottom, the last two exclusive.
    """
    components, _ = ndimage.label(mask.reshape(grid).numpy(force=True))
    own = components.flat[seed]
    if own == 0:
        return None
    rows, columns = ndimage.find_objects(components)[own - 1]
    return columns.start, rows.start, columns.stop, rows.stop


def checked(features: Tensor, grid: tuple[int, int], valid: Tensor | None, *, at_least: int) -> tuple[Tensor, Tensor]:
    """Features fit for a Gram matrix, and which patches count.

    Args:
        features: ``[B, M, C]``.
        grid: rows and columns of patches.
        valid: ``[B, M]`` bool; None if all count.
        at_least: how many patches of every image must count.

    Returns:
        ``[B, M, C]`` fp32, 0 where ``valid`` is false; ``[B, M]`` bool.

    Raises:
        ValueError: if the shapes do not fit each other, an image has too few patches, or a feature is not finite.
    """
    if features.ndim != 3:
        raise ValueError(f"features must be [B, M, C], of the patches alone, not {list(features.shape)}")
    rows, columns = grid
    if features.shape[1] != rows * columns:
        raise ValueError(
            f"features of {features.shape[1]} tokens do not fill a grid of {rows} x {columns} = {rows * columns} "
            "patches: give those of the patches alone, without CLS and registers, as TokenLayout.patches cuts them out"
        )
    if valid is None:
        valid = features.new_ones(features.shape[:2], dtype=torch.bool)
    elif valid.dtype != torch.bool or valid.shape != features.shape[:2]:
        raise ValueError(
            f"valid must be bool {list(features.shape[:2])}, one for each patch, not {valid.dtype} {list(valid.shape)}"
        )
    counts = valid.sum(1).tolist()
    for image, count in enumerate(counts):
        if count < at_least:
            raise ValueError(f"image {image} has {count} valid patches, and at least {at_least} are needed")
    features = features.float().masked_fill(~valid[..., None], 0)
    for image, finite in enumerate(features.isfinite().all(2).all(1).tolist()):
        if not finite:
            raise ValueError(f"features of image {image} are not finite: run the model in fp32 or bf16")
    return features, valid
