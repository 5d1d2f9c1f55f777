"""Blocks of DINOv2, DINOv3, torchvision, open_clip and transformers' further layers with ``level="block"``."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.patching import dinov2_like, dinov3_like
from tests.integrations.patching.judge import (
    DTYPES,
    assert_close,
    assert_same_numbers,
    called,
    converted,
    in_autocast,
    op_calls,
    results,
    scrambled,
)
from vitreg_kernels import patch, unpatch
from vitreg_kernels.integrations.patching.method import fused_method
from vitreg_kernels.measure.accuracy import same_bits

transformers = pytest.importorskip("transformers")
open_clip = pytest.importorskip("open_clip")
vision_transformer = pytest.importorskip("torchvision.models.vision_transformer")

DIM, HEADS, PREFIX, TOKENS = 64, 4, 5, 21
FUSED = {"level": "block"}
SCALED = {"init_values": 0.5}


def rope(patches: int = TOKENS - PREFIX) -> tuple[Tensor, Tensor]:
    angles = (torch.rand(patches, DIM // HEADS // 2) * 6).repeat(1, 2)
    return angles.sin(), angles.cos()


def tower() -> nn.Module:
    return open_clip.transformer.VisionTransformer(32, 8, DIM, 1, HEADS, 2.0, output_dim=32, ls_init_value=0.5)


def encoder(**options) -> nn.Module:
    return vision_transformer.VisionTransformer(32, 8, 1, HEADS, DIM, 2 * DIM, num_classes=10, **options)


# A module with one block, and what it is called with beside x.
CASES = {
    "dinov2": (partial(dinov2_like.NestedTensorBlock, DIM, HEADS), dict),
    "dinov2, LayerScale": (partial(dinov2_like.NestedTensorBlock, DIM, HEADS, **SCALED), dict),
    "dinov2 Block": (partial(dinov2_like.Block, DIM, HEADS, **SCALED), dict),
    "dinov3": (partial(dinov3_like.SelfAttentionBlock, DIM, HEADS, qkv_bias=True), dict),
    "dinov3, LayerScale": (
        partial(dinov3_like.SelfAttentionBlock, DIM, HEADS, **SCALED),
        lambda: {"rope_or_rope_list": rope()},
    ),
    "torchvision": (encoder, dict),
    "open_clip": (tower, dict),
}
SIZES = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_hidden_layers": 1, "intermediate_size": 96}
MODELS = ("ViT", "DeiT", "IJepa", "ViTMSN", "CLIPVision", "SiglipVision", "MetaClip2Vision")


def hugging_face(name: str, **options) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**SIZES, image_size=32, patch_size=8, **options)
    return scrambled(getattr(transformers, f"{name}Model")(config)).eval()


def inputs(case: str) -> Tensor:
    return torch.randn(2, 3, 32, 32) if case in ("torchvision", "open_clip") else torch.randn(2, TOKENS, DIM)


@pytest.mark.parametrize("way", [*DTYPES, "autocast"], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_output_and_gradients(case, way):
    make, call = CASES[case]
    seen = assert_same_numbers(
        scrambled(make()),
        inputs(case),
        converted(call(), torch.float32 if way == "autocast" else way),
        torch.float32 if way == "autocast" else way,
        call=in_autocast(called) if way == "autocast" else called,
        calls=2,
        **FUSED,
    )
    assert [each.op for each in seen][-1] == "residual_layer_norm"
    assert (seen[-1].options["layer_scale"] is not None) == (case == "open_clip" or "Scale" in case or "Block" in case)


def last_hidden_state(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


@pytest.mark.parametrize("way", [*DTYPES, "autocast"], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models_of_transformers(name, way):
    model = hugging_face(name, **({"vision_use_head": False} if name == "SiglipVision" else {}))
    assert_same_numbers(
        model,
        torch.randn(4, 3, 32, 32),
        dtype=torch.float32 if way == "autocast" else way,
        call=in_autocast(last_hidden_state) if way == "autocast" else last_hidden_state,
        calls=2,
        **FUSED,
    )


def features(model: nn.Module, x: Tensor) -> Tensor:
    output = model(x)
    return output if isinstance(output, Tensor) else output.last_hidden_state


def test_dropout_draws_what_it_drew():
    """Beside the same attention: torchvision gives its own with the images innermost, and draws in that order."""
    for model in (hugging_face("ViT", hidden_dropout_prob=0.3), scrambled(encoder(dropout=0.3))):
        x = torch.randn(2, 3, 32, 32)
        patch(model.train())
        expected = results(model, x, call=features)
        patch(model, **FUSED)
        assert_close(results(model, x, call=features), expected)


@pytest.mark.parametrize("case", ["dinov2, LayerScale", "dinov3, LayerScale"])
def test_stochastic_depth_is_the_classs_own(case):
    """It takes a part of the images, which this library would compute for all."""
    make, call = CASES[case]
    module, x, options = scrambled(make(drop_path=0.4)).train(), torch.randn(8, TOKENS, DIM), call()
    expected = results(module, x, options)
    patch(module, **FUSED)
    with op_calls() as seen:
        actual = results(module, x, options)
    assert_close(actual, expected)
    assert not [each for each in seen if each.op == "residual_layer_norm"]
    with op_calls() as seen, torch.no_grad():
        module.eval()(x, **options)
    assert [each.op for each in seen] == ["register_attention_qkv", "residual_layer_norm"]


def test_lists_of_crops():
    """DINOv3's run block by block, DINOv2's are the class's: their attention is one packed call."""
    crops = [torch.randn(2, 21, DIM), torch.randn(4, 14, DIM)]
    ropes = {"rope_or_rope_list": [rope(16), rope(9)]}
    for make, options, ops in (
        (CASES["dinov3, LayerScale"][0], ropes, 2 * ["register_attention_qkv", "residual_layer_norm"]),
        (CASES["dinov3"][0], {}, 2 * ["register_attention_qkv", "residual_layer_norm"]),
        (CASES["dinov2, LayerScale"][0], {}, ["register_attention_qkv"]),
    ):
        module = scrambled(make())
        expected = results(module, crops, options)
        patch(module, **FUSED)
        with op_calls() as seen:
            actual = results(module, crops, options)
        assert_close(actual, expected)
        assert [each.op for each in seen] == ops


@pytest.mark.parametrize("name", ["ln_2", "norm2", "layernorm_after", "layer_norm2"])
def test_a_hooked_norm_is_called(name):
    makes = {
        "ln_2": encoder,
        "norm2": CASES["dinov2"][0],
        "layernorm_after": partial(hugging_face, "ViT"),
        "layer_norm2": partial(hugging_face, "CLIPVision"),
    }
    model = scrambled(makes[name]())
    x = torch.randn(2, TOKENS, DIM) if name == "norm2" else torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        theirs = copy.deepcopy(model)(x)
        patch(model, **FUSED)
        seen = []
        (norm,) = (part for path, part in model.named_modules() if path.endswith(name))
        norm.register_forward_hook(lambda _, __, output: seen.append(output))
        with op_calls() as calls:
            ours = model(x)
    assert len(seen) == 1
    assert not [call for call in calls if call.op == "residual_layer_norm"]
    theirs, ours = (getattr(each, "last_hidden_state", each) for each in (theirs, ours))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_text_is_left_alone():
    text = {**SIZES, "vocab_size": 99, "eos_token_id": 98}
    config = transformers.CLIPConfig(text_config=text, vision_config={**SIZES, "image_size": 32, "patch_size": 8})
    report = patch(transformers.CLIPModel(config), **FUSED)
    layers = [each for each in report.modules if each.cls == "CLIPEncoderLayer"]
    assert [(each.name.partition("_")[0], each.reason) for each in layers] == [
        ("text", "of the text part"),
        ("vision", ""),
    ]


class WithMore(dinov2_like.NestedTensorBlock):
    """Whose forward is DINOv2's, and which has another part, so its kin may compute more."""

    def __init__(self):
        super().__init__(DIM, HEADS)
        self.adapter = nn.Linear(DIM, DIM)


def test_a_copy_with_more_parts_is_left_alone():
    module = WithMore()
    report = patch(module, **FUSED)
    assert [each.reason for each in report.left] == ["has adapter, as the class known here has not"]
    assert fused_method(module) is None


@pytest.mark.parametrize("case", CASES)
def test_unpatched_bitwise(case):
    make, call = CASES[case]
    module, x, options = scrambled(make()).eval(), inputs(case), call()
    expected = module(x, **options)
    patch(module, **FUSED)
    assert len([part for part in module.modules() if fused_method(part)]) == 2
    unpatch(module)
    assert same_bits(module(x, **options), expected)


@pytest.mark.parametrize(
    "case",
    [
        "dinov3, LayerScale",
        *(pytest.param(case, marks=pytest.mark.slow) for case in ("dinov2, LayerScale", "torchvision")),
    ],
)
def test_compiles_without_a_break(case, dynamo):
    make, call = CASES[case]
    module, x, options = scrambled(make()).eval(), inputs(case), call()
    patch(module, **FUSED)
    torch.testing.assert_close(
        torch.compile(module, fullgraph=True, backend="eager")(x, **options), module(x, **options)
    )
