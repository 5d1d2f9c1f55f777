"""What ``patch`` leaves as it was, what it refuses, and what patched models live through."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from tests.integrations.patching.judge import assert_close, instances, results, state
from tests.integrations.patching.small_vit import images, vit
from vitreg_kernels import TokenNormMonitor, UnsupportedError, patch, patched, unpatch
from vitreg_kernels.integrations.patching.method import fused_method
from vitreg_kernels.measure.accuracy import same_bits

timm = pytest.importorskip("timm")
from timm.layers.attention import Attention  # noqa: E402  (importable only where timm is)


def test_nothing_but_the_computation_changes_and_all_of_it_comes_back(calls):
    model, x = vit(), images()
    expected, before, own = model(x), state(model), instances(model)
    patch(model)
    assert state(model) == before
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3
    unpatch(model)
    assert state(model) == before
    assert instances(model) == own
    assert same_bits(model(x), expected)
    assert len(calls) == 3
    unpatch(model)  # a model that is not patched stays as it is


def test_the_report():
    report = patch(vit(), backend="reference")
    assert report.num_prefix_tokens == 5
    assert [module.name for module in report.patched] == [f"blocks.{i}.attn" for i in range(3)]
    assert not report.left
    assert str(report).splitlines() == [
        "  3 x Attention (blocks.0.attn to blocks.2.attn): patched, reference (2 heads of 32, 261 tokens, float32)",
        "prefix tokens (CLS and registers): 5",
    ]


def test_a_report_of_a_part():
    report = patch(vit().blocks[0].attn)
    assert str(report).splitlines()[0].startswith("  1 x Attention (the model): patched, ")
    assert report.num_prefix_tokens is None
    assert patch(vit().blocks, num_prefix_tokens=5).num_prefix_tokens == 5


class Overriding(Attention):
    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return super().forward(x) * 2


class Inheriting(Attention):
    pass


class Elsewhere(nn.Module):
    fused_attn = True


def other(x: Tensor, **options: object) -> Tensor:
    return x


def test_what_may_be_different_is_left_alone_with_a_reason(calls):
    parts = {
        "overriding": Overriding(64, 2),
        "inheriting": Inheriting(64, 2),
        "replaced": Attention(64, 2),
        "without": Attention(64, 2),
        "elsewhere": Elsewhere(),
    }
    parts["replaced"].forward = other
    del parts["without"].proj_drop
    model = nn.ModuleDict(parts)
    report = patch(model)
    assert [module.name for module in report.patched] == ["inheriting"]
    assert {module.name: module.reason for module in report.left} == {
        "overriding": "Overriding has a forward of its own",
        "replaced": "its forward was replaced on the instance by another",
        "without": "has no proj_drop, as the class known here has",
        "elsewhere": "not a class known here",
    }
    assert "left alone: Overriding has a forward of its own" in str(report)
    unpatch(model)
    before = state(model)
    with pytest.raises(UnsupportedError, match=r"would be left alone:\n.*Overriding"):
        patch(model, strict=True)
    assert state(model) == before
    assert parts["replaced"].forward is other
    assert not any(map(fused_method, model.modules()))


def test_a_class_whose_forward_takes_more_is_left_alone(monkeypatch):
    def forward(self: Attention, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, bias=None):
        return x

    monkeypatch.setattr(Attention, "forward", forward)
    (left,) = patch(Attention(64, 2)).left
    assert left.reason == "its forward takes bias, which is not known here"


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"backend": "sdp"}, ValueError, "unknown backend 'sdp'"),
        ({"backend": "triton"}, UnsupportedError, "not triton: runs on cuda"),
        ({"num_prefix_tokens": -1}, ValueError, "at least 0, got -1"),
        ({"num_prefix_tokens": True}, ValueError, "int of at least 0, got True"),
        ({"num_prefix_tokens": 2.0}, ValueError, "int of at least 0, got 2.0"),
    ],
)
def test_bad_arguments_change_nothing(options, error, words):
    model = vit()
    with pytest.raises(error, match=words):
        patch(model, **options)
    assert not any(map(fused_method, model.modules()))


def test_a_model_without_attention_is_refused():
    with pytest.raises(ValueError, match="Linear has no attention module known here; known are those of"):
        patch(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"must be a torch.nn.Module, not str"):
        patch("vit_small")


def test_patched_twice_the_last_one_counts():
    model, x = vit(), images()
    expected = model(x)
    patch(model, backend="reference")
    patch(model, backend="sdpa", num_prefix_tokens=1)
    attend = fused_method(model.blocks[0].attn).op
    assert (attend.backend, attend.num_prefix_tokens) == ("sdpa", 1)
    unpatch(model)
    assert same_bits(model(x), expected)


def test_patched_gives_back_after_an_error():
    model = vit()

    with pytest.raises(ValueError, match="unpack"), patched(model):
        model(torch.randn(1, 2, 3))
    assert not any(map(fused_method, model.modules()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_their_own(copied, calls):
    model, x = vit(), images()
    expected = model(x)
    patch(model, backend="reference")
    fused = model(x)
    twin = copied(model)
    assert same_bits(twin(x), fused)
    fused_method(twin.blocks[2].attn).op.backend = "sdpa"
    model(x), twin(x)
    assert [call.backend for call in calls[-6:]] == [*["reference"] * 5, "sdpa"]
    fused_method(twin.blocks[2].attn).op.backend = "reference"
    unpatch(model)
    assert same_bits(twin(x), fused)
    with torch.no_grad():
        twin.blocks[0].attn.qkv.weight.zero_()
    assert same_bits(model(x), expected)
    assert not torch.equal(twin(x), fused)
    unpatch(twin)
    assert not any(map(fused_method, twin.modules()))


def test_a_copy_goes_when_its_last_user_does():
    import gc
    import weakref

    model = vit()
    patch(model)
    gone = weakref.ref(model.blocks[0].attn)
    gc.disable()
    try:
        del model
        assert gone() is None  # by counting: no circle holds a model's memory
    finally:
        gc.enable()


def test_under_another_wrapper_it_stops_when_it_is_taken_off(calls):
    model, x = vit(), images()
    expected = model(x)
    patch(model)
    attn, outer = model.blocks[0].attn, []
    inner = attn.forward
    attn.forward = lambda *args, **options: outer.append(1) or inner(*args, **options)
    unpatch(model)
    torch.testing.assert_close(model(x), expected)
    assert outer == [1]
    assert not calls


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant, calls):
    model, x = vit().train(), images()
    expected = results(model, x)
    patch(model)
    for block in model.blocks:
        block.forward = partial(checkpoint, type(block).forward.__get__(block), use_reentrant=reentrant)
    assert_close(results(model, x), expected)
    assert len(calls) == 6


def test_accumulation_autocast_and_scaled_gradients():
    model, x = vit().train(), images()
    scaler = torch.amp.GradScaler("cpu")
    optimiser = torch.optim.SGD(model.parameters(), 1e-3)

    def step() -> dict[str, Tensor]:
        trained = copy.deepcopy(model.state_dict())
        optimiser.zero_grad()
        for half in x.chunk(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(half).float().square().mean()
            scaler.scale(loss).backward()
        found = {name: p.grad.clone() for name, p in model.named_parameters()}
        scaler.step(optimiser)
        scaler.update(1.0)
        assert all(p.isfinite().all() for p in model.parameters())
        model.load_state_dict(trained)
        return found

    scaler.scale(torch.ones(()))  # it begins when it is first asked
    scaler.update(2.0**10)
    expected = step()
    scaler.update(2.0**10)
    with patched(model):
        actual = step()
    for name in expected:  # two roundings to bf16 apart
        error = (actual[name] - expected[name]).norm() / expected[name].norm().clamp_min(1e-6)
        assert error < 0.05 or "qkv.bias" in name, (name, error)


def test_an_average_of_weights_is_patched_as_its_model(calls):
    model, x = vit(), images()
    patch(model)
    average = AveragedModel(model)
    average.update_parameters(model)
    torch.testing.assert_close(average(x), model(x))
    assert len(calls) == 6


@pytest.mark.parametrize("first", ["patched", pytest.param("compiled", marks=pytest.mark.slow)])
def test_compiled_without_a_break(first, dynamo):
    model, x = vit(depth=2), images()
    expected, graphs = model(x), []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    if first == "compiled":
        compiled(x)
        graphs.clear()
    patch(compiled)
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-4)
    (graph,) = graphs
    nodes = [node for part in graph.modules() if isinstance(part, torch.fx.GraphModule) for node in part.graph.nodes]
    assert sum("vitreg.attention_forward" in str(node.target) for node in nodes) == 2
    unpatch(compiled)
    assert same_bits(compiled(x), expected)


@pytest.mark.parametrize("first", [patch, TokenNormMonitor])
def test_beside_a_monitor_whichever_comes_first(first):
    model, x = vit(), images()
    with torch.no_grad(), TokenNormMonitor(model) as alone:
        model(x)
        expected = alone.compute()
    if first is patch:
        patch(model)
    monitor = TokenNormMonitor(model)
    patch(model)
    with torch.no_grad():
        model(x)
    assert monitor.compute().layers == expected.layers
    torch.testing.assert_close(monitor.compute().stats.patches.mean, expected.stats.patches.mean)
    monitor.remove()
    unpatch(model)
    assert not any("forward" in vars(module) for module in model.modules())
