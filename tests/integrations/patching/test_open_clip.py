"""open_clip's vision towers, patched: those of release 3.3.0 as they are, and the ``Attention`` that came after."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from tests.integrations.patching import open_clip_like
from tests.integrations.patching.judge import (
    DTYPES,
    assert_nothing_else_changes,
    assert_own_forward,
    assert_same_numbers,
    op_calls,
    scrambled,
)
from vitreg_kernels import TokenLayout, patch
from vitreg_kernels.integrations import residual_stream

open_clip = pytest.importorskip("open_clip")

DIM, HEADS, TOKENS, IMAGES = 64, 2, 13, 3
OPTIONS = [
    {},
    {"qk_norm": True},
    {"scale_heads": True, "inner_norm": True},
    {"qkv_bias": False, "scale_heads": True, "qk_norm": True},
]
MODULES = {"3.3.0": open_clip.transformer.Attention, "later": open_clip_like.Attention}


def tower(**options):
    return scrambled(open_clip.transformer.VisionTransformer(32, 8, DIM, 2, HEADS, 2.0, output_dim=32, **options))


def images():
    return torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("release", MODULES)
def test_same_output_and_gradients(release, options, dtype):
    module = scrambled(MODULES[release](DIM, HEADS, norm_layer=nn.LayerNorm, **options))
    assert_same_numbers(module, torch.randn(IMAGES, TOKENS, DIM), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["pattern", "additive"])
@pytest.mark.parametrize("batch", [(), (IMAGES * HEADS,)], ids=["one", "by head"])
@pytest.mark.parametrize("release", MODULES)
def test_masks(release, batch, kind, dtype):
    """True in a boolean mask leaves a key out in release 3.3.0, and lets it take part later."""
    mask = torch.rand(*batch, TOKENS, TOKENS) < 0.4
    mask.diagonal(dim1=-2, dim2=-1).fill_(release == "later")
    if kind == "additive":
        mask = torch.randn(mask.shape)

    def call(module, x):
        given = mask if kind == "pattern" else mask.to(x.dtype)
        return module(x, given) if release == "3.3.0" else module(x, None, None, given)  # where each has it

    module = scrambled(MODULES[release](DIM, HEADS))
    assert_same_numbers(module, torch.randn(IMAGES, TOKENS, DIM), dtype=dtype, call=call)


def test_blocks_give_one_tensor_in_all_three_places():
    module = scrambled(open_clip_like.Attention(DIM, HEADS))
    assert_same_numbers(module, torch.randn(IMAGES, TOKENS, DIM), call=lambda m, x: m(x, k_x=x, v_x=x))


@pytest.mark.parametrize("given", [{"k_x": 1}, {"v_x": 1}, {"k_x": 1, "v_x": 1}], ids=str)
def test_cross_attention_is_the_modules_own(given):
    x = torch.randn(IMAGES, TOKENS, DIM)
    given = {name: torch.randn(IMAGES, TOKENS, DIM) for name in given}
    assert_own_forward(scrambled(open_clip_like.Attention(DIM, HEADS)), lambda m: [m(x, **given)])


@pytest.mark.parametrize("release", MODULES)
def test_hooks_see_what_the_class_shows_them(release):
    """On modules around the op what they do, and on ``attn_drop`` the probabilities, where the class calls it."""
    module, x, seen = scrambled(MODULES[release](DIM, HEADS)), torch.randn(IMAGES, TOKENS, DIM), []
    for part in (module.ln_q, module.ln_k, module.ln_inner, module.out_proj, module.out_drop):
        part.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    expected = module(x)
    theirs, _ = seen[:], seen.clear()
    patch(module)
    with op_calls() as calls:
        torch.testing.assert_close(module(x), expected)
    assert len(calls) == 1
    assert seen == theirs
    assert len(seen) == 5
    module.attn_drop.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with op_calls() as calls:
        module(x)
    assert not calls
    assert ((IMAGES, HEADS, TOKENS, TOKENS) in seen) == (release == "later")


@pytest.mark.parametrize("release", MODULES)
def test_dropout(release):
    module, x = scrambled(MODULES[release](DIM, HEADS, attn_drop=0.3, proj_drop=0.2)), torch.randn(2, TOKENS, DIM)
    patch(module)
    with op_calls() as calls:
        kept = module.train()(x) != 0
        assert 0.7 < kept.float().mean() < 0.9
        assert bool((module.eval()(x) != 0).all())
    assert [call.options["dropout_p"] for call in calls] == [0.3, 0.0]


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"scaled_cosine": True}, "attends by cosines"), ({"kdim": 32}, "keys and values have widths of their own")],
)
def test_what_is_left_alone(options, reason):
    assert patch(open_clip_like.Attention(DIM, HEADS, **options)).left[0].reason == reason


@pytest.mark.parametrize("release", MODULES)
def test_it_is_left_alone_where_it_may_be_of_a_text(release):
    report = patch(nn.ModuleDict({"text": MODULES[release](DIM, HEADS)}))
    assert report.left[0].reason == "not in a block of a Vision Transformer known here"


@pytest.mark.parametrize("options", [{}, {"norm_layer": nn.LayerNorm, "qk_norm": True}], ids=["plain", "qk_norm"])
def test_a_tower_keeps_its_features_and_gradients(options):
    assert_same_numbers(tower(**options), images(), calls=2)


def test_nothing_else_of_a_tower_changes():
    x = images()
    assert_nothing_else_changes(tower().eval(), lambda model: model(x))


def test_of_a_clip_the_blocks_of_its_vision_tower_are_patched():
    vision = {"layers": 2, "width": DIM, "head_width": 32, "patch_size": 8, "image_size": 32, "attentional_pool": True}
    text = {"context_length": 8, "vocab_size": 32, "width": 32, "heads": 2, "layers": 1}
    report = patch(open_clip.CLIP(32, open_clip.CLIPVisionCfg(**vision), open_clip.CLIPTextCfg(**text)))
    assert [m.name for m in report.patched] == [f"visual.transformer.resblocks.{i}.attn" for i in (0, 1)]
    assert {m.name: m.reason for m in report.left} == dict.fromkeys(
        ("visual.attn_pool.attn", "transformer.resblocks.0.attn"), "not in a block of a Vision Transformer known here"
    )
    assert report.num_prefix_tokens == 1


@torch.no_grad()
def test_residual_stream():
    model, x, seen = tower().eval(), images(), []
    stream = residual_stream(model)
    assert [name for name, _ in stream.layers] == ["transformer.resblocks.0", "transformer.resblocks.1"]
    assert stream.layout == TokenLayout(num_registers=0)
    for _, layer in stream.layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    found = model.forward_intermediates(x, output_fmt="NLC", output_extra_tokens=True)
    for i, tokens in enumerate(seen):
        assert torch.equal(tokens[:, :1], found["image_intermediates_prefix"][i])
        assert torch.equal(tokens[:, 1:], found["image_intermediates"][i])


@pytest.mark.usefixtures("dynamo")
def test_compiles_to_one_graph():
    module, x = scrambled(open_clip_like.Attention(DIM, HEADS)), torch.randn(IMAGES, TOKENS, DIM)
    patch(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, x, x), module(x))
