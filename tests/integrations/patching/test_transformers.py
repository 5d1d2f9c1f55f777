"""transformers' vision models: patched, and by the name "vitreg" in their configuration."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.patching.judge import DTYPES, assert_same_numbers, converted, scrambled, state
from vitreg_kernels import UnsupportedError, patch, unpatch
from vitreg_kernels.integrations import register_transformers
from vitreg_kernels.integrations.attention import transformers as ours
from vitreg_kernels.measure.accuracy import same_bits
from vitreg_kernels.ops.attention.api import explain

transformers = pytest.importorskip("transformers")

DIM, HEADS, PATCHES = 64, 2, 16
SIZES = {
    **{"hidden_size": DIM, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 96},
    **{"image_size": 32, "patch_size": 8},
}
EOMT = {"num_blocks": 1, "num_queries": 5, "num_upscale_blocks": 1}
# The model, its configuration's options, and P: None where it is not one number for all layers.
MODELS: dict[str, tuple[str, dict, int | None]] = {
    "Aimv2Attention": ("Aimv2VisionModel", {}, 0),
    "BeitAttention": ("BeitModel", {"use_relative_position_bias": True}, 1),
    "CLIPAttention": ("CLIPVisionModel", {}, 1),
    "DINOv3ViTAttention": ("DINOv3ViTModel", {"num_register_tokens": 4}, 5),
    "DeiTAttention": ("DeiTModel", {}, 2),
    "Dinov2SelfAttention": ("Dinov2Model", {}, 1),
    "Dinov2WithRegistersSelfAttention": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}, 4),
    "EomtAttention": ("EomtForUniversalSegmentation", EOMT, None),
    "EomtDinov3Attention": ("EomtDinov3ForUniversalSegmentation", EOMT, None),
    "IJepaAttention": ("IJepaModel", {}, 0),
    "MLCDAttention": ("MLCDVisionModel", {}, 1),
    "PixioAttention": ("PixioModel", {}, 8),
    "RadioSelfAttention": ("RadioModel", {"num_cls_tokens": 2, "num_registers": 5}, 7),
    "Sapiens2Attention": ("Sapiens2Model", {"num_key_value_heads_per_layer": [2, 1]}, 9),
    "SiglipAttention": ("SiglipVisionModel", {}, 0),
    "Siglip2Attention": ("Siglip2VisionModel", {}, 0),
    "Tipsv2VisionSelfAttention": ("Tipsv2VisionModel", {}, 2),
    "ViTAttention": ("ViTModel", {}, 1),
    "ViTMAEAttention": ("ViTMAEModel", {"mask_ratio": 0.0}, 1),
    "YolosSelfAttention": ("YolosModel", {"image_size": [32, 32], "num_detection_tokens": 4}, 1),
}
ROTATED = ("DINOv3ViTAttention", "EomtDinov3Attention", "Sapiens2Attention", "MLCDAttention")


def build(cls: str, **options) -> nn.Module:
    """The model that has the attention of a class, with weights that make its softmax far from even."""
    name, own, _ = MODELS[cls]
    model_class = getattr(transformers, name)
    return scrambled(model_class(model_class.config_class(**{**SIZES, **own, **options})).eval())


def attention_of(model: nn.Module, cls: str) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__ == cls]


def inputs_of(cls: str) -> dict[str, Tensor]:
    """What the model is called with: images, and for Siglip2 an image of 12 patches beside one of 16."""
    if cls == "Siglip2Attention":
        mask = (torch.arange(PATCHES) < torch.tensor([[16], [12]])).int()
        shapes = torch.tensor([[4, 4], [3, 4]])
        patches = torch.randn(2, PATCHES, 3 * 8 * 8)
        return {"pixel_values": patches, "pixel_attention_mask": mask, "spatial_shapes": shapes}
    noise = {"noise": torch.rand(2, PATCHES)} if cls == "ViTMAEAttention" else {}
    return {"pixel_values": torch.randn(2, 3, 32, 32), **noise}


@torch.no_grad()
def tensors(model: nn.Module, **inputs) -> list[Tensor]:
    return [x for x in model(**inputs).to_tuple() if isinstance(x, Tensor)]


def test_every_class_listed_is_one_of_the_version_installed():
    models = Path(transformers.__file__).parent.glob("models/*/modeling_*.py")
    classes = {cls for path in models for cls in re.findall(r"^class (\w+)\(nn.Module\)", path.read_text(), re.M)}
    assert set(ours.KINDS[0].classes) <= classes


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls", MODELS)
def test_same_output_and_gradients(cls, dtype):
    tokens = PATCHES + (MODELS[cls][2] or 0) + 4 * (cls == "YolosSelfAttention")
    inputs: dict = {}
    if cls in ROTATED:
        rows = tokens if cls == "MLCDAttention" else PATCHES
        angles = (torch.rand(rows, DIM // HEADS // 2) * 6).repeat(1, 2)
        inputs["position_embeddings"] = angles.cos(), angles.sin()
    of_every_pair = cls.startswith("Eomt")
    if of_every_pair:
        inputs["attention_mask"] = torch.randn(2, HEADS, tokens, tokens)
    module = attention_of(build(cls), cls)[-1]
    seen = assert_same_numbers(
        module, torch.randn(2, tokens, DIM), converted(inputs, dtype), dtype, by_its_own=of_every_pair
    )
    assert (seen[0].backend == "sdpa") == of_every_pair


@pytest.mark.parametrize("cls", MODELS)
def test_whole_models(cls, calls):
    """The same features, everything else in its place, and the rows of the prefix where attentions are asked for."""
    model, inputs = build(cls), inputs_of(cls)
    expected = tensors(model, **inputs)
    before = state(model)
    report = patch(model)
    assert state(model) == before
    prefix = MODELS[cls][2]
    assert report.num_prefix_tokens == prefix
    assert [each.cls for each in report.patched] == [cls, cls]
    actual = tensors(model, **inputs)
    assert len(calls) == 2
    if prefix is not None:
        others = 4 if cls == "YolosSelfAttention" else 0  # its detection tokens, the last
        assert {call.tensors[0].shape[2] for call in calls} == {prefix + PATCHES + others}
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5 * float(y.abs().max()))
    rows = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    every_row = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    unpatch(model)
    assert all(map(same_bits, tensors(model, **inputs), expected))
    assert not any("forward" in vars(module) for module in model.modules())
    none = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation("eager")
    full = model(**inputs, output_attentions=True).attentions
    assert len(full) == 2
    assert all(map(same_bits, every_row, full))
    if not prefix:
        assert rows == none == ()
    else:
        assert len(rows) == 2
        for some, every in zip(rows, full, strict=True):
            torch.testing.assert_close(some, every[:, :, :prefix], rtol=1e-4, atol=1e-5)


def test_padded_images_are_those_alone_and_served_as_without_padding(calls):
    model, inputs = build("Siglip2Attention"), inputs_of("Siglip2Attention")
    theirs = model(**inputs).last_hidden_state
    small = {
        **{"pixel_values": inputs["pixel_values"][1:, :12], "spatial_shapes": inputs["spatial_shapes"][1:]},
        "pixel_attention_mask": inputs["pixel_attention_mask"][1:, :12],
    }
    alone = model(**small).last_hidden_state
    register_transformers()
    named = copy.deepcopy(model)
    named.set_attn_implementation("vitreg")
    patch(model)
    for each in (model, named):
        calls.clear()
        together = each(**inputs)
        torch.testing.assert_close(together.last_hidden_state, theirs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.last_hidden_state[1:, :12], alone, rtol=1e-4, atol=1e-4)
        for call in calls:
            assert call.options["attn_mask"].shape == (2, 1, 1, PATCHES)
            assert call.options["attn_mask"].dtype == torch.bool
            assert call.backend == explain(call.tensors[0]).backend
        assert len(calls) == 2


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_padding_mask_of_a_vit(name, calls):
    model, inputs = build("ViTAttention"), inputs_of("ViTAttention")
    model.set_attn_implementation(name)
    mask = torch.arange(PATCHES + 1) < torch.tensor([[17], [9]])
    expected = model(**inputs, attention_mask=mask).last_hidden_state
    patch(model)
    torch.testing.assert_close(model(**inputs, attention_mask=mask).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    unpatch(model)
    register_transformers()
    model.set_attn_implementation("vitreg")
    torch.testing.assert_close(model(**inputs, attention_mask=mask).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert [tuple(call.options["attn_mask"].shape) for call in calls] == 2 * [(2, 1, 17, 17)] + 2 * [(2, 1, 1, 17)]


CLIP = {
    "vision_config": SIZES,
    "text_config": {**SIZES, "vocab_size": 50, "max_position_embeddings": 9, "eos_token_id": 49},
    "projection_dim": 32,
}


def clip_inputs() -> dict[str, Tensor]:
    tokens = torch.randint(1, 49, (2, 9))
    return {"input_ids": tokens, "attention_mask": torch.tensor([9 * [1], [1] * 5 + [0] * 4])}


def test_the_text_part_is_left_alone_with_a_reason(calls):
    model = scrambled(transformers.CLIPModel(transformers.CLIPConfig(**CLIP)).eval())
    inputs = {**inputs_of("CLIPAttention"), **clip_inputs()}
    expected = tensors(model, **inputs)
    report = patch(model)
    assert [each.reason for each in report.left] == ["of the text part"] * 2
    assert all(each.name.startswith("vision_model.") for each in report.patched)
    for x, y in zip(tensors(model, **inputs), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    assert len(calls) == 2
    assert {model.config._attn_implementation, model.config.vision_config._attn_implementation} == {"sdpa"}
    with pytest.raises(UnsupportedError, match="of the text part"):
        patch(model, strict=True)


def test_by_its_name_a_whole_clip_is_served_text_through_its_mask(calls):
    register_transformers()
    model = scrambled(transformers.CLIPModel(transformers.CLIPConfig(**CLIP)).eval())
    inputs = {**inputs_of("CLIPAttention"), **clip_inputs()}
    expected = tensors(model, **inputs)
    model.set_attn_implementation("vitreg")
    for given in (inputs, {name: x for name, x in inputs.items() if name != "attention_mask"}):
        calls.clear()
        actual = tensors(model, **given)
        assert len(calls) == 4
        assert {call.tensors[0].shape[2]: call.options["attn_mask"] is None for call in calls} == {9: False, 17: True}
        if given is inputs:
            for x, y in zip(actual, expected, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    model.set_attn_implementation({"vision_config": "vitreg", "text_config": "sdpa"})
    calls.clear()
    tensors(model, **inputs)
    assert len(calls) == 2


def test_one_of_two_models_that_share_a_configuration(calls):
    first = build("ViTAttention")
    second = transformers.ViTModel(first.config).eval()
    assert second.config is first.config
    inputs = inputs_of("ViTAttention")
    expected = tensors(second, **inputs)
    patch(first)
    assert all(map(same_bits, tensors(second, **inputs), expected))
    assert calls == []
    tensors(first, **inputs)
    assert len(calls) == 2


def test_copies_and_pickles_have_their_own(calls):
    model, inputs = build("Siglip2Attention"), inputs_of("Siglip2Attention")
    patch(model)
    expected = tensors(model, **inputs)
    for each in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        unpatch(model)
        calls.clear()
        assert all(map(same_bits, tensors(each, **inputs), expected))
        assert len(calls) == 2
        patch(model)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"softcap": 3.0}, "does not know softcap: take 'sdpa' or 'eager'"),
        ({"position_bias": torch.zeros(1, 1, 17, 17)}, "does not know position_bias"),
        ({"is_causal": True}, "is causal by a mask alone, and none was given"),
    ],
)
@pytest.mark.parametrize("way", ["patched", "named"])
def test_what_is_not_known_is_refused_and_what_is_harmless_taken(way, options, words):
    register_transformers()
    model, inputs = build("ViTAttention"), inputs_of("ViTAttention")
    expected = model(**inputs).last_hidden_state
    if way == "patched":
        patch(model)
    else:
        model.set_attn_implementation("vitreg")
    with pytest.raises(UnsupportedError, match=words):
        model(**inputs, **options)
    harmless = {"output_hidden_states": True, "num_items_in_batch": 3, "is_causal": False, "position_ids": None}
    torch.testing.assert_close(model(**inputs, **harmless).last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_a_mask_that_is_no_tensor_is_refused():
    module = attention_of(build("ViTAttention"), "ViTAttention")[0]
    patch(module)
    with pytest.raises(UnsupportedError, match="takes a tensor as a mask, not BlockMask"):
        module(torch.randn(1, 17, DIM), type("BlockMask", (), {})())
    mask = torch.tensor([17 * [1], 9 * [1] + 8 * [0]])  # as models make it for FlashAttention
    x = torch.randn(2, 17, DIM)
    assert same_bits(module(x, mask)[0], module(x, mask[:, None, None].bool())[0])


def test_the_name_in_every_way_that_transformers_takes_it(tmp_path, calls):
    register_transformers()
    inputs = inputs_of("Dinov2WithRegistersSelfAttention")
    config = transformers.Dinov2WithRegistersConfig(**SIZES)
    model = transformers.AutoModel.from_config(config, attn_implementation="vitreg").eval()
    expected = model(**inputs, output_attentions=True)
    assert [rows.shape for rows in expected.attentions] == [(2, HEADS, 5, 21)] * 2
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModel.from_pretrained(tmp_path, attn_implementation="vitreg")
    assert same_bits(loaded(**inputs).last_hidden_state, expected.last_hidden_state)
    assert len(calls) == 4
    loaded.set_attn_implementation("sdpa")
    torch.testing.assert_close(loaded(**inputs).last_hidden_state, expected.last_hidden_state)
    assert len(calls) == 4
    loaded.set_attn_implementation("vitreg")
    assert same_bits(loaded(**inputs).last_hidden_state, expected.last_hidden_state)


def test_dropout_is_the_modules_own(calls):
    model = build("ViTAttention", attention_probs_dropout_prob=0.5)
    patch(model)
    inputs = inputs_of("ViTAttention")
    model(**inputs)
    model.train()(**inputs)
    assert [call.options["dropout_p"] for call in calls] == [0.0, 0.0, 0.5, 0.5]


@pytest.mark.parametrize("cls", ["ViTAttention", "Dinov2WithRegistersSelfAttention"])
def test_gradient_checkpointing_with_attentions(cls):
    model, inputs = build(cls).train(), inputs_of(cls)
    patch(model)
    model(**inputs).last_hidden_state.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    output = model(**inputs, output_attentions=True)
    assert len(output.attentions) == 2
    output.last_hidden_state.square().sum().backward()
    assert expected
    for name, gradient in expected.items():
        assert same_bits(model.get_parameter(name).grad, gradient), name


@pytest.mark.parametrize(
    ("way", "attentions"), [("patched", False), pytest.param("named", True, marks=pytest.mark.slow)]
)
def test_compiled_without_a_break(way, attentions, dynamo):
    register_transformers()
    cls = "Dinov2WithRegistersSelfAttention"
    model, inputs = build(cls), inputs_of(cls)
    if way == "patched":
        patch(model)
    else:
        model.set_attn_implementation("vitreg")
    expected = model(**inputs, output_attentions=attentions)
    actual = torch.compile(model, backend="eager", fullgraph=True)(**inputs, output_attentions=attentions)
    assert same_bits(actual.last_hidden_state, expected.last_hidden_state)
    assert len(actual.attentions or ()) == 2 * attentions
    actual.last_hidden_state.sum().backward()


def test_layers_compiled_by_themselves(dynamo):
    model, inputs = build("ViTAttention"), inputs_of("ViTAttention")
    patch(model)
    expected = tensors(model, **inputs)
    for layer in model.layers:
        layer.compile(backend="eager", fullgraph=True)
    assert all(map(same_bits, tensors(model, **inputs), expected))


def test_a_version_whose_modules_do_not_ask_is_left_alone(monkeypatch):
    model = nn.ModuleList((build("ViTAttention"), build("CLIPAttention")))
    cls = type(attention_of(model, "ViTAttention")[0])
    monkeypatch.setattr(cls, "forward", lambda self, hidden_states, attention_mask=None, **kwargs: None)
    report = patch(model)
    assert {each.cls for each in report.patched} == {"CLIPAttention"}
    assert {each.reason for each in report.left} == {"does not ask for its attention function by name in this version"}


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_users_own_attention_function_is_not_replaced(when):
    model, inputs = build("ViTAttention"), inputs_of("ViTAttention")

    def halved(*args, **options):
        output, weights = transformers.integrations.sdpa_attention.sdpa_attention_forward(*args, **options)
        return output / 2, weights

    transformers.AttentionInterface.register("halved", halved)
    if when == "after":
        patch(model)
    model.set_attn_implementation("halved")
    if when == "before":
        assert {module.reason for module in patch(model).left} == {
            "is set to the attention function 'halved', which is not transformers' own"
        }
    actual = tensors(model, **inputs)
    unpatch(model)
    assert all(map(same_bits, actual, tensors(model, **inputs)))
