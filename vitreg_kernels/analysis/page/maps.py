"""Maps of one image as strips: one picture that holds a tile a block, or a head, of which the page shows one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from ..findings import Findings
from .colours import RING, levels, palette_uri, pixels_uri, ratio_place

# Pixels of a side of a patch where outliers are ringed: enough for a thin ring, as few as large grids allow.
_RINGED_SIDE, _LEAST_CELL, _LARGEST_CELL = 192, 4, 12


TIMES = "\N{MULTIPLICATION SIGN}"


class Strip(NamedTuple):
    """Tiles of one size, one below the other.

    Attributes:
        uri: of the picture.
        tiles: how many.
        shape: rows and columns of patches of one.
        captions: one a tile.
        follows: what chooses the tile: ``"layer"``, ``"head"``, or ``""`` of a single one.
    """

    uri: str
    tiles: int
    shape: tuple[int, int]
    captions: list[str]
    follows: str


def medians(found: Findings) -> np.ndarray:
    """``[layers]``: the median patch norm behind each block; NaN behind one without finite norms."""
    middle = np.full(found.layers, np.nan)
    for row in found.norms:
        if row.tokens == "patches":
            middle[row.layer] = row.median
    return middle


def ratios(found: Findings, norms: np.ndarray) -> np.ndarray:
    """Norms ``[layers, ...]`` as multiples of the median patch of their block, of all images."""
    middle = medians(found)
    # The median of zeros is 0; every norm there is then 0 as well, or far above it.
    return norms / np.maximum(middle, np.finfo(np.float32).tiny).reshape(-1, *[1] * (norms.ndim - 1))


def norm_levels(found: Findings, norms: np.ndarray, outliers: np.ndarray) -> np.ndarray:
    """Norms ``[layers, rows, columns]`` as indices into ``PALETTE``, several to a patch; outliers are ringed."""
    cell = int(np.clip(-(-_RINGED_SIDE // max(norms.shape[1:])), _LEAST_CELL, _LARGEST_CELL))
    tiles = levels(ratio_place(ratios(found, norms))).repeat(cell, 1).repeat(cell, 2)
    inside = np.zeros((cell, cell), bool)
    inside[1:-1, 1:-1] = True
    ring = np.tile(~inside, norms.shape[1:])
    tiles[outliers.repeat(cell, 1).repeat(cell, 2) & ring] = RING
    return tiles


def norm_strip(found: Findings, maps: Mapping[str, np.ndarray], image: int) -> Strip | None:
    """The norm map behind every block."""
    if f"{image}/norms" not in maps or not found.norms:
        return None
    norms = maps[f"{image}/norms"]
    outliers = maps[f"{image}/outliers"] if f"{image}/outliers" in maps else np.zeros(norms.shape, bool)
    tiles = norm_levels(found, norms, outliers)
    largest, ratio = norms.max((1, 2)), ratios(found, norms).max((1, 2))
    captions = [
        f"max {number(largest[i])} ({number(ratio[i])}{TIMES})" + (f"\n{count} outliers" if count else "")
        for i, count in enumerate(outliers.sum((1, 2)))
    ]
    return Strip(palette_uri(np.concatenate(tiles)), len(tiles), norms.shape[1:], captions, "layer")


def prefix_strip(found: Findings, maps: Mapping[str, np.ndarray], image: int) -> Strip | None:
    """The norms of CLS and registers behind every block, from the top down, in the colours of the norm map."""
    if f"{image}/prefix_norms" not in maps or not found.norms or not found.prefix:
        return None
    ratio = ratios(found, maps[f"{image}/prefix_norms"])
    captions = [
        ", ".join(f"{short(name)} {number(x)}{TIMES}" for name, x in zip(found.prefix, row, strict=True))
        for row in ratio
    ]
    uri = palette_uri(levels(ratio_place(ratio)).reshape(-1, 1))
    return Strip(uri, len(ratio), (ratio.shape[1], 1), captions, "layer")


def attention_strip(found: Findings, maps: Mapping[str, np.ndarray], image: int, token: int) -> Strip | None:
    """What one token of the prefix attends to: the mean over heads, then each head; each from 0 to its largest."""
    if f"{image}/attention" not in maps:
        return None
    tiles = maps[f"{image}/attention"][token][None]
    if f"{image}/heads" in maps:
        tiles = np.concatenate([tiles, maps[f"{image}/heads"][token]])
    largest = tiles.max((1, 2))
    scaled = tiles / np.maximum(largest, np.finfo(np.float32).tiny)[:, None, None]
    captions = [f"max {100 * x:.2g}%" for x in largest]
    return Strip(palette_uri(np.concatenate(levels(scaled))), len(tiles), tiles.shape[1:], captions, "head")


def pca_strip(maps: Mapping[str, np.ndarray], image: int) -> Strip | None:
    """The first three principal components as red, green and blue."""
    if f"{image}/pca" not in maps:
        return None
    colours = maps[f"{image}/pca"]
    return Strip(pixels_uri(np.round(np.clip(colours, 0, 1) * 255).astype(np.uint8)), 1, colours.shape[:2], [""], "")


def frequency_strip(found: Findings) -> Strip:
    """At each position the share of images with an outlier there, from 0 to the largest."""
    shares = np.array(found.frequency)
    caption = f"up to {100 * shares.max():.3g}% of {found.images} images"
    uri = palette_uri(levels(shares / max(shares.max(), np.finfo(np.float32).tiny)))
    return Strip(uri, 1, shares.shape, [caption], "")


def short(token: str) -> str:
    """A name that fits a picture: ``"CLS"``, ``"R1"``."""
    return "CLS" if token == "cls" else token.replace("register ", "R")


def number(x: float) -> str:
    """Three digits, and never an exponent."""
    return f"{x:,.3g}" if abs(x) < 1000 else f"{x:,.0f}"


def labelled(found: Findings) -> str:
    """The model's name where there is nothing but text: a planted one says so."""
    return f"{found.name} (planted)" if found.planted and "planted" not in found.name else found.name
