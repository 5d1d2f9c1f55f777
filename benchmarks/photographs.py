"""Real photographs that come inside scikit-image and scikit-learn: nothing is downloaded."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


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


def load(names: tuple[str, ...] = NAMES, size: int = 224) -> Tensor:
    """The named photographs, cropped to their central square and resized.

    Returns:
        ``[len(names), 3, size, size]`` fp32, RGB in [0, 1].
    """
    return torch.cat([_square(_READERS[name](), size) for name in names])


def normalize(images: Tensor) -> Tensor:
    """RGB in [0, 1] ``[B, 3, height, width]`` to what ViTs are trained on: ImageNet's mean 0 and deviation 1."""
    mean, std = (images.new_tensor(x).view(1, 3, 1, 1) for x in (IMAGENET_MEAN, IMAGENET_STD))
    return (images - mean) / std


def _square(pixels: np.ndarray, size: int) -> Tensor:
    image = torch.from_numpy(pixels.copy()).permute(2, 0, 1).unsqueeze(0).float() / 255
    height, width = image.shape[-2:]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    image = image[..., top : top + side, left : left + side]
    resized = F.interpolate(image, (size, size), mode="bicubic", antialias=True, align_corners=False)
    return resized.clamp(0, 1)  # bicubic overshoots at edges
