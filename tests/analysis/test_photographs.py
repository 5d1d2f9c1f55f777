"""The photographs are real, local, square and normalised as ViTs expect."""

from __future__ import annotations

import socket
import sys

import numpy as np
import pytest
import torch

from vitreg_kernels.analysis import photographs
from vitreg_kernels.analysis.images import IMAGENET_MEAN, IMAGENET_STD, ImageFolder, normalize

pytest.importorskip("skimage", reason="the photographs come inside scikit-image")
pytest.importorskip("sklearn", reason="the photographs come inside scikit-learn")


@pytest.fixture(scope="module")
def images():
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*_):
            raise AssertionError("a photograph was looked for on the network")

        patch.setattr(socket.socket, "connect", refuse)
        return photographs.load(size=56)


def test_all_load_without_a_network(images):
    assert images.shape == (len(photographs.NAMES), 3, 56, 56)
    assert images.dtype == torch.float32
    assert images.min() >= 0
    assert images.max() <= 1


def test_each_is_a_photograph_of_its_own(images):
    assert images.flatten(1).std(1).min() > 0.1
    assert torch.pdist(images.flatten(1)).min() > 10


def test_the_centre_is_cropped_and_nothing_is_stretched():
    from skimage import data

    pixels = data.chelsea()  # 300 x 451
    (cat,) = photographs.load(("cat",), size=300)
    np.testing.assert_allclose(cat.permute(1, 2, 0).numpy(), pixels[:, 75:375] / 255.0, atol=1e-6)


def test_normalize_is_imagenets():
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    images = torch.stack((mean, mean + std)).view(2, 3, 1, 1)
    expected = torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    torch.testing.assert_close(normalize(images), expected)


def test_they_are_there_as_shipped(images):
    """Uncropped, as ``ImageFolder`` takes them, which crops them as ``load`` does."""
    read = photographs.read()
    assert [name for name, _ in read] == list(photographs.NAMES)
    assert dict(read)["cat"].shape == (300, 451, 3)
    folder = ImageFolder(read, size=56, patch=14)
    assert torch.equal(torch.stack([image.pixels for image in folder]), images)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(ModuleNotFoundError, match=r"skimage is not installed: run `pip install 'vitreg_kernels\["):
        photographs.read(("cat",))
