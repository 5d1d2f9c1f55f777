"""torch's ``nn.MultiheadAttention``, patched: the same numbers under every mask, its own forward for other calls."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from tests.integrations.patching.judge import (
    DTYPES,
    assert_nothing_else_changes,
    assert_own_forward,
    assert_same_numbers,
    converted,
    in_autocast,
    op_calls,
    scrambled,
)
from vitreg_kernels import UnsupportedError, patch, unpatch
from vitreg_kernels.integrations.patching.method import fused_method
from vitreg_kernels.measure.accuracy import same_bits

DIM, HEADS, TOKENS, IMAGES = 64, 2, 13, 3


def multihead(**options):
    return scrambled(nn.MultiheadAttention(DIM, HEADS, **{"batch_first": True, **options}))


def of_itself(module, x, **options):
    return module(x, x, x, need_weights=False, **options)[0]


def padding(images):
    """True where a key is padded: none, 4 and 9 of the three images' keys."""
    return torch.arange(TOKENS) >= torch.tensor([TOKENS, 9, 4])[:images, None]


def pattern(*batch):
    return (torch.rand(*batch, TOKENS, TOKENS) < 0.4) & ~torch.eye(TOKENS, dtype=torch.bool)


def additive(left_out):
    return torch.randn(left_out.shape).masked_fill(left_out, -torch.inf)


MASKS = {
    "none": lambda images: {},
    "padding": lambda images: {"key_padding_mask": padding(images)},
    "additive padding": lambda images: {"key_padding_mask": additive(padding(images))},
    "pattern": lambda images: {"attn_mask": pattern()},
    "additive": lambda images: {"attn_mask": additive(pattern())},
    "pattern by head": lambda images: {"attn_mask": pattern(images * HEADS)},
    "additive by head": lambda images: {"attn_mask": additive(pattern(images * HEADS))},
    "both": lambda images: {"key_padding_mask": padding(images), "attn_mask": pattern()},
    "both by head": lambda images: {"key_padding_mask": padding(images), "attn_mask": pattern(images * HEADS)},
    "both additive": lambda images: {"key_padding_mask": additive(padding(images)), "attn_mask": additive(pattern())},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["images first", "tokens first", "one image"])
@pytest.mark.parametrize("mask", MASKS)
def test_same_output_and_gradients(mask, layout, dtype):
    alone = layout == "one image"
    given = MASKS[mask](1 if alone else IMAGES)
    if alone and "key_padding_mask" in given:
        given["key_padding_mask"] = given["key_padding_mask"][0]

    shape = {"images first": (IMAGES, TOKENS, DIM), "tokens first": (TOKENS, IMAGES, DIM), "one image": (TOKENS, DIM)}
    module = multihead(batch_first=layout == "images first", bias=mask != "none")
    assert_same_numbers(module, torch.randn(shape[layout]), converted(given, dtype), dtype, call=of_itself)


@pytest.mark.parametrize("mask", ["none", "padding", "additive"])
def test_autocast(mask):
    x, given = torch.randn(IMAGES, TOKENS, DIM), MASKS[mask](IMAGES)
    assert_same_numbers(multihead(), x, given, call=in_autocast(of_itself))


def test_a_mask_may_be_learnt():
    module, x, gradients = multihead(), torch.randn(IMAGES, TOKENS, DIM), []
    for each in (module, copy.deepcopy(module)):
        mask = torch.zeros(TOKENS, TOKENS, requires_grad=True)
        if each is not module:
            patch(each)
        of_itself(each, x, attn_mask=mask).square().sum().backward()
        gradients.append(mask.grad)
    torch.testing.assert_close(*gradients)


OTHER_CALLS = {
    "weights": lambda m, x: m(x, x, x),
    "weights by head": lambda m, x: m(x, x, x, average_attn_weights=False),
    "another query": lambda m, x: m(x[:, :3], x, x, need_weights=False),
    "another key": lambda m, x: m(x, x + 1, x, need_weights=False),
    "another value": lambda m, x: m(x, x, x + 1, need_weights=False),
    "causal": lambda m, x: m(x, x, x, need_weights=False, attn_mask=pattern().triu(), is_causal=True),
    "everything dropped": lambda m, x: dropping_all(m)(x, x, x, need_weights=False),
}


def dropping_all(module):
    module.train().dropout = 1.0
    return module


@pytest.mark.parametrize("call", OTHER_CALLS)
def test_other_calls_run_the_modules_own_forward(call):
    x = torch.randn(IMAGES, TOKENS, DIM)

    def seeded(module):
        torch.manual_seed(0)
        return OTHER_CALLS[call](module, x)

    assert_own_forward(multihead(), seeded)


def test_masks_of_other_dtypes_run_the_modules_own_forward():
    x, mask = torch.randn(IMAGES, TOKENS, DIM), additive(pattern())
    half = x.to(torch.bfloat16)
    assert_own_forward(multihead().to(torch.bfloat16), lambda m: [of_itself(m, half, attn_mask=mask)])
    with pytest.warns(UserWarning, match="mismatched"):  # torch's own words
        assert_own_forward(multihead(), lambda m: [of_itself(m, x, attn_mask=mask, key_padding_mask=padding(IMAGES))])


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_run_torchs_fast_path():
    images = [torch.randn(n, DIM) for n in (5, TOKENS)]
    nested = torch.nested.nested_tensor(images)
    assert_own_forward(multihead().eval(), lambda m: of_itself(m, nested).unbind())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attn_mask": torch.zeros(1, TOKENS)}, "shape of the 2D attn_mask"),
        ({"attn_mask": torch.zeros(1, TOKENS, TOKENS)}, "shape of the 3D attn_mask"),
        ({"key_padding_mask": torch.zeros(1, TOKENS)}, None),
        ({"is_causal": True}, "Need attn_mask"),
    ],
)
def test_what_torch_refuses_is_refused_in_its_words(options, message):
    module = multihead()
    patch(module)
    with pytest.raises((RuntimeError, AssertionError), match=message):
        of_itself(module, torch.randn(IMAGES, TOKENS, DIM), **options)


def test_dropout_draws_what_torch_draws():
    module, x = multihead(dropout=0.3).train(), torch.randn(IMAGES, TOKENS, DIM)
    torch.manual_seed(0)
    expected, random = of_itself(module, x), torch.get_rng_state()
    patch(module)
    torch.manual_seed(0)
    with op_calls() as seen:
        torch.testing.assert_close(of_itself(module, x), expected)
    assert [call.options["dropout_p"] for call in seen] == [0.3]
    assert torch.equal(torch.get_rng_state(), random)
    with op_calls() as seen:
        of_itself(module.eval(), x)
    assert [call.options["dropout_p"] for call in seen] == [0.0]


@torch.no_grad()
def test_an_image_that_is_all_padding_gives_zeros():
    """As torch's slow path does; its fast path, which runs without gradients, gives NaN."""
    module, mask = multihead(), torch.ones(IMAGES, TOKENS, dtype=torch.bool)
    patch(module)
    output = of_itself(module, torch.randn(IMAGES, TOKENS, DIM), key_padding_mask=mask)
    assert torch.equal(output, module.out_proj.bias.expand_as(output))


class OnlyItsWeight(nn.Module):
    """In the place of out_proj, as an adapter that the class does not call: what it adds is never seen."""

    def __init__(self, base):
        super().__init__()
        self.base = base
        self.weight, self.bias = base.weight, base.bias

    def forward(self, x):
        return self.base(x) + 1


def test_out_proj_is_read_and_never_called():
    module, ran = multihead(), []
    module.out_proj.register_forward_hook(lambda *args: ran.append(args))
    module.out_proj = OnlyItsWeight(module.out_proj)
    assert_same_numbers(module, torch.randn(IMAGES, TOKENS, DIM), call=of_itself)
    assert not ran


class OwnForward(nn.MultiheadAttention):
    def forward(self, query, key, value, need_weights=True):
        return super().forward(query, key, value, need_weights=need_weights)


class OwnName(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: multihead(kdim=32), "keys and values have widths of their own"),
        (lambda: multihead(vdim=32), "keys and values have widths of their own"),
        (lambda: multihead(add_bias_kv=True), "adds keys to those of the tokens"),
        (lambda: multihead(add_zero_attn=True), "adds keys to those of the tokens"),
        (lambda: OwnForward(DIM, HEADS), "OwnForward has a forward of its own"),
        (lambda: torch.ao.nn.quantizable.MultiheadAttention(DIM, HEADS), "has a forward of its own"),
        (lambda: OwnName(DIM, HEADS), ""),
    ],
)
def test_what_is_left_alone(make, reason):
    module = make()
    report = patch(module)
    assert report.modules[0].reason == reason
    assert ("forward" in vars(module)) == (reason == "")


def test_transformer_encoder_layers_keep_their_fast_path():
    """It reads the module's weights and never calls it. While it trains the layer calls it, and ours answers."""
    layer, x = nn.TransformerEncoderLayer(DIM, HEADS, 2 * DIM, dropout=0.0, batch_first=True), torch.randn(2, 9, DIM)
    scrambled(layer).eval()
    assert patch(layer).left[0].reason == "not in a block of a Vision Transformer known here"
    with torch.no_grad():
        expected = layer(x)
        patch(layer.self_attn)
        with op_calls() as seen:
            assert same_bits(layer(x), expected)
        assert not seen
    with op_calls() as seen:
        torch.testing.assert_close(layer.train()(x), expected, atol=1e-5, rtol=1e-4)
    assert len(seen) == 1


def vit():
    models = pytest.importorskip("torchvision.models")
    sizes = {"num_layers": 2, "num_heads": HEADS, "hidden_dim": DIM, "mlp_dim": 2 * DIM, "num_classes": 10}
    return scrambled(models.VisionTransformer(32, 8, **sizes)).eval()


def images():
    return torch.randn(2, 3, 32, 32)


def test_a_torchvision_model_keeps_its_logits_and_gradients():
    assert_same_numbers(vit(), images(), calls=2)


def test_nothing_else_of_a_torchvision_model_changes():
    x = images()
    assert_nothing_else_changes(vit(), lambda model: model(x))


def test_the_report_tells_vision_transformers_from_the_rest():
    model = nn.ModuleDict({"vit": vit(), "decoder": nn.TransformerDecoderLayer(DIM, HEADS)})
    report = patch(model)
    assert [module.name for module in report.patched] == [
        f"vit.encoder.layers.encoder_layer_{i}.self_attention" for i in (0, 1)
    ]
    assert [module.name for module in report.left] == ["decoder.self_attn", "decoder.multihead_attn"]
    assert {module.reason for module in report.left} == {"not in a block of a Vision Transformer known here"}
    assert report.num_prefix_tokens == 1
    assert [name for name, module in model.named_modules() if fused_method(module)] == [m.name for m in report.patched]
    with pytest.raises(UnsupportedError, match="not in a block"):
        patch(model, strict=True)
    patch(model["decoder"].self_attn)
    assert [module.name for module in patch(model).left] == ["decoder.multihead_attn"]


@torch.no_grad()
def test_statistics_are_the_modules_own_weights():
    module, x, seen = multihead(), torch.randn(IMAGES, TOKENS, DIM), []
    patch(module, num_prefix_tokens=3)
    fused_method(module).op.takers.append(("prefix_attention", seen.append))
    of_itself(module, x)
    weights = module(x, x, x, average_attn_weights=False)[1]
    torch.testing.assert_close(seen[1], weights[:, :, :3])


@torch.no_grad()
def test_copies_and_pickles_are_patched():
    model, x = vit(), images()
    expected = model(x)
    patch(model)
    ours = model(x)
    assert not same_bits(ours, expected)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits(other(x), ours)
        unpatch(other)
        assert same_bits(other(x), expected)
    assert same_bits(model(x), ours)


@pytest.mark.usefixtures("dynamo")
def test_compiles_to_one_graph():
    model, x = vit(), images()
    patch(model)
    expected = model(x)
    with op_calls() as seen:
        compiled = torch.compile(model, fullgraph=True, backend="eager")(x)
    assert len(seen) == 2
    torch.testing.assert_close(compiled, expected)
    compiled.sum().backward()
    module, mask = multihead(), padding(IMAGES)
    patch(module)
    whole = torch.compile(of_itself, fullgraph=True, backend="eager")
    for options in ({"key_padding_mask": mask}, {"attn_mask": additive(pattern(IMAGES * HEADS))}):
        tokens = torch.randn(IMAGES, TOKENS, DIM)
        torch.testing.assert_close(whole(module, tokens, **options), of_itself(module, tokens, **options))


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
def test_torchscript_compiles_the_class_and_fx_takes_it_whole():
    model, x = vit(), images()
    expected = model(x)
    patch(model)
    torch.testing.assert_close(torch.jit.script(model)(x), expected)
    traced = torch.fx.symbolic_trace(model)
    with op_calls() as seen:
        assert same_bits(traced(x), model(x))
    assert len(seen) == 4
