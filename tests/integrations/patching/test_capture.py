"""Statistics captured while attention runs fused: the right ones, of the right layers, at every way of running."""

from __future__ import annotations

import copy
import inspect
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.integrations.patching.judge import instances
from tests.integrations.patching.small_vit import images, vit
from vitreg_kernels import RegisterViT, ViTConfig, capture, patch
from vitreg_kernels.integrations.patching.capture import NAMES
from vitreg_kernels.integrations.patching.method import fused_method
from vitreg_kernels.measure.accuracy import same_bits

timm = pytest.importorskip("timm")

LAYERS = ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"]


def timms(depth: int = 3, **options) -> nn.Module:
    model = vit(depth=depth, **options)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight.normal_(std=0.3)
    return model


def ours(depth: int = 3, **changes) -> nn.Module:
    return RegisterViT(ViTConfig(image_size=56, patch_size=14, dim=64, depth=depth, num_heads=2, **changes)).eval()


def captured(model: nn.Module) -> nn.Module:
    if not isinstance(model, RegisterViT):
        patch(model)
    return model


def test_it_is_what_the_formula_gives():
    model, x, probabilities = timms(), images(), {}
    for i, block in enumerate(model.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda _, __, p, i=i: probabilities.update({LAYERS[i]: p}))
    with torch.no_grad():
        model(x)
    for block in model.blocks:
        block.attn.attn_drop._forward_hooks.clear()
    patch(model)
    with (
        torch.no_grad(),
        capture(model, "prefix_attention") as prefix,
        capture(model, "received_attention") as received,
    ):
        model(x)
    assert list(prefix) == list(received) == LAYERS
    for layer in LAYERS:
        assert prefix[layer].shape == (2, 2, 5, 21)
        torch.testing.assert_close(prefix[layer], probabilities[layer][:, :, :5], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(received[layer], probabilities[layer].mean(-2), rtol=1e-4, atol=1e-5)


def projected(module: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Query, key and value by the formula, ``[B, H, N, D]`` each, with their norms and not turned."""
    query, key, value = module.qkv(x).unflatten(-1, (3, 2, 32)).permute(2, 0, 3, 1, 4)
    return module.q_norm(query), module.k_norm(key), value


@pytest.mark.parametrize(
    "make",
    [
        timms,
        partial(timms, qk_norm=True),
        ours,
        partial(ours, qk_norm=True),
        partial(ours, position="rope"),
    ],
)
def test_operands_are_what_the_projection_gives(make):
    """With the statistics at the same time, and of the model's own dtype: none is of the other, or turned."""
    model, expected = captured(make()).bfloat16(), {}
    for layer in (LAYERS[0], LAYERS[2]):
        model.get_submodule(layer).register_forward_pre_hook(lambda m, args, i=layer: expected.update({i: args[0]}))
    with (
        torch.no_grad(),
        capture(model, "query", layers=[0, 2]) as query,
        capture(model, "value", layers=[0, 2]) as value,
        capture(model, "prefix_attention", layers=[0, 2]) as prefix,
        capture(model, "key", layers=[0, 2]) as key,
    ):
        model(images().bfloat16())
        for layer, x in expected.items():
            for got, wanted in zip((query, key, value), projected(model.get_submodule(layer), x), strict=True):
                assert same_bits(got[layer], wanted)
    assert set(query) == set(key) == set(value) == set(prefix) == set(expected)


@pytest.mark.parametrize("make", [timms, ours])
def test_operands_hold_no_more_memory_than_they_need(make):
    """A view would keep the packed projection of all three."""
    model = captured(make())
    with capture(model, "key", layers=[-1]) as keys:
        model(images())
    (kept,) = keys.values()
    assert kept.is_contiguous()
    assert kept.untyped_storage().nbytes() == 2 * 2 * 21 * 32 * 4


@pytest.mark.parametrize("make", [timms, ours])
def test_a_call_that_leaves_the_kernels(make):
    """A hook on ``attn_drop`` asks for N x N. What timm's class then does itself shows nothing, not the call before."""
    model = captured(make())
    with capture(model, "key") as keys, capture(model, "lse") as statistics:
        model(images())
        before = dict(keys)
        for block in model.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda *_: None)
        model(images())
    assert list(before) == LAYERS
    seen = LAYERS if isinstance(model, RegisterViT) else []
    assert list(keys) == list(statistics) == seen
    assert not any(same_bits(keys[layer], before[layer]) for layer in seen)


@pytest.mark.parametrize("make", [timms, ours])
@pytest.mark.parametrize("output", NAMES)
def test_outputs_stay_the_same_and_nothing_is_left_behind(make, output):
    model, x = captured(make()), images()
    expected = model(x)
    own = instances(model)
    with capture(model, output, layers=[-1, 0]) as statistics:
        result = model(x)
    for got, wanted in zip(*(r if isinstance(r, tuple) else (r,) for r in (result, expected)), strict=True):
        torch.testing.assert_close(got, wanted)
    assert statistics.layers == (LAYERS[2], LAYERS[0])
    assert set(statistics) == {LAYERS[2], LAYERS[0]}
    assert all(s.dtype == torch.float32 and not s.requires_grad for s in statistics.values())
    assert instances(model) == own
    before = dict(statistics)
    model(images())
    assert all(statistics[layer] is before[layer] for layer in before)


def test_two_ways_to_hold_a_model_agree():
    theirs = timms()
    from vitreg_kernels import load_vit

    with pytest.warns(UserWarning, match="grid"):
        mine = load_vit(theirs.state_dict(), num_heads=2).eval()
    x = images()
    patch(theirs)
    with capture(theirs, "prefix_attention") as a, capture(mine, "prefix_attention") as b, torch.no_grad():
        theirs(x), mine(x)
    for layer in LAYERS:
        torch.testing.assert_close(a[layer], b[layer], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("make", [timms, ours])
def test_nested_captures_end_in_any_order(make):
    model, x = captured(make()), images()
    first, second = capture(model, "lse"), capture(model, "max_logit", layers=[1])
    lse, largest = first.__enter__(), second.__enter__()
    model(x)
    first.__exit__(None, None, None)
    assert (len(lse), len(largest)) == (3, 1)
    lse.clear(), largest.clear()
    model(x)
    assert (len(lse), len(largest)) == (0, 1)
    second.__exit__(None, None, None)
    largest.clear()
    model(x)
    assert not largest


@pytest.mark.parametrize("make", [pytest.param(timms, marks=pytest.mark.slow), ours])
def test_under_the_compiler(make, dynamo):
    model, x = captured(make(depth=2)), images()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        compiled(x)
        with capture(compiled, "prefix_attention", layers=[-1]) as maps, capture(compiled, "key", layers=[-1]) as keys:
            compiled(x)
            from_graph = [*maps.values(), *keys.values()]
            maps.clear(), keys.clear()
            model(x)
            torch.testing.assert_close(from_graph, [maps[LAYERS[1]], keys[LAYERS[1]]])
        maps.clear(), keys.clear()
        compiled(x)
    assert not maps
    assert not keys


@pytest.mark.parametrize("reentrant", [True, False])
def test_in_training_with_checkpointing(reentrant):
    model, x = timms().train(), images().requires_grad_()
    patch(model)
    with capture(model, "prefix_attention") as expected, capture(model, "query") as queries:
        model(x).sum().backward()
    for block in model.blocks:
        block.forward = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=reentrant)
    for output, unchecked in (("prefix_attention", expected), ("query", queries)):
        with capture(model, output) as maps:
            result = model(x)
            before = dict(maps)
            result.sum().backward()
        assert list(maps) == LAYERS
        for layer in LAYERS:
            assert same_bits(maps[layer], before[layer])
            assert same_bits(maps[layer], unchecked[layer])


def test_in_training_with_our_own_checkpointing():
    model, x = ours().train(), images()
    with capture(model, "lse") as statistics, capture(model, "value") as values:
        model.forward_features(x).sum().backward()
        expected = [dict(statistics), dict(values)]
        model.checkpointing = True
        model.forward_features(x).sum().backward()
    for found, of in zip((statistics, values), expected, strict=True):
        assert list(found) == LAYERS
        assert all(same_bits(found[layer], of[layer]) for layer in LAYERS)
        assert not any(each.requires_grad for each in found.values())


@pytest.mark.parametrize("make", [timms, ours])
def test_a_copy_captures_nothing(make):
    model = captured(make())
    with capture(model, "lse") as statistics, capture(model, "key") as keys:
        twin = copy.deepcopy(model)
        twin(images())
    assert not statistics
    assert not keys
    assert not fused_method(twin.blocks[0].attn).op.takers


def test_what_has_not_run_is_told():
    model = captured(timms())
    with capture(model, "lse", layers=[0]) as statistics, pytest.raises(KeyError, match=r"blocks\.0\.attn has not run"):
        statistics["blocks.0.attn"]
    with pytest.raises(KeyError, match="nowhere"):
        statistics["nowhere"]


@pytest.mark.parametrize(
    ("make", "output", "layers", "error", "words"),
    [
        (lambda: captured(timms()), "attention", None, ValueError, "unknown output 'attention': expected one of 'lse'"),
        (timms, "lse", None, ValueError, r"no attention of this library's to capture: call patch\(model\)"),
        (lambda: captured(timms()), "lse", [3], IndexError, "no attention layer 3: the model has 3"),
        (lambda: captured(timms()), "lse", [0, -4], IndexError, "no attention layer -4: the model has 3"),
        (lambda: captured(timms().blocks), "prefix_attention", None, ValueError, "not known how many prefix tokens 0"),
        (
            lambda: captured(timm.create_model("vit_base_patch16_siglip_gap_224", depth=1, embed_dim=64, num_heads=2)),
            "prefix_attention",
            None,
            ValueError,
            "has no prefix token",
        ),
    ],
)
def test_bad_arguments(make, output, layers, error, words):
    model = make()
    with pytest.raises(error, match=words), capture(model, output, layers=layers):
        pass
    assert not any(fused_method(module) and fused_method(module).op.takers for module in model.modules())


def test_memory_is_that_of_the_rows_asked_for():
    """What is kept of N x N probabilities is P x N of them: 5 rows of 261."""
    model, x = captured(timms()), images()
    with capture(model, "prefix_attention", layers=[-1]) as maps:
        model(x)
    (kept,) = maps.values()
    assert kept.untyped_storage().nbytes() == 2 * 2 * 5 * 21 * 4


def test_its_signature_says_what_it_gives():
    assert list(inspect.signature(capture).parameters) == ["model", "output", "layers"]
