"""RegisterAttention in timm's place: the same weights, the same features."""

from __future__ import annotations

import copy

import pytest
import torch

from vitreg_kernels import RegisterAttention, Rope
from vitreg_kernels.measure.accuracy import compare

timm = pytest.importorskip("timm")
from timm.layers.attention import Attention, AttentionRope  # noqa: E402  (importable only where timm is)

DIM, HEADS, TOKENS = 96, 3, 21  # one CLS token, four registers, a 4 x 4 grid


def eager_attention(**options):
    """timm's module, its attention weights in the open, with logits large enough for the softmax to matter."""
    module = Attention(DIM, HEADS, qkv_bias=True, norm_layer=torch.nn.LayerNorm, **options)
    module.fused_attn = False
    sharpen(module)
    return module


def sharpen(module):
    """Scale the small initial projections up: near-uniform attention would hide mistakes."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith("qkv.weight"):
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5)
            elif "_norm" in name or name.endswith("bias"):
                parameter.add_(0.2 * torch.randn_like(parameter))


def assert_accurate(actual, exact, eager, terms):
    accuracy = compare(actual, exact, eager, terms=terms)
    assert accuracy.passed, accuracy


def outputs_and_gradients(module, x, gradient, **inputs):
    """The module's output and the gradients of ``x`` and of every parameter, by name."""
    x = x.clone().requires_grad_()
    output = module(x, **inputs)
    module.zero_grad()
    output.backward(gradient.to(output.dtype))
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    if "k_norm.bias" in gradients:
        # What is added to every key changes no softmax: this gradient is exactly zero, and all that is left of it is
        # the rounding of terms that cancel. They are as large as those of the query's bias: judge both together.
        gradients["norm biases"] = torch.stack((gradients.pop("q_norm.bias"), gradients.pop("k_norm.bias")))
    return {"output": output.detach(), "x": x.grad} | gradients


def assert_same_within_rule(ours, theirs, x, **inputs):
    """Output and gradients of ``ours`` against ``theirs`` in fp64, by the error of ``theirs`` in its own dtype."""
    gradient = torch.randn(x.shape)
    exact_inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    exact = outputs_and_gradients(copy.deepcopy(theirs).double(), x.double(), gradient.to(x.dtype), **exact_inputs)
    eager = outputs_and_gradients(theirs, x, gradient.to(x.dtype), **inputs)
    actual = outputs_and_gradients(ours, x, gradient.to(x.dtype), **inputs)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert actual[name].dtype == eager[name].dtype, name
        assert_accurate(actual[name], exact[name], eager[name], terms=DIM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
@pytest.mark.parametrize("masked", [None, "key_padding", "additive"])
def test_loads_timm_weights_and_gives_its_output_and_gradients(dtype, qk_norm, masked):
    torch.manual_seed(0)
    theirs = eager_attention(qk_norm=qk_norm).to(dtype)
    ours = RegisterAttention(DIM, HEADS, qk_norm=qk_norm, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    inputs = {}
    if masked == "key_padding":
        inputs["attn_mask"] = (torch.arange(TOKENS) < torch.tensor([[TOKENS], [13]]))[:, None, None]
    elif masked == "additive":
        inputs["attn_mask"] = torch.randn(2, HEADS, TOKENS, TOKENS, dtype=dtype)
    assert_same_within_rule(ours, theirs, torch.randn(2, TOKENS, DIM).to(dtype), **inputs)


def test_state_dicts_go_both_ways():
    theirs, ours = eager_attention(qk_norm=True), RegisterAttention(DIM, HEADS, qk_norm=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)


@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_autocast_gives_what_timm_gives(qk_norm):
    torch.manual_seed(0)
    theirs = eager_attention(qk_norm=qk_norm)
    ours = RegisterAttention(DIM, HEADS, qk_norm=qk_norm)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, TOKENS, DIM)
    exact = copy.deepcopy(theirs).double()(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        eager, actual = theirs(x), ours(x)
    assert actual.dtype == eager.dtype == torch.bfloat16
    assert_accurate(actual, exact, eager, terms=DIM)


@pytest.mark.parametrize("rotate_half", [True, False], ids=["half", "interleaved"])
def test_rope_turns_what_timm_turns(rotate_half):
    torch.manual_seed(0)
    theirs = AttentionRope(DIM, HEADS, num_prefix_tokens=5, rotate_half=rotate_half)
    theirs.fused_attn = False
    sharpen(theirs)
    ours = RegisterAttention(DIM, HEADS)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randn(2, TOKENS, DIM)
    angles = torch.rand(TOKENS - 5, DIM // HEADS // 2) * 6
    angles = angles.repeat(1, 2) if rotate_half else angles.repeat_interleave(2, 1)
    sin_cos = torch.cat((angles.sin(), angles.cos()), 1)  # timm's order
    exact = copy.deepcopy(theirs).double()(x.double(), rope=sin_cos.double())
    actual = ours(x, rope=Rope(angles.cos(), angles.sin(), interleaved=not rotate_half))
    assert_accurate(actual, exact, theirs(x, rope=sin_cos), terms=DIM)


@pytest.fixture(scope="module")
def vit():
    """A small random ViT with four registers; LayerScale of 1, since DINOv2's 1e-5 would hide the attention."""
    torch.manual_seed(0)
    options = {"img_size": 56, "depth": 3, "init_values": 1.0, "num_classes": 0}
    model = timm.create_model("vit_small_patch14_reg4_dinov2", **options).eval()
    for block in model.blocks:
        block.attn.fused_attn = False
    sharpen(model)
    return model


def with_register_attention(vit):
    model = copy.deepcopy(vit)
    for block in model.blocks:
        ours = RegisterAttention(block.attn.qkv.in_features, block.attn.num_heads, num_registers=vit.num_reg_tokens)
        ours.load_state_dict(block.attn.state_dict(), strict=True)
        block.attn = ours
    return model.eval()


@torch.no_grad()
def test_a_vit_keeps_its_features(vit):
    images = torch.randn(2, 3, 56, 56)
    exact = copy.deepcopy(vit).double().forward_features(images.double())
    swapped = with_register_attention(vit)
    assert_accurate(swapped.forward_features(images), exact, vit.forward_features(images), terms=384)
    assert list(swapped.state_dict()) == list(vit.state_dict())


@torch.no_grad()
def test_prefix_attention_of_a_vit_is_its_attention(vit):
    """The rows of the CLS token and the registers, against timm's own softmax in the last block."""
    theirs, seen = vit.blocks[-1].attn, {}
    hooks = [
        theirs.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0])),
        theirs.attn_drop.register_forward_hook(lambda module, inputs, output: seen.update(probabilities=output)),
    ]
    vit.forward_features(torch.randn(1, 3, 56, 56))
    for hook in hooks:
        hook.remove()
    ours = with_register_attention(vit).blocks[-1].attn
    rows = ours(seen["x"], outputs=("prefix_attention",))[1].prefix_attention
    torch.testing.assert_close(rows, seen["probabilities"][:, :, : vit.num_prefix_tokens])
