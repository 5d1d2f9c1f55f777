"""Images as a Vision Transformer takes them, and the way back from its pixels to those of the image."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from operator import attrgetter
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

Fit = Literal["crop", "resize", "pad"]
Box = tuple[int, int, int, int]
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Image.init()
# Of what Pillow can read the formats of photographs: others start programs (EPS) or are no pictures.
_FORMATS = [
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF", "PPM", "JPEG2000")
    if name in Image.OPEN
]
SUFFIXES = frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in _FORMATS)
_LONGEST = 16  # times the shorter side, with fit="resize": the tokens of one image grow with it


class Placement(NamedTuple):
    """How an image became pixels: a window of it, resized, which begins at the top left of what the model sees.

    The image is upright here, turned by its EXIF orientation as every viewer shows it. Boxes are (left, top, right,
    bottom), the right and bottom edges exclusive, so that edges scale as the sides do.

    Attributes:
        window: the part of the image that is seen, in its pixels.
        height, width: of what this became, in pixels of the model; what is right of it or below is padding.
    """

    window: Box
    height: int
    width: int

    @classmethod
    def of(cls, width: int, height: int, *, size: int, fit: Fit, patch: int) -> Placement:
        """That of an image of ``width`` x ``height`` pixels; the others are those of ``ImageFolder``.

        Raises:
            ValueError: if the image has no pixels, or too few of one side for the other.
        """
        if not (width and height):
            raise ValueError(f"its size is {width} x {height}: it has no pixels")
        shorter, longer = sorted((width, height))
        if fit == "crop":
            left, top = (width - shorter) // 2, (height - shorter) // 2
            return cls((left, top, left + shorter, top + shorter), size, size)
        whole = (0, 0, width, height)
        if fit == "pad":
            placement = cls(whole, *(round(side * size / longer) for side in (height, width)))
            if 2 * min(placement[1:]) < patch:
                raise ValueError(f"it is {width} x {height}, at {size} px less than half a patch high or wide")
            return placement
        if longer > _LONGEST * shorter:
            raise ValueError(f"it is {width} x {height}, more than 1 : {_LONGEST}: give fit='crop' or fit='pad'")
        return cls(whole, *(patch * round(side * size / (shorter * patch)) for side in (height, width)))

    def to_image(self, box: Box) -> Box:
        """A box in pixels of the model in those of the image, rounded, without what of it lies on padding."""
        return _mapped(box, (0, 0, self.width, self.height), self.window)

    def to_pixels(self, box: Box) -> Box:
        """A box in pixels of the image in those of the model, rounded, without what of it lies outside the window;
        empty, its right edge not behind its left or its bottom not below its top, if all of it does."""
        return _mapped(box, self.window, (0, 0, self.width, self.height))


class Loaded(NamedTuple):
    """One image.

    Attributes:
        path: of the file, or the name of the array.
        pixels: ``[3, height, width]`` fp32, RGB in [0, 1]; padding has the mean, which normalisation makes 0.
        placement: where each of them comes from.
        valid: ``[M]`` bool, the patches of which at least half shows the image.
        size: width and height of the upright image.
        grid: rows and columns of patches.
    """

    path: str
    pixels: Tensor
    placement: Placement
    valid: Tensor
    size: tuple[int, int]
    grid: tuple[int, int]


class ImageBatch(NamedTuple):
    """Images of one grid.

    Attributes:
        images: each of them.
        pixels: ``[B, 3, height, width]`` fp32, what the model takes: normalised, 0 where there is padding.
    """

    images: list[Loaded]
    pixels: Tensor

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of patches."""
        return self.images[0].grid

    @property
    def valid(self) -> Tensor:
        """``[B, M]`` bool, the patches of which at least half shows the image."""
        return torch.stack([image.valid for image in self.images])


class ImageFolder:
    """The images of a folder and of the folders in it, sorted by path; or one file, or arrays.

    Read by Pillow: turned by their EXIF orientation; grey, palettes, CMYK and 16 bits made RGB; transparent pixels laid
    on white; of animations the first picture. Colour profiles are not applied. A file that cannot be read is left out,
    and so is one that Pillow takes for a decompression bomb.

    Args:
        root: a folder, a file, or pairs of a name and a uint8 array ``[height, width]`` or ``[height, width, 3 or 4]``.
        size: of the shorter side in pixels, a multiple of ``patch``; with ``"pad"`` of the longer.
        patch: side of a patch in pixels.
        fit: ``"crop"`` takes the central square. ``"resize"`` takes all of the image and keeps its aspect, up to the
            rounding of the sides to multiples of ``patch``, so that grids differ. ``"pad"`` takes all of it, and adds
            zeros on the right or below that make it a square.
        mean, std: of each channel, which normalisation makes 0 and 1.
        limit: take only the first so many images that can be read.

    Attributes:
        paths: of the files, or the names of the arrays; some of them may turn out to be unreadable.
        skipped: why each file was left out, by path, as far as the images were read.

    Raises:
        ValueError: if an argument is out of range, an array is of another kind, or the folder has no images.
        FileNotFoundError: if there is no such file or folder.
    """

    def __init__(
        self,
        root: str | Path | Sequence[tuple[str, np.ndarray]],
        *,
        size: int,
        patch: int,
        fit: Fit = "crop",
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        limit: int | None = None,
    ) -> None:
        if fit not in get_args(Fit):
            raise ValueError(f"fit must be one of {', '.join(map(repr, get_args(Fit)))}, not {fit!r}")
        if size < patch or size % patch:
            below = max(patch, size - size % patch)
            raise ValueError(f"size={size} must be a multiple of the patch size {patch}, as {below} or {below + patch}")
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit} must be at least 1")
        self.size, self.patch, self.fit, self.limit = size, patch, fit, limit
        self.mean, self.std = mean, std
        self.skipped: dict[str, str] = {}
        self._sources: list[tuple[str, Path | np.ndarray]] = (
            [(str(path), path) for path in self._files(Path(root))]
            if isinstance(root, str | Path)
            else [(name, _checked(name, array)) for name, array in root]
        )
        if not self._sources:
            why = [f"{path}: {why}" for path, why in self.skipped.items()]
            kinds = f"their names would end in {', '.join(sorted(SUFFIXES))}"
            of_folder = f"there are no images in {root}: {(why or [kinds])[0]}"
            raise ValueError(of_folder if isinstance(root, str | Path) else "no images were given")

    @property
    def paths(self) -> list[str]:
        return [name for name, _ in self._sources]

    def __len__(self) -> int:
        """How many images there are at most."""
        return min(len(self._sources), self.limit or len(self._sources))

    def __iter__(self) -> Iterator[Loaded]:
        """The images that can be read, in order, one in memory at a time.

        Raises:
            ValueError: in the end, if none could be read.
        """
        image = None
        for image in islice(self._loaded(), self.limit):
            yield image
        if image is None:
            name, why = next(iter(self.skipped.items()))
            raise ValueError(f"none of the {len(self._sources)} images can be read; {name}: {why}")

    def batches(self, batch_size: int) -> Iterator[ImageBatch]:
        """The images in order. A batch ends where the next image has another grid, so that it may be smaller.

        Raises:
            ValueError: if ``batch_size`` is below 1; in the end, if no image could be read.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        for _, images in groupby(self, attrgetter("grid")):
            while batch := list(islice(images, batch_size)):
                pixels = normalize(torch.stack([image.pixels for image in batch]), self.mean, self.std)
                yield ImageBatch(batch, pixels)

    def _files(self, root: Path) -> list[Path]:
        if not root.exists():
            raise FileNotFoundError(f"there is no file or folder {root}")

        def unreadable(error: OSError) -> None:
            self.skipped[str(error.filename)] = f"the folder cannot be read: {error.strerror}"

        found = (Path(folder, name) for folder, _, names in os.walk(root, onerror=unreadable) for name in names)
        files = sorted(path for path in found if path.suffix.lower() in SUFFIXES) if root.is_dir() else [root]
        kept = []
        for path in files:
            shown = os.fsencode(path).decode("utf-8", "backslashreplace")
            if shown == str(path):
                kept.append(path)
            else:  # neither JSON nor HTML can hold such a name
                self.skipped[shown] = "its name is not UTF-8: rename it"
        return kept

    def _loaded(self) -> Iterator[Loaded]:
        for name, source in self._sources:
            try:
                yield self._load(name, source)
            except MemoryError:
                raise
            except Exception as error:  # what garbage makes a decoder say is of any kind
                self.skipped[name] = _reason(source, error)

    def _load(self, name: str, source: Path | np.ndarray) -> Loaded:
        with warnings.catch_warnings():
            # Pillow refuses the largest files by itself, and warns of those that take half a gigabyte.
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(source, formats=_FORMATS) if isinstance(source, Path) else Image.fromarray(source)
        with image:
            upright = ImageOps.exif_transpose(image)
            placement = Placement.of(*upright.size, size=self.size, fit=self.fit, patch=self.patch)
            seen = placed(upright, placement)
        if self.fit == "pad":
            canvas = torch.tensor(self.mean).view(3, 1, 1).repeat(1, self.size, self.size)
            canvas[:, : placement.height, : placement.width] = seen
            seen = canvas
        grid = (seen.shape[1] // self.patch, seen.shape[2] // self.patch)
        shown = [
            (filled - self.patch * torch.arange(count)).clamp(0, self.patch)
            for filled, count in zip(placement[1:], grid, strict=True)
        ]
        valid = 2 * torch.outer(*shown) >= self.patch**2
        return Loaded(name, seen, placement, valid.flatten(), upright.size, grid)


def placed(image: Image.Image, placement: Placement) -> Tensor:
    """What a model sees of an image: ``[3, height, width]`` fp32, RGB in [0, 1], resized by antialiased cubics."""
    values = torch.from_numpy(_rgb(image.crop(placement.window))).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(values, placement[1:], mode="bicubic", antialias=True, align_corners=False)
    return resized[0].clamp(0, 1)  # cubics overshoot at edges


def normalize(images: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD) -> Tensor:
    """RGB in [0, 1] ``[B, 3, height, width]`` to what a model is trained on: of each channel mean 0, deviation 1."""
    mean, std = (images.new_tensor(x).view(1, 3, 1, 1) for x in (mean, std))
    return (images - mean) / std


def _checked(name: str, array: np.ndarray) -> np.ndarray:
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ValueError(
            f"the image {name} must be uint8 [height, width] or [height, width, 3 or 4], not {array.dtype} of shape "
            f"{array.shape}"
        )
    return array


def _rgb(image: Image.Image) -> np.ndarray:
    """``[height, width, 3]`` fp32 in [0, 1]."""
    if image.mode.startswith(("I", "F")):
        # Pillow's own conversion cuts these off at 255.
        grey = np.asarray(image)
        if grey.dtype.kind == "f" or grey.max() > 65535 or grey.min() < 0:
            raise ValueError(f"its values, {grey.dtype}, have no known white: save it with 8 or 16 bits")
        return np.repeat(grey.astype(np.float32)[:, :, None] / 65535, 3, axis=2)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"), dtype=np.float32) / 255


def _mapped(box: Box, source: Box, target: Box) -> Box:
    """A box as it lies in ``source``, in ``target``: its edges scaled, rounded and cut off."""
    edges = []
    for i, edge in enumerate(box):
        first, last, low, high = source[i % 2], source[i % 2 + 2], target[i % 2], target[i % 2 + 2]
        edges.append(min(max(round(low + (edge - first) * (high - low) / (last - first)), low), high))
    return tuple(edges)


def _reason(source: Path | np.ndarray, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return "it has more pixels than Pillow holds for safe: make it smaller"
    if isinstance(error, UnidentifiedImageError):
        empty = isinstance(source, Path) and not source.stat().st_size
        return "it is empty" if empty else f"it is no image of a format known, of {', '.join(_FORMATS)}"
    return " ".join(str(error).split()) or type(error).__name__
