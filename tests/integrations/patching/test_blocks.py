"""Blocks patched with ``level="block"``: the same numbers, and hooks see what they see.

Fusion gives way to whoever looks at what it leaves out.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.integrations.patching import small_vit
from tests.integrations.patching.judge import (
    DTYPES,
    assert_close,
    assert_nothing_else_changes,
    assert_same_numbers,
    called,
    converted,
    in_autocast,
    instances,
    op_calls,
    results,
    scrambled,
    state,
)
from vitreg_kernels import TokenNormMonitor, UnsupportedError, patch, patched, unpatch
from vitreg_kernels.integrations.patching.method import fused_method
from vitreg_kernels.measure.accuracy import same_bits

timm = pytest.importorskip("timm")
from timm.layers import Attention, DropPath, LayerNormFp32, RmsNorm  # noqa: E402  (importable only where timm is)
from timm.models.eva import EvaBlock  # noqa: E402
from timm.models.vision_transformer import Block  # noqa: E402

DIM, HEADS, PREFIX, TOKENS = 64, 4, 5, 21  # one CLS token, four registers, a 4 x 4 grid
FUSED = {"level": "block"}


def rope() -> Tensor:
    """timm's rotation, sines beside cosines."""
    angles = (torch.rand(TOKENS - PREFIX, DIM // HEADS // 2) * 6).repeat_interleave(2, -1)
    return torch.cat((angles.sin(), angles.cos()), -1)


def key_padding() -> Tensor:
    return (torch.arange(TOKENS) < torch.tensor([[TOKENS], [13]]))[:, None, None]


def block(*, inplace: bool = False, **options) -> nn.Module:
    made = scrambled(Block(DIM, HEADS, qkv_bias=True, **options))
    for scale in (made.ls1, made.ls2):
        scale.inplace = inplace
    return made


def eva(**options) -> nn.Module:
    return scrambled(EvaBlock(DIM, HEADS, num_prefix_tokens=PREFIX, **options))


# A block, and what it is called with beside x.
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict]]] = {
    "Block": (block, dict),
    "Block, LayerScale": (partial(block, init_values=0.5), lambda: {"attn_mask": key_padding()}),
    "Block, LayerScale in place": (partial(block, init_values=0.5, inplace=True), dict),
    "Block, stochastic depth": (partial(block, init_values=0.5, drop_path=0.5), dict),
    "Block, causal": (block, lambda: {"is_causal": True}),
    "EvaBlock": (eva, dict),
    "EvaBlock, gammas": (partial(eva, init_values=0.5), lambda: {"rope": rope()}),
    "EvaBlock, one gamma": (
        partial(eva, init_values=0.5, attn_only_layer_scale=True, swiglu_mlp=True, scale_mlp=True),
        lambda: {"rope": rope(), "attn_mask": torch.randn(HEADS, TOKENS, TOKENS)},
    ),
    "EvaBlock, AttentionRope": (
        partial(eva, attn_type="rope", num_kv_heads=2, qkv_fused=False, drop_path=0.5),
        lambda: {"rope": rope(), "attn_mask": key_padding()},
    ),
}
MODELS = {"Dinov2WithRegisters": {"num_register_tokens": 4}, "Dinov2": {}, "DINOv3ViT": {"num_register_tokens": 4}}
NAMES = {"timm": ("norm2", "ls1", "drop_path1"), "transformers": ("norm2", "layer_scale1", "drop_path")}


def hugging_face(name: str, **options) -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": DIM, "num_attention_heads": HEADS, "num_hidden_layers": 2, "intermediate_size": 96}
    config = getattr(transformers, f"{name}Config")(**sizes, image_size=32, patch_size=8, **MODELS[name], **options)
    return scrambled(getattr(transformers, f"{name}Model")(config)).eval()


def vit(**options) -> nn.Module:
    return scrambled(small_vit.vit(**{"depth": 2, "embed_dim": DIM, "num_heads": HEADS, **options})).eval()


def tokens() -> Tensor:
    return torch.randn(4, TOKENS, DIM)


def images(side: int = 32) -> Tensor:
    return torch.randn(2, 3, side, side)


def norms(calls: list) -> list:
    """The adds and norms among the calls."""
    return [call for call in calls if call.op == "residual_layer_norm"]


@pytest.mark.parametrize("way", [*DTYPES, "autocast"], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_output_and_gradients(case, way):
    make, call = CASES[case]
    dtype = torch.float32 if way == "autocast" else way
    seen = assert_same_numbers(
        make(),
        torch.randn(2, TOKENS, DIM),
        converted(call(), dtype),
        dtype,
        call=in_autocast(called) if way == "autocast" else called,
        calls=1 if "causal" in case else 2,
        **FUSED,
    )
    (norm,) = norms(seen)
    scaled = "in place" not in case and any(word in case for word in ("LayerScale", "gamma", "depth"))
    assert (norm.options["layer_scale"] is not None) == scaled
    assert (norm.options["drop_path"] is not None) == ("depth" in case or "AttentionRope" in case)


def last_hidden_state(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).last_hidden_state


@pytest.mark.parametrize("way", [*DTYPES, "autocast"], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_whole_models_of_transformers(name, way):
    seen = assert_same_numbers(
        hugging_face(name),
        images(),
        dtype=torch.float32 if way == "autocast" else way,
        call=in_autocast(last_hidden_state) if way == "autocast" else last_hidden_state,
        calls=4,
        **FUSED,
    )
    assert [norm.options["layer_scale"] is None for norm in norms(seen)] == [False, False]


def seeded(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    output = model(x)
    return output if isinstance(output, Tensor) else output.last_hidden_state


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["timm", *MODELS])
def test_the_same_images_are_dropped(name, autocast, calls):
    model = vit(drop_path_rate=0.9) if name == "timm" else hugging_face(name, drop_path_rate=0.6)
    model, x = model.train(), torch.randn(8, 3, *(2 * [56 if name == "timm" else 32]))
    call = in_autocast(seeded) if autocast else seeded
    last = [part for part in model.modules() if hasattr(part, "norm2")][-1]
    outputs, handle = hook(getattr(last, "drop_path1" if name == "timm" else "drop_path"), "forward")
    expected, random = call(model, x), torch.get_rng_state()
    handle.remove()
    patch(model, **FUSED)
    actual = call(model, x)
    assert torch.equal(torch.get_rng_state(), random)
    assert actual.dtype == expected.dtype
    drawn, kept = norms(calls)[-1].options["drop_path"], outputs[0].flatten(1).any(1)  # of the first use of it
    assert drawn.dtype == outputs[0].dtype
    assert torch.equal(drawn != 0, kept)
    assert 0 < kept.count_nonzero() < 8
    tolerance = (0.1 if autocast else 1e-4) * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_a_bf16_stream_becomes_fp32_under_autocast_where_it_did():
    """It does behind the first LayerScale, whose factors are fp32: what is added later keeps its digits."""
    module, x = block(init_values=0.5), tokens().bfloat16()
    with torch.autocast("cpu", torch.bfloat16), op_calls() as calls:
        expected = module(x)
        patch(module, **FUSED)
        actual = module(x)
    assert actual.dtype == expected.dtype == torch.float32
    (norm,) = norms(calls)
    assert norm.tensors[0].dtype == torch.float32


def hook(part: nn.Module, kind: str) -> tuple[list[Tensor], torch.utils.hooks.RemovableHandle]:
    """What passes by a module, before, after or backward, and the hook that sees it."""
    seen: list[Tensor] = []
    if kind == "pre":
        return seen, part.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    if kind == "forward":
        return seen, part.register_forward_hook(lambda _, args, output: seen.append(output.detach().clone()))
    return seen, part.register_full_backward_hook(lambda _, __, gradients: seen.append(gradients[0].clone()))


def first_block(model: nn.Module) -> nn.Module:
    return next(part for part in model.modules() if hasattr(part, "norm2"))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["pre", "forward", "backward"])
@pytest.mark.parametrize("part", ["norm2", "scale", "drop_path"])
@pytest.mark.parametrize("name", ["timm", "Dinov2WithRegisters", "DINOv3ViT"])
def test_a_hook_sees_what_it_sees_unpatched(name, part, kind, when, calls):
    model = vit(drop_path_rate=0.5) if name == "timm" else hugging_face(name, drop_path_rate=0.5)
    model, x = model.train(), images(56 if name == "timm" else 32)
    library = "timm" if name == "timm" else "transformers"
    path = NAMES[library][("norm2", "scale", "drop_path").index(part)]
    theirs = copy.deepcopy(model)
    expected, _ = hook(getattr(first_block(theirs), path), kind)
    seeded(theirs, x).square().sum().backward()
    if when == "after":
        report = patch(model, **FUSED)
    actual, handle = hook(getattr(first_block(model), path), kind)
    if when == "before":
        report = patch(model, **FUSED)
    output = seeded(model, x)
    output.square().sum().backward()
    fused = 2 if part == "scale" else 1  # LayerScale is called where it is; a whole block gives way to the others
    assert len(norms(calls)) == fused
    assert expected
    assert_close(dict(enumerate(actual)), dict(enumerate(expected)))
    handle.remove()
    calls.clear()
    seeded(model, x)
    assert len(norms(calls)) == (2 if when == "after" else fused)
    reasons = [each.reason for each in report.left]
    assert len(reasons) == (when == "before" and part != "scale")
    what = "norm2" if part == "norm2" else "stochastic depth"
    assert all(f"its {what} is a " in reason and "or hooked" in reason for reason in reasons)


@pytest.mark.parametrize("name", ["timm", *MODELS])
def test_nothing_else_changes_and_all_of_it_comes_back(name, calls):
    model = vit() if name == "timm" else hugging_face(name)
    x = images(56 if name == "timm" else 32)
    expected, before, own = seeded(model, x), state(model), instances(model)
    patch(model, **FUSED)
    assert state(model) == before
    torch.testing.assert_close(seeded(model, x), expected, rtol=1e-4, atol=1e-4)
    assert len(norms(calls)) == 2
    unpatch(model)
    assert instances(model) == own
    assert same_bits(seeded(model, x), expected)
    assert len(norms(calls)) == 2


@pytest.mark.parametrize("name", MODELS)
def test_hooks_on_every_part_run_in_their_order(name):
    """With them no block is fused, and attention is: timm's would not be, whose hooks may see the probabilities."""
    x = images()
    assert_nothing_else_changes(hugging_face(name).train(), lambda model: seeded(model, x), **FUSED)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("name", ["timm", *MODELS])
def test_copies_have_their_own(name, copied, calls):
    model = vit() if name == "timm" else hugging_face(name)
    x = images(56 if name == "timm" else 32)
    expected = seeded(model, x)
    patch(model, **FUSED)
    fused, twin = seeded(model, x), copied(model)
    unpatch(model)
    calls.clear()
    scrambled(model)
    assert same_bits(seeded(twin, x), fused)
    assert len(norms(calls)) == 2
    unpatch(twin)
    assert same_bits(seeded(twin, x), expected)


def test_the_report():
    assert str(patch(vit(), **FUSED, backend="reference")).splitlines() == [
        "  2 x Block (blocks.0 to blocks.1): patched, add and norm by reference (64 channels, float32)",
        "  2 x Attention (blocks.0.attn to blocks.1.attn): patched, reference (4 heads of 16, 261 tokens, float32)",
        "prefix tokens (CLS and registers): 5",
    ]
    assert [each.cls for each in patch(vit()).modules] == ["Attention", "Attention"]
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert {each.backend for each in patch(model, **FUSED).patched} == {""}


@pytest.mark.parametrize("backend", ["reference", {"attention": "reference", "residual_norm": "reference"}], ids=str)
def test_backends_are_named_by_op(backend, calls):
    model, x = vit(), images(56)
    patch(model, **FUSED, backend=backend)
    model(x)
    assert [(call.op, call.backend) for call in calls] == 2 * [
        ("register_attention_qkv", "reference"),
        ("residual_layer_norm", "reference"),
    ]
    calls.clear()
    patch(model, **FUSED, backend={"residual_norm": "composite"})
    model(x)
    assert {call.backend for call in norms(calls)} == {"composite"}
    assert "reference" not in {call.backend for call in calls}


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"level": "model"}, ValueError, "level must be one of 'attention', 'block', not 'model'"),
        ({"level": "block", "backend": {"residual_norm": "triton"}}, UnsupportedError, "not triton: "),
        ({"level": "attention", "backend": {"residual_norm": "reference"}}, ValueError, "residual_norm"),
    ],
)
def test_bad_arguments_change_nothing(options, error, words):
    model = vit()
    with pytest.raises(error, match=words):
        patch(model, **options)
    assert not any(map(fused_method, model.modules()))


class LayerNorm(nn.LayerNorm):
    """Of a name that many have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class TokenDropPath(DropPath):
    """Drops what it likes."""


class Unknown(nn.Module):
    """A block of timm's model that somebody wrote."""

    def __init__(self, dim: int, num_heads: int, **options: object) -> None:
        super().__init__()
        self.norm, self.attn = nn.LayerNorm(dim), Attention(dim, num_heads)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attn(self.norm(x))


class Overriding(Block):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x)


def with_part(name: str, part: nn.Module) -> nn.Module:
    made = block()
    setattr(made, name, part)
    return made


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (partial(block, norm_layer=RmsNorm), "its norm2 is a RmsNorm or hooked, and a plain LayerNorm alone is fused"),
        (partial(block, norm_layer=LayerNormFp32), "its norm2 is a LayerNormFp32 or hooked"),
        (partial(eva, norm_layer=RmsNorm), "its norm2 is a RmsNorm or hooked"),
        (
            partial(with_part, "norm2", nn.LayerNorm(DIM, elementwise_affine=False)),
            "its norm2 is a LayerNorm or hooked",
        ),
        (partial(with_part, "norm2", LayerNorm(DIM)), "its norm2 is a LayerNorm or hooked"),
        (partial(with_part, "drop_path1", TokenDropPath()), "its stochastic depth is a TokenDropPath or hooked"),
        (partial(Overriding, DIM, HEADS), "Overriding has a forward of its own"),
    ],
)
def test_what_may_be_different_is_left_alone_with_a_reason(make, reason, calls):
    module, x = make(), tokens()
    expected = module(x)
    report = patch(module, **FUSED)
    assert [each.name for each in report.patched] == ["attn"]
    assert len(report.left) == 1
    assert report.left[0].reason.startswith(reason)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 1
    unpatch(module)
    with pytest.raises(UnsupportedError, match=r"would be left alone:"):
        patch(module, **FUSED, strict=True)
    assert not any(map(fused_method, module.modules()))


def test_a_part_put_in_later_is_called():
    module, x = block(), tokens()
    patch(module, **FUSED)
    for name, part in (("norm2", LayerNorm(DIM)), ("drop_path1", nn.Dropout(0.0)), ("ls1", nn.Tanh())):
        setattr(module, name, part)
        torch.testing.assert_close(module(x), Block.forward(module, x), rtol=1e-4, atol=1e-4)


class LayerScale(nn.Module):
    """Of a name that many have."""

    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((DIM,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma * 2


class Kin(Block):
    """In somebody's own package, beside a LayerScale of theirs."""


def test_a_layer_scale_of_somebodys_own_is_called():
    module, x = scrambled(Kin(DIM, HEADS)), tokens()
    module.ls1 = LayerScale()
    expected = module(x)
    patch(module, **FUSED)
    with op_calls() as calls:
        torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-4)
    assert norms(calls)[0].options["layer_scale"] is None


def test_blocks_of_older_releases_are_left_alone(monkeypatch):
    """They hand no mask to their attention, which takes none."""
    monkeypatch.setattr(Block, "forward", lambda self, x: x + self.attn(self.norm1(x)))
    report = patch(vit(), **FUSED)
    assert [each.reason for each in report.left] == 2 * ["its forward takes no is_causal in this version"]


def test_unknown_blocks_are_reported():
    model = vit(block_fn=Unknown)
    report = patch(model, **FUSED)
    assert [(each.cls, each.reason) for each in report.left] == 2 * [("Unknown", "not a block known here")]
    assert [each.cls for each in report.patched] == 2 * ["Attention"]
    assert not patch(model).left


@pytest.mark.parametrize("make", [partial(block, init_values=0.5, drop_path=0.5), partial(eva, init_values=0.5)])
def test_a_block_compiles_without_a_break(make, dynamo):
    module, x = make(), tokens()
    patch(module, **FUSED)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    expected, actual = results(module, x), results(compiled, x)
    torch.testing.assert_close({name.removeprefix("_orig_mod."): each for name, each in actual.items()}, expected)


def test_a_layer_of_transformers_compiles_without_a_break(dynamo, calls):
    model, x = hugging_face("DINOv3ViT"), images()
    patch(model, **FUSED)
    expected = seeded(model, x)
    calls.clear()
    actual = torch.compile(model, fullgraph=True, backend="eager")(x).last_hidden_state
    torch.testing.assert_close(actual, expected)
    assert len(norms(calls)) == 2


def test_beside_a_monitor():
    model, x = vit(), images(56)
    with torch.no_grad(), TokenNormMonitor(model) as alone:
        model(x)
        expected = alone.compute()
    patch(model, **FUSED)
    with torch.no_grad(), TokenNormMonitor(model) as beside, op_calls() as calls:
        model(x)
        found = beside.compute()
    assert len(norms(calls)) == 2
    assert found.layers == expected.layers
    for group in ("cls", "registers", "patches"):
        ours, its = getattr(found.stats, group), getattr(expected.stats, group)
        assert torch.equal(ours.count, its.count)
        torch.testing.assert_close(ours.mean, its.mean)


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, calls):
    module, x = block(init_values=0.5, drop_path=0.5), tokens()
    expected = results(module, x)
    patch(module, **FUSED)
    actual = results(module, x, call=lambda module, x: checkpoint(module, x, use_reentrant=reentrant))
    assert len(norms(calls)) == 2  # forward, and again before backward
    assert_close(actual, expected)


@pytest.mark.parametrize("name", MODELS)
def test_gradient_checkpointing_of_transformers(name, calls):
    model, x = hugging_face(name).train(), images()
    expected = results(model, x, call=last_hidden_state)
    model.gradient_checkpointing_enable()
    with patched(model, **FUSED):
        actual = results(model, x, call=last_hidden_state)
    assert len(norms(calls)) == 4
    assert_close(actual, expected)


def test_torchscript_and_fx():
    model, x = vit(), images(56)
    expected = model(x)
    patch(model, **FUSED)
    fused = model(x)
    assert same_bits(torch.jit.script(model)(x), expected)  # TorchScript compiles timm's own computation
    traced = torch.fx.symbolic_trace(model)
    assert same_bits(traced(x), fused)
    assert "blocks.0" in [node.target for node in traced.graph.nodes if node.op == "call_module"]
