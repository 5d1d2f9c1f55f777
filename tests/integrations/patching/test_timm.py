"""timm's attention modules, patched: the same numbers, whatever the module is asked to do."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.patching.judge import DTYPES, assert_same_numbers, converted, scrambled
from vitreg_kernels import patch, patched, unpatch
from vitreg_kernels.integrations.patching.method import fused_method
from vitreg_kernels.measure.accuracy import same_bits

timm = pytest.importorskip("timm")
from timm.layers.attention import Attention, AttentionRope  # noqa: E402  (importable only where timm is)
from timm.models.eva import EvaAttention  # noqa: E402

DIM, HEADS, PREFIX, TOKENS = 64, 4, 5, 21  # one CLS token, four registers, a 4 x 4 grid
NORM = {"norm_layer": nn.LayerNorm}


def rope(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """timm's rotation, sines beside cosines: ``[*shape, M, 2 D]``, pairs side by side."""
    angles = (torch.rand(*shape, TOKENS - PREFIX, DIM // HEADS // 2) * 6).repeat_interleave(2, -1)
    return torch.cat((angles.sin(), angles.cos()), -1).to(dtype)


def half_rope() -> Tensor:
    angles = (torch.rand(TOKENS - PREFIX, DIM // HEADS // 2) * 6).repeat(1, 2)
    return torch.cat((angles.sin(), angles.cos()), -1)


def key_padding() -> Tensor:
    return (torch.arange(TOKENS) < torch.tensor([[TOKENS], [13]]))[:, None, None]


# A module, and what it is called with beside x.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict]]] = {
    "Attention": (lambda: Attention(DIM, HEADS, qkv_bias=True), dict),
    "Attention, no biases, other widths": (
        lambda: Attention(DIM, HEADS, attn_head_dim=24, dim_out=80, proj_bias=False),
        dict,
    ),
    "Attention, norms and gate": (
        lambda: Attention(DIM, HEADS, qkv_bias=True, qk_norm=True, scale_norm=True, gated=True, **NORM),
        dict,
    ),
    "Attention, padded": (lambda: Attention(DIM, HEADS), lambda: {"attn_mask": key_padding()}),
    "Attention, biased": (lambda: Attention(DIM, HEADS), lambda: {"attn_mask": torch.randn(HEADS, TOKENS, TOKENS)}),
    "Attention, causal": (lambda: Attention(DIM, HEADS), lambda: {"is_causal": True}),
    "AttentionRope": (lambda: AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX), lambda: {"rope": rope()}),
    "AttentionRope, no rope": (lambda: AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX), dict),
    "AttentionRope, halves": (
        lambda: AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX, rotate_half=True, qk_norm=True, **NORM),
        lambda: {"rope": half_rope()},
    ),
    "AttentionRope, grouped": (
        lambda: AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX, qkv_fused=False, num_kv_heads=2, gated=True),
        lambda: {"rope": rope(), "attn_mask": key_padding()},
    ),
    "AttentionRope, rope by image": (
        lambda: AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX),
        lambda: {"rope": rope(2, 1)},
    ),
    "AttentionRope, rope by head": (
        lambda: AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX),
        lambda: {"rope": rope(HEADS)},
    ),
    "EvaAttention, biases apart": (
        lambda: EvaAttention(DIM, HEADS, num_prefix_tokens=PREFIX, **NORM),
        lambda: {"rope": rope()},
    ),
    "EvaAttention, biases added": (
        lambda: EvaAttention(DIM, HEADS, num_prefix_tokens=PREFIX, qkv_bias_separate=True, qk_norm=True, **NORM),
        lambda: {"rope": rope(), "attn_mask": key_padding()},
    ),
    "EvaAttention, three projections": (
        lambda: EvaAttention(
            DIM, HEADS, num_prefix_tokens=PREFIX, qkv_fused=False, gated=True, rotate_half=True, **NORM
        ),
        lambda: {"rope": half_rope()},
    ),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_output_and_gradients(case, dtype):
    make, call = CASES[case]
    inputs = converted(call(), dtype)
    assert_same_numbers(
        scrambled(make()), torch.randn(2, TOKENS, DIM), inputs, dtype, calls=0 if "causal" in case else 1
    )


@pytest.mark.parametrize("case", CASES)
def test_goes_through_the_op_but_for_causal_calls(case, calls):
    make, call = CASES[case]
    module = make()
    with patched(module):
        module(torch.randn(2, TOKENS, DIM), **call())
    if "causal" in case:
        assert not calls
        return
    ((name, _, options, _),) = calls
    plain = not any(word in case for word in ("norm", "halves", "grouped", "by head", "biases added", "three"))
    assert name == ("register_attention_qkv" if plain else "register_attention")
    assert (options.get("rope") is not None) == ("rope" in call() and "by head" not in case)


def test_a_learnt_rotation_gets_its_gradient():
    module, learnt = AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX), rope().requires_grad_()
    x = torch.randn(2, TOKENS, DIM)
    module(x, rope=learnt).square().sum().backward()
    expected, learnt.grad = learnt.grad, None
    with patched(module):
        module(x, rope=learnt).square().sum().backward()
    torch.testing.assert_close(learnt.grad, expected, rtol=1e-4, atol=1e-4)


def test_a_rotation_of_other_tokens_is_an_error():
    module = AttentionRope(DIM, HEADS, num_prefix_tokens=PREFIX - 1)
    with patched(module), pytest.raises(ValueError, match="16 rows for 17 patches"):
        module(torch.randn(2, TOKENS, DIM), rope=rope())


def test_a_hook_on_the_probabilities_still_sees_them():
    module, seen = Attention(DIM, HEADS), []
    module.fused_attn = False
    x = torch.randn(2, TOKENS, DIM)
    expected = module(x)
    with patched(module):
        module.attn_drop.register_forward_hook(lambda _, __, probabilities: seen.append(probabilities.shape))
        assert same_bits(module(x), expected)
    assert seen == [(2, HEADS, TOKENS, TOKENS)]


def test_hooks_on_the_parts_run_as_before():
    module, order = Attention(DIM, HEADS, qk_norm=True, scale_norm=True, gated=True, **NORM), []
    for name, part in module.named_children():
        part.register_forward_hook(lambda *_, name=name: order.append(name))
    x = torch.randn(2, TOKENS, DIM)
    module(x)
    before = order.copy()
    order.clear()
    with patched(module):
        module(x)
    assert order == before


def test_a_linear_layer_in_anothers_place_is_called_and_not_read():
    class Adapted(nn.Module):  # as LoRA wraps a layer
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.layer, self.more = layer, nn.Linear(layer.in_features, layer.out_features)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + self.more(x)

    for make in (
        lambda: Attention(DIM, HEADS),
        lambda: EvaAttention(DIM, HEADS, qkv_bias_separate=True, **NORM),
    ):
        module = make()
        module.qkv, module.proj.weight.data = Adapted(module.qkv), torch.randn(DIM, DIM)
        x = torch.randn(2, TOKENS, DIM)
        expected = module(x)
        with patched(module):
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_dropout_is_the_modules_own():
    module = Attention(DIM, HEADS, attn_drop=0.5, proj_drop=0.5).train()
    x = torch.randn(2, TOKENS, DIM)
    with patched(module):
        assert not torch.equal(module(x), module(x))
        module.eval()
        assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("symmetric", [pytest.param(True, marks=pytest.mark.slow), False])
def test_padded_naflex_images_reach_a_kernel_that_knows_padding(symmetric, calls):
    model = timm.create_model(
        "naflexvit_base_patch16_par_gap", depth=2, embed_dim=64, num_heads=2, use_key_only_attn_mask=not symmetric
    )
    model = scrambled(model).eval()
    valid = torch.arange(16) < torch.tensor([[16], [9]])
    coordinates = torch.stack((torch.arange(16) // 4, torch.arange(16) % 4), -1).expand(2, -1, -1)
    given = {"patches": torch.randn(2, 16, 768), "patch_coord": coordinates, "patch_valid": valid}
    expected = model(given)
    own_mask = model._forward_embeds(*given.values(), None)["attn_mask"]
    report = patch(model)
    assert same_bits(model._forward_embeds(*given.values(), None)["attn_mask"], own_mask)
    actual = model(given)
    masks = [call.options["attn_mask"] for call in calls]
    assert {call.op for call in calls} == {"register_attention_qkv"}
    assert [(mask.dtype, mask.shape) for mask in masks] == [(torch.bool, (2, 1, 1, 16 + report.num_prefix_tokens))] * 2
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    alone = model({name: value[1:, :9] for name, value in given.items()})
    torch.testing.assert_close(actual[1:], alone, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(torch.compile(model, backend="eager")(given), actual)
    own = torch.randn(2, 1, 16 + report.num_prefix_tokens, 16 + report.num_prefix_tokens)
    with_own_mask = model(given | {"attn_mask": own})
    unpatch(model)
    assert same_bits(model(given), expected)
    torch.testing.assert_close(with_own_mask, model(given | {"attn_mask": own}), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_small_patch14_reg4_dinov2", 5),
        ("vit_tiny_patch16_dinov3_qkvb", 5),
        ("vit_wee_patch16_reg1_gap_256", 1),
        ("vit_base_patch16_siglip_gap_224", 0),
        ("deit_tiny_distilled_patch16_224", 2),
        ("naflexvit_base_patch16_par_gap", 4),
    ],
)
def test_the_models_prefix_is_found(name, prefix):
    with torch.device("meta"):
        model = timm.create_model(name, depth=1)
    assert patch(model).num_prefix_tokens == prefix


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_the_meta_device_shapes_are_as_ever_and_weights_come_later(dtype):
    options = {"depth": 1, "embed_dim": 64, "num_heads": 2, "img_size": 32}
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_dinov3_qkvb", **options).to(dtype)
        patch(model)
        assert model(torch.randn(2, 3, 32, 32, dtype=dtype)).shape == (2, 64)
    model = model.to_empty(device="cpu").eval()
    model.init_weights()
    x = torch.randn(2, 3, 32, 32, dtype=dtype)
    actual = model(x)
    assert fused_method(model.blocks[0].attn) is not None
    unpatch(model)
    torch.testing.assert_close(actual, model(x), rtol=1e-4, atol=1e-4)


def test_what_is_not_known_is_left_alone_with_a_reason():
    model = timm.create_model("beit_base_patch16_224", depth=1, embed_dim=64, num_heads=2)
    report = patch(model)
    assert not report.patched
    assert "has no" in report.left[0].reason
    pooled = patch(timm.create_model("vit_pe_core_tiny_patch16_384", depth=1, embed_dim=64, num_heads=2))
    assert [module.cls for module in pooled.patched] == ["AttentionRope"]


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_tiny_patch16_dinov3_qkvb"])
def test_torchscript_and_fx(name):
    options = {"depth": 2, "embed_dim": 64, "num_heads": 2, "img_size": 64}
    model, x = scrambled(timm.create_model(name, **options)).eval(), torch.randn(1, 3, 64, 64)
    expected = model(x)
    patch(model)
    fused = model(x)
    scripted = torch.jit.script(model)
    assert same_bits(scripted(x), expected)  # TorchScript compiles timm's own computation
    traced = torch.fx.symbolic_trace(model)
    assert same_bits(traced(x), fused)
    assert "blocks.0.attn" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
    torch.testing.assert_close(torch.jit.script(traced)(x), expected, rtol=1e-4, atol=1e-4)
    assert same_bits(model(x), fused)
