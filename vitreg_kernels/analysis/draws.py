"""Which tokens the probes look at: one of a kind from each image, or patches with the pixels beneath them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..layout import TokenLayout


class Drawn(NamedTuple):
    """One token of a kind from each image that has one, drawn several times.

    Attributes:
        kind: ``"cls"``, ``"register i"``, ``"normal"`` or ``"outlier"``.
        tokens: ``[repeats, S, C]``, of those S images in order; CLS and registers are the same in every draw.
        has: ``[B]`` bool, the images that have such a token; S of them.
    """

    kind: str
    tokens: Tensor
    has: Tensor

    @property
    def missing(self) -> int:
        """Images without such a token, which are left out."""
        return int((~self.has).sum())

    @classmethod
    def join(cls, parts: Sequence[Drawn]) -> Drawn:
        """Those of one kind from several batches, in order.

        Raises:
            ValueError: if there are none, or they are of several kinds.
        """
        kinds = sorted({part.kind for part in parts})
        if len(kinds) != 1:
            raise ValueError(f"tokens of one kind can be joined, not of {kinds}; join those of each kind apart")
        tokens = torch.cat([part.tokens for part in parts], dim=1)
        return cls(kinds[0], tokens, torch.cat([part.has for part in parts]))


class PatchTokens(NamedTuple):
    """Patch tokens of all images, one after another, and what a linear map might tell of each.

    Attributes:
        tokens: ``[T, C]``.
        pixels: ``[T, channels · patch²]``, as the patch embedding sees them: by channel, then row, then column.
        image: ``[T]`` int64, the index of the image.
        row, column: ``[T]`` int64, in its grid.
        outlier: ``[T]`` bool.
        grids: (rows, columns) of each image.
    """

    tokens: Tensor
    pixels: Tensor
    image: Tensor
    row: Tensor
    column: Tensor
    outlier: Tensor
    grids: list[tuple[int, int]]

    @classmethod
    def join(cls, parts: Sequence[PatchTokens]) -> PatchTokens:
        """Those of several batches, in order, of any grids; the images are counted through.

        Raises:
            ValueError: if there are none.
        """
        if not parts:
            raise ValueError("there are no patch tokens to join")
        grids, images = [], []
        for part in parts:
            images.append(part.image + len(grids))
            grids += part.grids
        tokens, pixels, row, column, outlier = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("tokens", "pixels", "row", "column", "outlier")
        )
        return cls(tokens, pixels, torch.cat(images), row, column, outlier, grids)


def draw_tokens(
    features: Tensor,
    kind: str,
    outliers: Tensor | None,
    layout: TokenLayout,
    *,
    generator: torch.Generator,
    repeats: int = 3,
    valid: Tensor | None = None,
) -> Drawn:
    """One token of a kind from each image, at random where an image has several, ``repeats`` times.

    One generator may go through the batches of a set of images: what is drawn does not depend on their size.

    Args:
        features: ``[B, N, C]``.
        kind: ``"cls"`` (the first one), ``"register i"`` counted from 0, ``"normal"`` or ``"outlier"``.
        outliers: ``[B, M]`` bool; may be None for CLS and registers.
        layout: of the N tokens.
        generator: of the draw, on the CPU.
        repeats: how often to draw.
        valid: ``[B, M]`` bool, patches that show the image; all by default.

    Raises:
        ValueError: if there is no such kind of token in the layout, or shapes do not fit.
    """
    cls, registers, patches = layout.split(features)
    if kind in ("normal", "outlier"):
        chosen = _of_kind(kind, outliers, valid, patches)
        has = chosen.any(1)
        # The largest of random numbers given to all that may be drawn: each as likely as the others.
        chance = torch.rand(len(patches), repeats, patches.shape[1], generator=generator)
        index = chance.masked_fill(~chosen[:, None], -1).argmax(2)[has]
        tokens = patches[has].gather(1, index[..., None].expand(-1, -1, patches.shape[2])).transpose(0, 1)
        return Drawn(kind, tokens, has)
    register = re.fullmatch(r"register (\d+)", kind)
    if kind == "cls" and layout.num_cls_tokens:
        token = cls[:, 0]
    elif register and int(register[1]) < layout.num_registers:
        token = registers[:, int(register[1])]
    else:
        known = ["cls"] * bool(layout.num_cls_tokens) + [f"register {i}" for i in range(layout.num_registers)]
        raise ValueError(f"kind must be one of {[*known, 'normal', 'outlier']} for this layout, not {kind!r}")
    return Drawn(kind, token.expand(repeats, -1, -1), torch.ones(len(features), dtype=torch.bool))


def draw_patches(
    features: Tensor,
    images: Tensor,
    outliers: Tensor,
    layout: TokenLayout,
    grid: tuple[int, int],
    *,
    generator: torch.Generator,
    per_image: int | None = None,
    valid: Tensor | None = None,
) -> PatchTokens:
    """Patch tokens of each image with their positions and pixels: all of them, or so many at random.

    Args:
        features: ``[B, N, C]``.
        images: ``[B, channels, height, width]``, as the model saw them.
        outliers: ``[B, M]`` bool.
        layout: of the N tokens.
        grid: rows and columns of the M patches.
        generator: of the draw, on the CPU.
        per_image: at most so many patches of an image, drawn without regard to outliers; all if None.
        valid: ``[B, M]`` bool, patches that show the image; all by default.

    Raises:
        ValueError: if shapes do not fit.
    """
    patches = layout.split(features).patches
    rows, columns = grid
    size = images.shape[-1] // columns if images.dim() == 4 and columns else 0
    if rows * columns != patches.shape[1] or images.shape[0] != len(patches):
        raise ValueError(
            f"{len(patches)} images with {patches.shape[1]} patches do not fit a grid of {rows}x{columns} and images "
            f"of shape {tuple(images.shape)}; give the grid and the images of these features"
        )
    beneath = patchify(images, size)
    if beneath.shape[1] != patches.shape[1]:
        raise ValueError(f"images of {images.shape[-2]}x{images.shape[-1]} do not make {rows}x{columns} square patches")
    chosen = _of_kind("any", outliers, valid, patches)
    if per_image is not None and per_image < patches.shape[1]:
        chance = torch.rand(chosen.shape, generator=generator).masked_fill(~chosen, -1)
        chosen = chosen & torch.zeros_like(chosen).scatter(1, chance.topk(per_image, dim=1).indices, True)
    image, index = chosen.nonzero(as_tuple=True)
    return PatchTokens(
        patches[image, index],
        beneath[image, index],
        image,
        index // columns,
        index % columns,
        outliers[image, index],
        [(rows, columns)] * len(patches),
    )


def patchify(images: Tensor, patch: int) -> Tensor:
    """The pixels of each patch: ``[B, channels, height, width]`` to ``[B, M, channels · patch²]``.

    Patches row by row; in a patch by channel, then row, then column, as the weights of a patch embedding are stored.
    ``images.reshape(B, M, -1)`` has the same shape and other numbers: stripes of one channel, which lie in no patch.

    Raises:
        ValueError: if the images have another rank, or sides that are no multiple of the patch size.
    """
    if images.dim() != 4 or patch < 1 or images.shape[2] % patch or images.shape[3] % patch:
        raise ValueError(
            f"images must be [B, channels, height, width] with sides that are multiples of the patch size {patch}, not "
            f"of shape {tuple(images.shape)}"
        )
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


def _of_kind(kind: str, outliers: Tensor | None, valid: Tensor | None, patches: Tensor) -> Tensor:
    """``[B, M]`` bool: the valid patches that are outliers, normal, or either."""
    valid = torch.ones(patches.shape[:2], dtype=torch.bool) if valid is None else valid
    for name, mask in (("outliers", outliers), ("valid", valid)):
        if mask is None or mask.dtype != torch.bool or mask.shape != patches.shape[:2]:
            given = None if mask is None else f"{mask.dtype} of shape {tuple(mask.shape)}"
            raise ValueError(
                f"{name} must be bool of shape {tuple(patches.shape[:2])}, one for each patch, not {given}"
            )
    return {"normal": valid & ~outliers, "outlier": valid & outliers, "any": valid}[kind]
