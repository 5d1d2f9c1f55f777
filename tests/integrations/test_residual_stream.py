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

from tests.integrations.models import (  # noqa: E402
    dinov2_vit,
    dinov3_vit,
    hugging_face,
    open_clip_vit,
    perception_vit,
    register_vit,
    scramble,
    timm_dinov3,
    timm_vit,
    torchvision_vit,
)
from tests.integrations.patching import dinov2_like  # noqa: E402


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
        ("DeiT", {}, "layers"),
        ("CLIPVision", {}, "encoder.layers"),
        ("SiglipVision", {}, "encoder.layers"),
    ],
)
def test_transformers(name, options, layers):
    model = hugging_face(name, **options)
    images = torch.randn(2, 3, 64, 64)
    stream = residual_stream(model)
    expected = model(pixel_values=images, output_hidden_states=True).hidden_states[1:]
    assert_same(seen(stream, lambda: model(pixel_values=images)), expected)
    cls_tokens = {"DeiT": 2, "SiglipVision": 0}.get(name, 1)
    registers = options.get("num_register_tokens", 0)
    assert stream.layout == TokenLayout(num_registers=registers, num_cls_tokens=cls_tokens)
    assert stream.layout.num_prefix_tokens + 16 == expected[0].shape[1]
    assert names(stream) == [f"{layers}.0", f"{layers}.1"]


def test_names_begin_at_the_model_that_was_given():
    stream = residual_stream(hugging_face("ViT", kind="ForImageClassification"))
    assert names(stream) == ["vit.layers.0", "vit.layers.1"]
    assert names(residual_stream(hugging_face("Dinov2", kind="Backbone"))) == ["encoder.layer.0", "encoder.layer.1"]


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_model_of_images_and_texts_holds_one(name):
    import transformers

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        text_config={**sizes, "vocab_size": 99}, vision_config={**sizes, "image_size": 64, "patch_size": 16}
    )
    stream = residual_stream(getattr(transformers, f"{name}Model")(config))
    assert names(stream) == ["vision_model.encoder.layers.0", "vision_model.encoder.layers.1"]


@torch.no_grad()
def test_torchvision():
    model = torchvision_vit()
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


@torch.no_grad()
def passing(model, images, *modules, instead=None):
    """The first tensor that each module is called with and that it gives; a module may be made to give another."""
    found = [None] * len(modules)

    def hook(module, args, output, i):
        first = output[0] if isinstance(output, tuple | list) else output
        given = args[0][0] if isinstance(args[0], list) else args[0]
        found[i] = (given, first)

    handles = [m.register_forward_hook(partial(lambda *args, i: hook(*args, i), i=i)) for i, m in enumerate(modules)]
    if instead is not None:
        module, value = instead
        handles.append(module.register_forward_hook(lambda module, args, output: torch.full_like(output, value)))
    model(images)
    for handle in handles:
        handle.remove()
    return found


CASES = {
    "timm": timm_vit,
    "timm, LayerScale, SwiGLU": lambda: timm_vit(
        init_values=0.1, mlp_layer=timm.layers.SwiGLUPacked, act_layer=nn.SiLU
    ),
    "timm, norm behind the pooling": partial(timm_vit, global_pool="avg"),
    "timm Eva": timm_dinov3,
    "timm Eva, SwiGLU": partial(timm_dinov3, swiglu_mlp=True),
    "Dinov2": partial(hugging_face, "Dinov2"),
    "Dinov2, SwiGLU": partial(hugging_face, "Dinov2", use_swiglu_ffn=True),
    "Dinov2WithRegisters": partial(hugging_face, "Dinov2WithRegisters"),
    "DINOv3ViT": partial(hugging_face, "DINOv3ViT", num_register_tokens=4),
    "DINOv3ViT, gated": partial(hugging_face, "DINOv3ViT", use_gated_mlp=True),
    "ViT": partial(hugging_face, "ViT"),
    "DeiT": partial(hugging_face, "DeiT"),
    "CLIPVision": partial(hugging_face, "CLIPVision"),
    "SiglipVision": partial(hugging_face, "SiglipVision"),
    "torchvision": torchvision_vit,
    "open_clip": open_clip_vit,
    "open_clip, norm behind the pooling": partial(open_clip_vit, final_ln_after_pool=True),
    "DINOv2": dinov2_vit,
    "DINOv2, SwiGLU": partial(dinov2_vit, ffn_layer=dinov2_like.SwiGLUFFN),
    "DINOv3": dinov3_vit,
    "perception_models": perception_vit,
    "perception_models, CLS": partial(perception_vit, use_cls_token=True),
    "RegisterViT": partial(register_vit, layer_scale=None),
    "RegisterViT, SwiGLU": partial(register_vit, mlp="swiglu", layer_scale=0.1),
}
POOLED = ("CLIPVision", "open_clip, norm behind the pooling")  # the CLS token, before the final norm


@pytest.mark.parametrize("case", CASES)
def test_the_places_are_what_they_are_called(case):
    """The last linear layer of an MLP adds what it gives, by a factor a channel at most, and nothing else does.

    So the block gives the stream without its MLP where that layer gives 0, and where it gives 1 that factor shows.
    """
    if "open_clip" in case:
        pytest.importorskip("open_clip")
    model, images = CASES[case](), torch.randn(2, 3, 64, 64)
    stream = residual_stream(model)
    blocks = [block for _, block in stream.blocks]
    (given, patches), (normed_input, _), *passed = passing(model, images, stream.patch_embed, stream.norm, *blocks)
    convolution = next(part for part in stream.patch_embed.modules() if isinstance(part, nn.Conv2d))
    expected = nn.functional.conv2d(images, convolution.weight, convolution.bias, 16)  # [2, 128, 4, 4]
    assert torch.equal(given, images)
    as_rows = {(2, 16, 128): expected.flatten(2).mT, (2, 4, 4, 128): expected.permute(0, 2, 3, 1)}
    torch.testing.assert_close(patches, as_rows.get(tuple(patches.shape), expected))
    assert torch.equal(normed_input, passed[-1][1][:, 0] if case in POOLED else passed[-1][1])
    assert torch.equal(passed[1][0], passed[0][1])
    for block, last, (_, behind) in zip(blocks, stream.neurons, passed, strict=True):
        assert isinstance(last, nn.Linear)
        ((neurons, _),) = passing(model, images, last)
        assert neurons.shape == (2, 16 + stream.layout.num_prefix_tokens, last.in_features)
        ((_, without),) = passing(model, images, block, instead=(last, 0.0))
        ((_, with_ones),) = passing(model, images, block, instead=(last, 1.0))
        factor = with_ones - without
        torch.testing.assert_close(factor, factor[:1, :1].expand_as(factor), rtol=1e-4, atol=1e-4)
        added = factor * nn.functional.linear(neurons, last.weight, last.bias)
        torch.testing.assert_close(without + added, behind, rtol=1e-4, atol=1e-4)


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
