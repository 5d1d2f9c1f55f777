"""residual_stream finds the tokens that each library's model itself says are its hidden states."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from vitreg_kernels import RegisterViT, TokenLayout, ViTConfig
from vitreg_kernels.integrations import residual_stream
from vitreg_kernels.integrations.residual_stream import unwrapped

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

from tests.integrations.models import hugging_face, scramble, timm_dinov3, timm_vit  # noqa: E402


@torch.no_grad()
def seen(stream, run):
    """What the layers of a stream give while ``run`` runs."""
    found = []
    hooks = [module.register_forward_hook(lambda *args: found.append(args[2])) for _, module in stream.layers]
    run()
    for hook in hooks:
        hook.remove()
    return found


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def names(stream):
    return [name for name, _ in stream.layers]


@torch.no_grad()
@pytest.mark.parametrize(
    ("build", "registers", "cls_tokens"),
    [
        (partial(timm_vit), 0, 1),
        (partial(timm_vit, reg_tokens=3, no_embed_class=True), 3, 1),
        (partial(timm_vit, reg_tokens=3, class_token=False, global_pool="avg"), 3, 0),
        (partial(timm_dinov3), 4, 1),
    ],
)
def test_timm(build, registers, cls_tokens):
    model = build()
    images = torch.randn(2, 3, 64, 64)
    stream = residual_stream(model)
    options = {"output_fmt": "NLC", "return_prefix_tokens": True, "intermediates_only": True, "norm": False}
    expected = [torch.cat(pair[::-1], dim=1) for pair in model.forward_intermediates(images, **options)]
    assert_same(seen(stream, lambda: model(images)), expected)
    assert stream.layout == TokenLayout(num_registers=registers, num_cls_tokens=cls_tokens)
    assert names(stream) == ["blocks.0", "blocks.1"]


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options", "layers"),
    [
        ("Dinov2", {}, "encoder.layer"),
        ("Dinov2WithRegisters", {"num_register_tokens": 3}, "encoder.layer"),
        ("DINOv3ViT", {"num_register_tokens": 3}, "model.layer"),
        ("ViT", {}, "layers"),
    ],
)
def test_transformers(name, options, layers):
    model = hugging_face(name, **options)
    images = torch.randn(2, 3, 64, 64)
    stream = residual_stream(model)
    expected = model(pixel_values=images, output_hidden_states=True).hidden_states[1:]
    assert_same(seen(stream, lambda: model(pixel_values=images)), expected)
    assert stream.layout == TokenLayout(num_registers=options.get("num_register_tokens", 0))
    assert names(stream) == [f"{layers}.0", f"{layers}.1"]


def test_names_begin_at_the_model_that_was_given():
    stream = residual_stream(hugging_face("ViT", kind="ForImageClassification"))
    assert names(stream) == ["vit.layers.0", "vit.layers.1"]
    assert names(residual_stream(hugging_face("Dinov2", kind="Backbone"))) == ["encoder.layer.0", "encoder.layer.1"]


@torch.no_grad()
def test_torchvision():
    from torchvision.models import VisionTransformer

    model = scramble(VisionTransformer(64, 16, num_layers=2, num_heads=2, hidden_dim=128, mlp_dim=256))
    stream = residual_stream(model)
    found = seen(stream, lambda: model(torch.randn(2, 3, 64, 64)))
    assert [x.shape for x in found] == [(2, 17, 128)] * 2
    assert (names(stream)[-1], stream.layout) == ("encoder.layers.encoder_layer_1", TokenLayout(num_registers=0))


class BlockChunk(nn.ModuleList):
    def forward(self, x):
        for block in self:
            x = block(x)
        return x


class DinoVisionTransformer(nn.Module):
    """DINOv2's (with ``num_register_tokens``) or DINOv3's (with ``n_storage_tokens``), what residual_stream reads."""

    def __init__(self, blocks, **attributes):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.patch_embed, self.norm = nn.Identity(), nn.Identity()
        for name, value in attributes.items():
            setattr(self, name, value)


def test_dinov2():
    blocks = [nn.Linear(2, 2) for _ in range(4)]
    plain = DinoVisionTransformer(blocks, chunked_blocks=False, num_register_tokens=4)
    assert residual_stream(plain)[:2] == (
        [(f"blocks.{i}", block) for i, block in enumerate(blocks)],
        TokenLayout(num_registers=4),
    )
    chunks = [BlockChunk(blocks[:2]), BlockChunk([nn.Identity(), nn.Identity(), *blocks[2:]])]
    chunked = DinoVisionTransformer(chunks, chunked_blocks=True, num_register_tokens=0)
    expected = zip(("blocks.0.0", "blocks.0.1", "blocks.1.2", "blocks.1.3"), blocks, strict=True)
    assert residual_stream(chunked)[:2] == (list(expected), TokenLayout(num_registers=0))


def test_dinov3():
    model = DinoVisionTransformer([nn.Linear(2, 2)], chunked_blocks=False, n_storage_tokens=4)
    assert residual_stream(model)[:2] == ([("blocks.0", model.blocks[0])], TokenLayout(num_registers=4))


@torch.no_grad()
def test_register_vit_gives_norms_alone_or_within_another_model():
    """Its blocks leave their last branch for the next to add, so what they give is not the stream."""
    config = ViTConfig(image_size=28, dim=128, depth=2, num_heads=2, num_registers=3, layer_scale=1.0)
    model = scramble(RegisterViT(config))
    images = torch.randn(2, 3, 28, 28)
    tokens = [torch.cat(groups, dim=1) for groups in model.intermediate_layers(images, 2, norm=False)]
    for whole, prefix in ((model, ""), (nn.Sequential(nn.Identity(), model), "1.")):
        stream = residual_stream(whole)
        found = seen(stream, lambda whole=whole: whole(images))
        assert names(stream) == [f"{prefix}{name}" for name in ("embedding", "blocks.0", "blocks.1")]
        assert stream.layout == TokenLayout(num_registers=3)
        assert len(found) == 3
        for norms, x in zip(found[1:], tokens, strict=True):
            torch.testing.assert_close(norms, x.norm(dim=-1))


class FullyShardedVisionTransformer(timm.models.VisionTransformer):
    """As FSDP2 makes a class of its own out of a model's."""


def test_under_wrappers_and_subclasses(tmp_path):
    model = timm_vit()
    expected = residual_stream(model)
    for wrapped in (torch.compile(model), nn.DataParallel(model), torch.compile(nn.DataParallel(model))):
        assert residual_stream(wrapped) == expected
        assert unwrapped(wrapped) is model
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    try:
        assert residual_stream(nn.parallel.DistributedDataParallel(model)) == expected
    finally:
        torch.distributed.destroy_process_group()
    model.__class__ = FullyShardedVisionTransformer
    assert residual_stream(model) == expected


def test_models_unknown_or_many():
    assert residual_stream(nn.TransformerEncoderLayer(8, 2)) is None
    pair = nn.ModuleDict({"student": timm_vit(), "teacher": timm_vit()})
    with pytest.raises(ValueError, match="ModuleDict holds several Vision Transformers, student, teacher: give one"):
        residual_stream(pair)
    text = nn.TransformerEncoderLayer(8, 2)
    assert names(residual_stream(nn.ModuleDict({"text": text, "visual": timm_vit(depth=1)}))) == ["visual.blocks.0"]
