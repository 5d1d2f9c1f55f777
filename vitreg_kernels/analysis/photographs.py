"""Real photographs that come inside scikit-image and scikit-learn: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .images import Placement, placed


def _scikit_image(name: str) -> np.ndarray:
    from skimage import data

    image = getattr(data, name)()
    return image[0] if isinstance(image, tuple) else image  # of a stereo pair, the left


def _scikit_learn(name: str) -> np.ndarray:
    from sklearn.datasets import load_sample_image

    return load_sample_image(name)


_READERS: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": partial(_scikit_image, "astronaut"),
    "cat": partial(_scikit_image, "chelsea"),
    "coffee": partial(_scikit_image, "coffee"),
    "motorcycle": partial(_scikit_image, "stereo_motorcycle"),
    "temple": partial(_scikit_learn, "china.jpg"),
    "flower": partial(_scikit_learn, "flower.jpg"),
    "rocket": partial(_scikit_image, "rocket"),
    "retina": partial(_scikit_image, "retina"),
}
NAMES: tuple[str, ...] = tuple(_READERS)


def read(names: Sequence[str] = NAMES) -> list[tuple[str, np.ndarray]]:
    """The named photographs as they are shipped, ``[height, width, 3]`` uint8, each with its name; ``ImageFolder``
    takes them.

    Raises:
        ModuleNotFoundError: if scikit-image or scikit-learn is not installed.
    """
    try:
        return [(name, _READERS[name]()) for name in names]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"the photographs come inside scikit-image and scikit-learn, and {error.name} is not installed: run "
            "`pip install 'vitreg_kernels[analysis,demo]'`, or give images of your own"
        ) from error


def load(names: Sequence[str] = NAMES, size: int = 224) -> Tensor:
    """The named photographs, cropped to their central square and resized.

    Returns:
        ``[len(names), 3, size, size]`` fp32, RGB in [0, 1].

    Raises:
        ModuleNotFoundError: if scikit-image or scikit-learn is not installed.
    """
    images = [Image.fromarray(pixels) for _, pixels in read(names)]
    return torch.stack([placed(x, Placement.of(*x.size, size=size, fit="crop", patch=1)) for x in images])
