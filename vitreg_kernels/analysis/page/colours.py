"""Numbers as colours, and pixels as text that an HTML file can hold."""

from __future__ import annotations

import base64
import io

import numpy as np
from matplotlib import colormaps
from PIL import Image

# Of text and lines in figures; the page puts its own, which turn light on dark paper, in their place.
INK, GRID = "#1f2429", "#d9dde2"
# As far from white as from black, and told apart without red against green.
BLUE, ORANGE, VIOLET, TEAL, PINK, GREY = "#3f83d6", "#d9741a", "#9a6dd7", "#1f9e89", "#d6569a", "#7d8590"
CYCLE = (BLUE, ORANGE, VIOLET, TEAL, PINK, GREY)

# Norms are shown as multiples of the median patch of their block, on this logarithmic range, in every picture of every
# model: the same colour is the same ratio, and a clean model looks clean.
RATIOS = (0.5, 10.0)
RATIO_TICKS = {0.5: "½", 1: "1", 2: "2", 3: "3", 5: "5", 10: "10+"}

# The last colour of the palette rings outliers, so viridis has one less than it could.
RING = 255
_VIRIDIS = np.round(colormaps["viridis"](np.linspace(0.0, 1.0, RING))[:, :3] * 255)
PALETTE = np.concatenate([_VIRIDIS, [[20, 20, 26]]]).astype(np.uint8)


def kind_colour(tokens: str) -> str:
    """The colour of a kind of token: patches, CLS, registers."""
    return BLUE if tokens == "patches" else ORANGE if tokens == "cls" else VIOLET


def levels(values: np.ndarray) -> np.ndarray:
    """Indices into ``PALETTE`` of numbers in [0, 1]; those outside take the nearest end, NaN the upper one."""
    return np.round(np.clip(np.nan_to_num(values, nan=1.0), 0.0, 1.0) * (RING - 1)).astype(np.uint8)


def ratio_place(ratios: np.ndarray | float) -> np.ndarray:
    """Where multiples of the median stand on the scale of norms, 0 to 1 inside ``RATIOS``."""
    low, high = np.log(RATIOS)
    # A token of norm 0 is below the scale, as is everything under its lower end.
    return (np.log(np.maximum(ratios, RATIOS[0])) - low) / (high - low)


def palette_uri(indices: np.ndarray) -> str:
    """Indices into ``PALETTE``, uint8 ``[height, width]``, as a PNG inside a data URI."""
    image = Image.fromarray(indices)
    image.putpalette(PALETTE.tobytes())
    return _uri(image, "PNG", optimize=True)


def pixels_uri(pixels: np.ndarray) -> str:
    """Exact RGB, uint8 ``[height, width, 3]``, as a PNG inside a data URI."""
    return _uri(Image.fromarray(pixels), "PNG", optimize=True)


def photo_uri(pixels: np.ndarray) -> str:
    """A photograph, uint8 ``[height, width, 3]``, inside a data URI; WebP, a tenth of the size of PNG."""
    return _uri(Image.fromarray(pixels), "WEBP", quality=88, method=6)


def _uri(image: Image.Image, kind: str, **options: object) -> str:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
