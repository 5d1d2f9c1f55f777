"""What ``record`` keeps of one pass, against eager formulas in fp64 on every kind of model."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from vitreg_kernels import TokenLayout, patch
from vitreg_kernels.analysis.record import FEATURES, Recording, concatenated, patches_of, record
from vitreg_kernels.integrations import residual_stream
from vitreg_kernels.integrations.patching.method import fused_method
from vitreg_kernels.measure.accuracy import compare, same_bits
from vitreg_kernels.ops.attention.types import Rope

timm = pytest.importorskip("timm")
transformers = pytest.importorskip("transformers")

from tests.integrations import models  # noqa: E402
from tests.integrations.patching import dinov3_like  # noqa: E402
from tests.integrations.patching.judge import instances, state  # noqa: E402

HEADS, GRID, SIDES = 2, (3, 5), (48, 80)
TURNED_BEFORE = "DINOv3ViT"  # whose model turns queries and keys itself, so that capture never sees them unturned

MODELS = {
    "RegisterViT": partial(models.register_vit, layer_scale=None),
    "RegisterViT, rotation": partial(models.register_vit, position="rope", qk_norm=True),
    "timm": models.timm_vit,
    "timm reg4": partial(models.timm_vit, reg_tokens=4, init_values=1.0, qk_norm=True),
    "timm DINOv3": models.timm_dinov3,
    "Dinov2WithRegisters": partial(models.hugging_face, "Dinov2WithRegisters", num_register_tokens=4),
    TURNED_BEFORE: partial(models.hugging_face, "DINOv3ViT", num_register_tokens=4),
    "DINOv2": models.dinov2_vit,
    "DINOv3": models.dinov3_vit,
}
FOREIGN = [name for name in MODELS if not name.startswith("RegisterViT")]
SOME = ["RegisterViT", "timm reg4", "Dinov2WithRegisters"]


def images(count: int = 2, sides: tuple[int, int] = SIDES) -> Tensor:
    return torch.randn(count, 3, *sides)


def everything(model: nn.Module, x: Tensor, **options) -> Recording:
    features = [(layer, kind) for layer in (0, -1) for kind in FEATURES]
    return record(model, x, features=features, attention=[0, -1], received=[0, -1], **options)


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def projected(attention: nn.Module, z: Tensor) -> list[Tensor]:
    """Query, key and value ``[B, H, N, D]``, from whatever weights a library's module has."""
    if hasattr(attention, "qkv"):
        bias = attention.qkv.bias
        if hasattr(attention, "q_bias"):  # timm's Eva
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        query, key, value = map(heads, nn.functional.linear(z, attention.qkv.weight, bias).chunk(3, dim=-1))
    else:
        names = ("query", "key", "value") if hasattr(attention, "query") else ("q_proj", "k_proj", "v_proj")
        query, key, value = (heads(attention.get_submodule(name)(z)) for name in names)
    if getattr(attention, "q_norm", None) is not None:
        query, key = attention.q_norm(query), attention.k_norm(key)
    return [query, key, value]


def turned(x: Tensor, given: dict) -> Tensor:
    """The patches turned by halves, by whatever a library's module is given to turn them by."""
    rope = given.get("position_embeddings", given.get("rope"))
    if rope is None:
        return x
    if isinstance(rope, Rope):
        cos, sin = rope.cos, rope.sin
    elif "position_embeddings" in given:
        cos, sin = rope
    else:
        sin, cos = rope.chunk(2, dim=-1) if isinstance(rope, Tensor) else rope
    prefix, patches = x.split([x.shape[2] - cos.shape[-2], cos.shape[-2]], dim=2)
    first, second = patches.chunk(2, dim=-1)
    return torch.cat((prefix, patches * cos + torch.cat((-second, first), dim=-1) * sin), dim=2)


@torch.no_grad()
def eager(model: nn.Module, x: Tensor, *, turned_before: bool) -> dict[object, Tensor]:
    """All that a recording holds, by plain formulas in the dtype of the model."""
    stream = residual_stream(model)
    found, handles = {}, []

    def watch(layer: int, block: nn.Module) -> None:
        def behind(module, args, output):
            tokens = output[0] if isinstance(output, tuple | list) else output
            found[layer, "tokens"], found[layer, "norms"] = tokens, tokens.square().sum(-1).sqrt()

        def before(module, args, given):
            query, key, value = projected(module, args[0] if args else given["hidden_states"])
            rotated = [turned(query, given), turned(key, given)]
            weights = (rotated[0] @ rotated[1].mT / query.shape[-1] ** 0.5).softmax(-1)
            shown = (*(rotated if turned_before else (query, key)), value)
            found.update({(layer, n): t.transpose(1, 2).flatten(2) for n, t in zip(FEATURES[1:], shown, strict=True)})
            found[layer, "attention"] = weights[:, :, : stream.layout.num_prefix_tokens]
            found[layer, "received"] = weights.mean(2)

        handles.append(block.register_forward_hook(behind))
        attends = [m for m in block.modules() if {"qkv", "query", "q_proj"} & {name for name, _ in m.named_children()}]
        (attention,) = attends
        handles.append(attention.register_forward_pre_hook(before, with_kwargs=True))

    for layer, (_, block) in enumerate(stream.blocks):
        watch(layer, block)
    model(x)
    for handle in handles:
        handle.remove()
    convolution = next(part for part in stream.patch_embed.modules() if isinstance(part, nn.Conv2d))
    found["embeddings"] = convolution(x).flatten(2).mT
    return found


@pytest.mark.parametrize("name", MODELS)
def test_all_of_it_is_what_the_formulas_give(name):
    """Of images that are no squares, by the accuracy rule."""
    model, x = MODELS[name](), images()
    recording = everything(model, x)
    exact = eager(copy.deepcopy(model).double(), x.double(), turned_before=name == TURNED_BEFORE)
    own = eager(model, x, turned_before=name == TURNED_BEFORE)
    actual = {(i, "norms"): norms for i, norms in enumerate(recording.norms)} | {**recording.features}
    actual |= {(i, "attention"): maps for i, maps in recording.attention.items()}
    actual |= {(i, "received"): each for i, each in recording.received.items()} | {"embeddings": recording.embeddings}
    assert actual.keys() == exact.keys()
    assert len(actual) == 2 * 7 + 1
    for key, tensor in actual.items():
        accuracy = compare(tensor, exact[key], own[key], terms=models.DIM)
        assert accuracy.passed, f"{key}: {accuracy}"
    assert recording.grid == GRID
    assert recording.layout == residual_stream(model).layout
    assert recording.valid.shape == (2, 15)
    assert recording.valid.all()


@pytest.mark.parametrize("name", SOME)
def test_norms_are_those_before_the_final_norm(name):
    """Behind it an artifact has the norm of any other token, by which it is missed."""
    model, x, normalized = MODELS[name](), images(), []
    stream, artifact = residual_stream(model), torch.ones(20, 1)
    artifact[9] = 30.0
    stream.blocks[-1][1].register_forward_hook(lambda _, __, out: out * artifact)
    stream.norm.register_forward_hook(lambda _, __, out: normalized.append(out))
    norms = record(model, x).norms
    assert norms.shape == (2, 2, 20)
    for of_image, after in zip(norms[-1], normalized[0].norm(dim=-1), strict=True):
        assert of_image.argmax() == 9
        assert of_image[9] > 10 * of_image.median()
        assert after.max() < 1.5 * after.median()
    assert (norms[0].max() < 10 * norms[0].median()).all()


@pytest.mark.parametrize("name", MODELS)
def test_only_what_is_asked_for_is_kept_and_the_model_is_as_it_was(name):
    model, x = MODELS[name](), images()
    with torch.no_grad():
        expected = model(x)
    own, before = instances(model), state(model)
    recording = everything(model, x)
    assert instances(model) == own
    assert state(model) == before
    for each in (recording, record(model, x)):
        tensors = [*each[:2], *each.features.values(), *each.attention.values(), *each.received.values(), each.valid]
        assert all(t.device.type == "cpu" and not t.requires_grad and t.is_contiguous() for t in tensors)
    assert (each.features, each.attention, each.received) == ({}, {}, {})
    assert instances(model) == own
    with torch.no_grad():
        again = model(x)
    names = [n for n in ("last_hidden_state", "patches") if hasattr(again, n)]
    assert same_bits(getattr(again, names[0]), getattr(expected, names[0])) if names else same_bits(again, expected)


@pytest.mark.parametrize("name", FOREIGN)
def test_only_attention_needs_the_model_patched(name, monkeypatch):
    from vitreg_kernels.analysis import record as module

    def refuse(*_, **__):
        raise AssertionError("patched for nothing")

    monkeypatch.setattr(module, "patched", refuse)
    model = MODELS[name]()
    record(model, images(), features=[(0, "tokens")])
    with pytest.raises(AssertionError, match="patched for nothing"):
        record(model, images(), received=[0])


def test_a_patched_model_stays_patched():
    model, x = MODELS["timm reg4"](), images()
    patch(model, backend="reference")
    methods = [fused_method(block.attn) for block in model.blocks]
    everything(model, x)
    assert [fused_method(block.attn) for block in model.blocks] == methods
    assert not any(method.op.takers for method in methods)


def test_a_layer_that_was_not_patched_is_so_for_the_time_of_the_call():
    model = MODELS["timm reg4"]()
    patch(model.blocks[0].attn, num_prefix_tokens=5)
    op = fused_method(model.blocks[0].attn).op
    assert everything(model, images()).attention.keys() == {0, 1}
    assert fused_method(model.blocks[0].attn).op is op
    assert fused_method(model.blocks[1].attn) is None


@pytest.mark.parametrize("name", SOME)
def test_an_exception_in_the_forward_leaves_nothing_behind(name):
    model, x = MODELS[name](), images()

    def fail(*_):
        raise RuntimeError("in the forward")

    handle = residual_stream(model).blocks[-1][1].register_forward_hook(fail)
    own, before = instances(model), state(model)
    with pytest.raises(RuntimeError, match="in the forward"):
        everything(model, x)
    assert instances(model) == own
    assert state(model) == before
    handle.remove()
    everything(model, x)


@pytest.mark.parametrize("name", SOME)
def test_what_the_model_writes_to_later_is_kept_as_it_was(name):
    model, x = MODELS[name](), images()
    expected = record(model, x, features=[(1, "tokens")])

    def overwrite(module, args):
        args[0].zero_()

    residual_stream(model).norm.register_forward_pre_hook(overwrite)
    tokens = record(model, x, features=[(1, "tokens")]).features[1, "tokens"]
    torch.testing.assert_close(tokens, expected.features[1, "tokens"], rtol=1e-4, atol=1e-4)


def test_features_of_half_precision_are_fp32_and_those_of_double_stay():
    for dtype, kept in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        recording = everything(MODELS["timm reg4"]().to(dtype), images().to(dtype))
        tensors = [*recording.features.values(), *recording.attention.values(), *recording.received.values()]
        assert {t.dtype for t in (recording.norms, recording.embeddings, *tensors)} == {kept}


@pytest.mark.parametrize("make", [partial(models.timm_vit, dynamic_img_size=False), models.open_clip_vit])
def test_models_of_one_size(make):
    model, x = make(), images(sides=(64, 64))
    recording = everything(model, x)
    assert recording.grid == (4, 4)
    convolution = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    torch.testing.assert_close(recording.embeddings, convolution(x).flatten(2).mT)
    assert recording.norms.shape == (2, 2, 17)


@pytest.mark.parametrize("name", ["ViT", "DeiT", "CLIPVision", "SiglipVision"])
def test_models_that_resample_positions_when_they_are_told_to(name):
    model, x = models.hugging_face(name), images()
    layout = residual_stream(model).layout
    recording = record(
        model, x, features=[(0, "key")], received=[-1], attention=[-1] if layout.num_prefix_tokens else []
    )
    assert (recording.grid, recording.layout) == (GRID, layout)
    assert recording.norms.shape == (2, 2, 15 + layout.num_prefix_tokens)


def test_a_map_of_which_every_side_is_the_number_of_channels():
    """C in the second place or the last: the shape does not tell."""
    dinov3 = dinov3_like.DinoVisionTransformer([dinov3_like.SelfAttentionBlock(16, 1)], 0, 4)
    hugging_face = models.hugging_face("DINOv3ViT", hidden_size=16, num_attention_heads=1, patch_size=4)
    for model in (models.scramble(dinov3), hugging_face):
        x = images(sides=(64, 64))
        recording = record(model, x)
        convolution = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
        torch.testing.assert_close(recording.embeddings, convolution(x).flatten(2).mT)


@pytest.mark.parametrize("name", ["CLIP", "Siglip"])
def test_a_model_of_images_and_texts(name):
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = getattr(transformers, f"{name}Config")(
        text_config={**sizes, "vocab_size": 99}, vision_config={**sizes, "image_size": 64, "patch_size": 16}
    )
    model, x = getattr(transformers, f"{name}Model")(config).eval(), images()
    whole, tower = (record(each, x, features=[(1, "tokens")], received=[0]) for each in (model, model.vision_model))
    assert same_bits(whole.norms, tower.norms)
    assert same_bits(whole.received[0], tower.received[0])


def test_within_another_model_which_is_run_as_a_whole():
    """A model that normalises its images first, say."""
    model, x = MODELS["timm"](), images()
    halved = nn.Sequential(nn.AvgPool2d(1, divisor_override=2), model).eval()
    torch.testing.assert_close(everything(halved, 2 * x).norms, everything(model, x).norms)


@pytest.mark.usefixtures("dynamo")
def test_a_compiled_model_runs_eagerly():
    """Its graph, which was compiled before there were hooks, would show nothing."""
    model, x = MODELS["timm reg4"](), images()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
    assert same_bits(record(compiled, x).norms, record(model, x).norms)


def inserted(model: nn.Module, place: int) -> None:
    """A token that stands in front of the patches from the first block to the final norm, as a test-time register."""
    stream = residual_stream(model)
    first = stream.blocks[0][1]
    first.register_forward_pre_hook(
        lambda _, args: (torch.cat((args[0][:, :place], torch.zeros_like(args[0][:, :1]), args[0][:, place:]), 1),)
    )
    stream.norm.register_forward_pre_hook(
        lambda _, args: (torch.cat((args[0][:, :place], args[0][:, place + 1 :]), 1),)
    )


@pytest.mark.parametrize("name", ["timm reg4", "Dinov2WithRegisters", "RegisterViT", "timm DINOv3"])
def test_a_layout_of_one_register_more(name):
    model, x = MODELS[name](), images()
    inserted(model, 5)
    if name == "timm DINOv3":  # whose attention counts for itself which tokens are turned
        for block in model.blocks:
            block.attn.num_prefix_tokens = 6
    with pytest.raises(ValueError, match="block 0 gives 21 tokens of 2 images, and not the 20 of 2 that 1 CLS and 4"):
        record(model, x)
    layout = TokenLayout(num_registers=5)
    recording = record(model, x, features=[(0, "tokens")], layout=layout)
    assert recording.layout == layout
    assert recording.norms.shape == (2, 2, 21)
    torch.testing.assert_close(recording.norms[0], recording.features[0, "tokens"].norm(dim=-1))
    if name != "RegisterViT":
        assert record(model, x, attention=[0], layout=layout).attention[0].shape == (2, HEADS, 6, 21)


@pytest.mark.parametrize("name", ["timm reg4", "RegisterViT"])
def test_a_layout_of_another_prefix_than_the_attention_knows(name):
    """A model that was patched, or made, before there was one more."""
    model = MODELS[name]()
    if name != "RegisterViT":
        patch(model)
    inserted(model, 5)
    with pytest.raises(ValueError, match="block 0 gives the attention of 5 tokens, and not of the 6 that lead"):
        record(model, images(), attention=[0], layout=TokenLayout(num_registers=5))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"layout": TokenLayout(num_registers=3)},
            ValueError,
            "not the 19 of 2 that 1 CLS and 3 register tokens and 3 x",
        ),
        ({"layout": TokenLayout(16)}, ValueError, "3 x 5 patches, and the layout is of other patches"),
        ({"layout": TokenLayout(grid=(5, 3))}, ValueError, "3 x 5 patches, and the layout is of other patches"),
        ({"features": [(0, "keys")]}, ValueError, "unknown features keys: expected of tokens, query, key, value"),
        ({"features": [(2, "key")]}, IndexError, "no layer 2: the model has 2 blocks"),
        ({"attention": [-3]}, IndexError, "no layer -3: the model has 2 blocks"),
        (
            {"valid": torch.ones(2, 16, dtype=torch.bool)},
            ValueError,
            r"valid must be bool \[2, 15\], not torch.bool \[2, 16",
        ),
        ({"valid": torch.ones(2, 15)}, ValueError, "valid must be bool"),
    ],
)
def test_bad_arguments(options, error, words):
    model = MODELS["timm reg4"]()
    own = instances(model)
    with pytest.raises(error, match=words):
        record(model, images(), **options)
    assert instances(model) == own


def test_models_that_cannot_be_recorded():
    swin = timm.models.SwinTransformer(img_size=32, embed_dim=8, depths=(1,), num_heads=(1,), window_size=4).eval()
    for unknown in (swin, nn.Linear(2, 2).eval()):
        with pytest.raises(ValueError, match=f"{type(unknown).__name__} is and has no Vision Transformer known here"):
            record(unknown, images())
    model = MODELS["timm"]()
    model.blocks[0].train()
    with pytest.raises(ValueError, match=r"VisionTransformer is in training mode, .* call model\.eval\(\)"):
        record(model, images())
    assert model.blocks[0].training
    with pytest.raises(ValueError, match="pixels must be"):
        record(model.eval(), images()[0])
    with pytest.raises(ValueError, match="has no prefix token, so there is no prefix_attention"):
        record(models.hugging_face("SiglipVision"), images(), attention=[0])


def test_attention_that_is_not_this_librarys():
    model, x = MODELS["timm"](), images()
    model.blocks[1].attn.fused_attn = False
    handle = model.blocks[1].attn.attn_drop.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn computed this call itself"):
        record(model, x, received=[1])
    handle.remove()
    model.blocks[1].attn.scale_of_its_own = None
    model.blocks[1].attn.__class__ = type("Attention", (type(model.blocks[1].attn),), {"forward": lambda *_: None})
    with pytest.raises(ValueError, match=r"(?s)the attention of blocks\.1 is not computed by this library.*left alone"):
        record(model, x, received=[1])


def test_a_model_that_runs_some_of_its_blocks():
    class Truncated(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit = MODELS["timm"]()

        def forward(self, x):
            return self.vit.blocks[0](self.vit.patch_embed(x).flatten(1, 2))

    with pytest.raises(ValueError, match="Truncated ran 1 of its 2 blocks"):
        record(Truncated().eval(), images())


def test_patches_of_recordings_of_other_grids_and_prefixes():
    """By hand: norms that tell layer, recording, image and place; some patches are padding."""

    def made(number, grid, prefix, valid):
        count, patches = len(valid), grid[0] * grid[1]
        place = torch.arange(patches).expand(2, count, patches)
        image = torch.arange(count)[None, :, None]
        layer = torch.arange(2)[:, None, None]
        norms = 1000.0 * layer + 100 * number + 10 * image + place
        norms = torch.cat((torch.full((2, count, prefix), torch.nan), norms), dim=2)
        layout = TokenLayout(num_registers=prefix - 1)
        return Recording(norms, torch.zeros(count, patches, 4), {}, {}, {}, grid, layout, torch.tensor(valid))

    first = made(0, (2, 3), 1, [[True, True, False, True, True, False]])
    second = made(1, (3, 2), 5, [[True] * 6, [False, False, False, False, True, False]])
    patches = patches_of([first, second])
    expected = [(0, 0, 0, 0), (1, 0, 0, 1), (3, 0, 1, 0), (4, 0, 1, 1)]
    expected += [(100 + i, 1, i // 2, i % 2) for i in range(6)] + [(114, 2, 2, 0)]
    norms, image, row, column = (torch.tensor(each) for each in zip(*expected, strict=True))
    assert torch.equal(patches.norms, torch.stack((norms, norms + 1000)).float())
    assert torch.equal(patches.image, image)
    assert torch.equal(patches.row, row)
    assert torch.equal(patches.column, column)
    assert {t.dtype for t in patches[1:4]} == {torch.int64}
    assert patches.grids == [(2, 3), (3, 2), (3, 2)]
    for bad in ([], [first, first._replace(norms=first.norms[:1])]):
        with pytest.raises(ValueError, match="at least one recording, and all of as many layers"):
            patches_of(bad)


def test_padding_is_marked_and_left_out():
    model, x = MODELS["timm reg4"](), images()
    valid = torch.rand(2, 15) < 0.6
    recording = record(model, x, valid=valid)
    patches = patches_of([recording])
    assert torch.equal(recording.valid, valid)
    assert patches.norms.shape == (2, valid.sum())
    for t, (image, row, column) in enumerate(zip(patches.image, patches.row, patches.column, strict=True)):
        assert torch.equal(patches.norms[:, t], recording.norms[:, image, 5 + row * 5 + column])
    assert recording.norms.shape == (2, 2, 20)


def test_concatenated_batches_are_one():
    model, x = MODELS["timm reg4"](), images(3)
    whole, parts = everything(model, x), [everything(model, x[:1]), everything(model, x[1:])]
    one = concatenated(parts)
    assert one.grid == whole.grid
    for got, wanted in zip(one, whole, strict=True):
        if isinstance(wanted, Tensor | dict):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    assert concatenated([whole]).norms.shape == whole.norms.shape
    for other in (
        record(model, x),
        everything(model, images(sides=(80, 48))),
        whole._replace(layout=TokenLayout(num_registers=4, num_cls_tokens=2)),
    ):
        with pytest.raises(ValueError, match="of one grid, layout, and the same layers and features"):
            concatenated([whole, other])
    with pytest.raises(ValueError, match="no recording to concatenate"):
        concatenated([])


MEMORY = """
import re, torch
from pathlib import Path
from vitreg_kernels import RegisterViT, ViTConfig
from vitreg_kernels.analysis.record import record

config = ViTConfig(image_size=518, patch_size=14, dim=1024, depth=1, num_heads=16)
model, pixels = RegisterViT(config).eval(), torch.randn(1, 3, 518, 518)
def peak():  # getrusage would begin with that of the process that started this one
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
Path("/proc/self/clear_refs").write_text("5")
before = peak()
record(model, pixels, features=[(0, "key")], attention=[0], received=[0])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_a_large_model():
    """A ViT-L of 24 blocks on 8 images of 1374 tokens is to stay below 4 GB, of which 1.5 are its weights and torch.

    So an image has 300 MB, and here one image and one block are run: what a block needs is free again in the next. Its
    probabilities alone, N x N for 16 heads, would be 120 MB, and the formula holds them three times.
    """
    done = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True)
    assert int(done.stdout) * 1024 < 300e6
