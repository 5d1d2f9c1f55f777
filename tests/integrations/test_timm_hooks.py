"""Hooks and their tools see on a RegisterViT, or on our attention in timm's model, what they see on timm's own."""

from __future__ import annotations

import copy

import pytest
import torch
from models import DIM, timm_vit

from vitreg_kernels import RegisterAttention, load_vit
from vitreg_kernels.monitor import TokenNormMonitor

pytest.importorskip("timm")

from timm.layers import create_feature_extractor as timm_extractor
from timm.utils.attention_extract import AttentionExtract
from torchvision.models.feature_extraction import create_feature_extractor as torchvision_extractor

OPTIONS = {"reg_tokens": 4, "no_embed_class": True, "init_values": 0.5, "qk_norm": True, "global_pool": ""}
# torch.fx cannot trace timm's dynamic sizes, with which its patch_embed gives a map of patches.
OPTIONS["dynamic_img_size"] = False
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def theirs(**options):
    model = timm_vit(**OPTIONS | options)
    for block in model.blocks:
        block.attn.fused_attn = False  # which calls attn_drop, as hooks on it need
    return model


def with_our_attention(model):
    swapped = copy.deepcopy(model)
    for block in swapped.blocks:
        attention = RegisterAttention(DIM, 2, qk_norm=True)
        attention.load_state_dict(block.attn.state_dict())
        block.attn = attention.eval()
    return swapped


def ours(model):
    return load_vit(model.state_dict(), num_heads=2).eval()


def seen_by_hooks(model, names):
    """What every module is given and gives, and the gradient that comes back to it, with hooks on one module a time."""
    seen = {}
    for name in names:
        module, found = model.get_submodule(name), []
        handles = [
            module.register_forward_hook(lambda _, args, output, found=found: found.extend((args[0], output))),
            module.register_full_backward_hook(lambda _, __, gradients, found=found: found.append(gradients[0])),
        ]
        model.forward_features(IMAGES).square().sum().backward()
        seen[name] = [x.detach().clone() for x in found]
        for handle in handles:
            handle.remove()
    return seen


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("make", [ours, with_our_attention])
def test_every_module_that_both_have(make):
    model = theirs()
    candidate = make(model)
    names = [name for name, _ in candidate.named_modules() if name in dict(model.named_modules())]
    names = [name for name in names if name not in ("", "blocks")]  # a list with us, which is said when it is hooked
    for name in ("attn", "attn.attn_drop", "attn.q_norm", "ls1", "ls2", "norm1", "mlp"):
        assert f"blocks.1.{name}" in names
    expected, actual = seen_by_hooks(model, names), seen_by_hooks(candidate, names)
    for name in names:
        scale = [x.abs().max() for x in expected[name]]  # of three tensors; none of what features do not need
        for x, y, largest in zip(actual[name], expected[name], scale, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=2e-4 * float(largest), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [ours, with_our_attention])
@pytest.mark.parametrize("hook_type", ["forward", "forward_pre"])
def test_attention_extract(make, hook_type):
    model = theirs()
    expected = AttentionExtract(model, method="hook", hook_type=hook_type)(IMAGES)
    actual = AttentionExtract(make(model), method="hook", hook_type=hook_type)(IMAGES)
    assert list(actual) == ["blocks.0.attn.attn_drop", "blocks.1.attn.attn_drop"]
    torch.testing.assert_close(dict(actual), dict(expected), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("make", [ours, with_our_attention])
def test_attention_extract_by_fx_says_that_there_is_no_softmax(make):
    with pytest.raises(RuntimeError, match="No node names found"):
        AttentionExtract(make(theirs()), method="fx")


@pytest.mark.parametrize("make", [ours, with_our_attention])
@pytest.mark.parametrize("extractor", [timm_extractor, torchvision_extractor])
def test_feature_extractors(make, extractor):
    model = theirs()
    nodes = {"blocks.0.attn": "a", "blocks.1": "b"} if make is with_our_attention else {"blocks.0": "b", "norm": "n"}
    expected = {}
    for name, short in nodes.items():
        hook = lambda _, __, output, short=short: expected.setdefault(short, output)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    model(IMAGES)
    if make is with_our_attention:
        nodes = {"blocks.0.attn": "a", "blocks.1.add_1": "b"}
    torch.testing.assert_close(extractor(make(model), nodes)(IMAGES), expected, atol=1e-4, rtol=1e-3)


def test_a_monitor_of_a_compiled_timm_model_counts_its_own(dynamo):
    """Two models of a class, of which one is compiled before; each is monitored while the other is and is not."""
    first, second = (timm_vit(depth=2) for _ in range(2))
    compiled = [torch.compile(model, backend="eager", fullgraph=True) for model in (first, second)]
    compiled[0](IMAGES)
    one = TokenNormMonitor(second)
    for model in compiled:
        model(IMAGES)
    with TokenNormMonitor(first) as other:
        for model in compiled:
            model(IMAGES)
    compiled[0](IMAGES)
    assert other.compute().stats.cls.count.tolist() == [2, 2]
    assert one.compute().stats.cls.count.tolist() == [4, 4]
