"""What the monitor counts, in every way a model is run; and that the model does not notice."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import shutil
import weakref

import pytest
import torch
from monitor_cases import (
    DEPTH,
    LAYOUT,
    NAMES,
    TOKENS,
    Doublings,
    assert_same_counts,
    layers_of,
    monitored,
    small_vit,
    tokens,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from vitreg_kernels import RegisterViT, TokenLayout, ViTConfig
from vitreg_kernels.functional import token_norm_stats, token_norms
from vitreg_kernels.monitor import NormReport, TokenNormMonitor
from vitreg_kernels.ops.token_norms.types import NormDistribution, TokenNormStats

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler"
)
COMPILERS = ["aot_eager", pytest.param("inductor", marks=[needs_compiler, pytest.mark.slow])]


def counted_at_once(x):
    """The report of a ``Doublings`` that is given tokens x, by the op alone."""
    by_layer = [token_norm_stats(x * 2.0**i, LAYOUT) for i in range(1, DEPTH + 1)]
    by_group = zip(*by_layer, strict=True)
    stats = (NormDistribution(*map(torch.stack, zip(*group, strict=True))) for group in by_group)
    return NormReport(NAMES, TokenNormStats(*stats))


def run(model, *batches):
    """Forward and backward of each batch."""
    for x in batches:
        model(x.clone().requires_grad_()).sum().backward()


def test_many_batches_are_counted_as_all_tokens_at_once():
    batches = [tokens(batch, seed=batch) for batch in (1, 3, 2, 5)]
    model = Doublings()
    monitor = monitored(model)
    run(model, *batches)
    assert_same_counts(monitor.compute(), counted_at_once(torch.cat(batches)))
    assert_same_counts(monitor.compute(), counted_at_once(torch.cat(batches)))
    monitor.reset()
    assert not monitor.compute().stats.patches.count.any()
    run(model, batches[0])
    assert_same_counts(monitor.compute(), counted_at_once(batches[0]))


def test_a_report_does_not_change_when_counting_goes_on():
    model = Doublings()
    monitor = monitored(model)
    run(model, tokens())
    report = monitor.compute()
    run(model, tokens(seed=1))
    assert_same_counts(report, counted_at_once(tokens()))


def test_a_register_vit_is_counted_after_the_embedding_and_each_block():
    model = small_vit()
    images = torch.randn(2, 3, 16, 16)
    monitor = TokenNormMonitor(model)
    assert monitor.layers == ("embedding", *NAMES)
    model(images)
    report = monitor.compute()
    monitor.remove()
    layers = model.intermediate_layers(images, range(DEPTH), norm=False)
    for i, groups in enumerate(layers, 1):
        for norms, expected in zip(report.stats, map(token_norms, groups), strict=True):
            assert norms.count[i] == expected.numel()
            torch.testing.assert_close(norms.mean[i].float(), expected.mean())
            torch.testing.assert_close(norms.max[i], expected.max())


@pytest.mark.parametrize("make", [Doublings, small_vit])
def test_outputs_and_gradients_stay_bitwise_the_same_and_no_hook_is_left(make):
    x = tokens() if make is Doublings else torch.randn(2, 3, 16, 16)
    model = make()

    def outcome():
        model.zero_grad()
        output = model(x)
        output = torch.cat(output, 1) if isinstance(output, tuple) else output
        output.square().sum().backward()
        return [output.detach(), *(p.grad for p in model.parameters())]

    def hooks():
        return [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks or m._backward_hooks]

    expected = outcome()
    with monitored(model) if make is Doublings else TokenNormMonitor(model) as monitor:
        assert len(hooks()) == len(monitor.layers)
        assert all(map(torch.equal, outcome(), expected))
    assert not hooks()
    before = monitor.compute()
    outcome()
    assert_same_counts(monitor.compute(), before)


def test_nothing_waits_for_the_device(monkeypatch):
    """Whatever would: a number asked of a tensor, or a copy."""

    def refuse(*_, **__):
        raise AssertionError("a tensor was read on the host")

    model, vit = Doublings(), small_vit()
    with monitored(model) as monitor, TokenNormMonitor(vit):
        for name in ("__bool__", "__int__", "__float__", "__index__", "item", "tolist", "numpy", "cpu", "nonzero"):
            monkeypatch.setattr(torch.Tensor, name, refuse)
        model(tokens())
        vit(torch.zeros(1, 3, 16, 16))
        monitor.reset()
        monitor.state_dict()


every_checkpoint = pytest.mark.parametrize("reentrant", [False, True], ids=["not reentrant", "reentrant"])


@every_checkpoint
def test_checkpointing_counts_once(reentrant):
    model = Doublings(reentrant)
    monitor = monitored(model)
    runs = []
    model.blocks[0].register_forward_hook(lambda *_: runs.append(1))
    run(model, tokens())
    assert len(runs) == 2, "the forward must run twice for this to show anything"
    assert_same_counts(monitor.compute(), counted_at_once(tokens()))


@every_checkpoint
@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_compiled_checkpoint_counts_once(reentrant, compiler, dynamo):
    model = Doublings(reentrant)
    monitor = monitored(model)
    run(torch.compile(model, backend=compiler, fullgraph=True), tokens())
    assert_same_counts(monitor.compute(), counted_at_once(tokens()))


@every_checkpoint
def test_compiled_blocks_within_a_checkpoint_count_once(reentrant, dynamo):
    """The same graph runs in the forward and again in the backward, where it must not count."""
    model = Doublings(reentrant)
    monitor = monitored(model)
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    run(model, tokens(), tokens(seed=1))
    assert_same_counts(monitor.compute(), counted_at_once(torch.cat((tokens(), tokens(seed=1)))))


def test_checkpointing_of_a_register_vit_counts_once():
    model = small_vit()
    model.checkpointing = True
    monitor = TokenNormMonitor(model)
    sum(x.sum() for x in model(torch.randn(2, 3, 16, 16))).backward()
    assert monitor.compute().stats.patches.count.tolist() == [2 * 16] * (DEPTH + 1)


@pytest.mark.parametrize("compiler", COMPILERS)
def test_a_whole_graph_counts_what_eager_counts(compiler, dynamo):
    model = Doublings()
    monitor = monitored(model)
    batches = [tokens(seed=seed) for seed in range(3)]
    run(torch.compile(model, backend=compiler, fullgraph=True), *batches)
    assert_same_counts(monitor.compute(), counted_at_once(torch.cat(batches)))


@pytest.mark.parametrize("checkpointing", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_register_vit_is_one_graph(checkpointing, dynamo):
    model = small_vit()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    images = torch.randn(2, 3, 16, 16)
    with TokenNormMonitor(compiled) as monitor:
        model(images)
        eager = monitor.compute()
        monitor.reset()
        model.checkpointing = checkpointing
        sum(x.sum() for x in compiled(images)).backward()
        assert_same_counts(monitor.compute(), eager)


def test_blocks_compiled_one_by_one_share_their_graph(dynamo):
    """A graph a block would end at the recompile limit in a deep model."""
    frames = {}
    for attached in (False, True):
        torch.compiler.reset()
        model = Doublings()
        monitor = monitored(model) if attached else None
        counter = CompileCounterWithBackend("aot_eager")
        for block in model.blocks:
            block.compile(backend=counter, fullgraph=True)
        model(tokens())
        frames[attached] = counter.frame_count
    assert_same_counts(monitor.compute(), counted_at_once(tokens()))
    assert frames[True] <= frames[False] + 1 < DEPTH + 1


def test_nan_and_infinite_tokens_are_counted_apart():
    x = tokens()
    x[0, 0], x[0, 3, 1], x[1, 7, 2], x[1, 8] = torch.nan, torch.inf, torch.nan, -torch.inf
    model = Doublings()
    monitor = monitored(model)
    run(model, x)
    cls, registers, patches = monitor.compute().stats
    for group, nan, inf, size in ((cls, 1, 0, 2), (registers, 0, 1, 8), (patches, 1, 1, 32)):
        assert group.num_nan.tolist() == [nan] * DEPTH
        assert group.num_inf.tolist() == [inf] * DEPTH
        assert group.count.tolist() == [size - nan - inf] * DEPTH
        assert group.mean.isfinite().all()


def test_planted_outliers_are_found_and_none_invented():
    """From the second block on, as in the paper, five patches of all have twenty times their norm."""
    model = Doublings()
    clean = monitored(model)
    model(tokens())
    clean.remove()

    def plant(block, args, output):
        output = output.clone()
        output[0, [6, 11, 20]] *= 20.0
        output[1, [5, 17]] *= 20.0
        return output

    with monitored(model) as monitor:
        handle = model.blocks[1].register_forward_pre_hook(lambda block, args: plant(block, None, args[0]))
        model(tokens())
        handle.remove()
    assert clean.compute().stats.outliers().patches.tolist() == [0, 0, 0]
    found = monitor.compute().stats.outliers()
    assert found.patches.tolist() == [0, 5, 5]
    assert found.cls.tolist() == found.registers.tolist() == [0, 0, 0]


def test_what_a_layer_may_give():
    """Tokens, a tuple that begins with them, a list for crops of several sizes, or norms."""

    class Giving(nn.Module):
        def forward(self, x):
            return x

    large, small = tokens(2), tokens(3)[:, : LAYOUT.num_prefix_tokens + 4]
    for given in (large, (large, None), [large, small], token_norms(large)):
        model = nn.Sequential(Giving(), nn.Linear(1, 1))
        with TokenNormMonitor(model, layers=[("giving", model[0])], layout=LAYOUT) as monitor:
            model[0](given)
        count = 2 * 16 + 3 * 4 * isinstance(given, list)
        assert monitor.compute().stats.patches.count.tolist() == [count]


def test_the_blocks_of_a_register_vit_are_counted_with_their_last_branch():
    """Between two blocks the stream is a ``Residual``, whose first tensor is not what the block gives."""
    vit = RegisterViT(ViTConfig(image_size=28, dim=32, depth=2, num_heads=1, layer_scale=None))
    images = torch.randn(2, 3, 28, 28)
    with TokenNormMonitor(vit, layers=[("block", vit.blocks[0])]) as outputs, TokenNormMonitor(vit) as taps:
        vit(images)
    (counted,) = outputs.compute().rows()[2:]
    (expected,) = (row for row in taps.compute().rows() if (row.layer, row.group) == ("blocks.0", "patches"))
    assert counted.count == expected.count
    for name in ("mean", "std", "min", "median", "max"):  # to a rounding, and the bin it may change
        assert getattr(counted, name) == pytest.approx(getattr(expected, name), rel=0.01), name


def test_the_state_is_saved_and_resumed():
    first, second = tokens(seed=1), tokens(3, seed=2)
    model = Doublings()
    monitor = monitored(model)
    run(model, first)
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    monitor.remove()

    resumed = monitored(model)
    run(model, tokens(seed=9))  # which loading forgets
    resumed.load_state_dict(torch.load(file, weights_only=True))
    run(model, second)
    assert_same_counts(resumed.compute(), counted_at_once(torch.cat((first, second))))
    assert_same_counts(monitor.compute(), counted_at_once(first))


ABSENT = object()


def test_a_state_that_does_not_fit_is_refused_and_changes_nothing():
    model = Doublings()
    monitor = monitored(model)
    run(model, tokens())
    state = monitor.state_dict()
    for change, fragments in (
        ({"layers": ["a", "b", "c"]}, ["of the layers a, b, c, where the monitor's are blocks.0, blocks.1, blocks.2"]),
        (
            {"histogram": state["histogram"][..., :64]},
            ["histogram must be [3, 3, 2048] of int64, got [3, 3, 64] of int64"],
        ),
        ({"sums": ABSENT}, ["lacks sums", "state_dict()"]),
        ({"layers": None}, ["layers must be a list of names, got None"]),
        ({"layers": "abc"}, ["layers must be a list of names, got 'abc'"]),
        ({"layers": [0, 1, 2]}, ["layers must be a list of names, got [0, 1, 2]"]),
        ({"nonfinite": state["nonfinite"].to("meta")}, ["nonfinite must be [3, 3, 2] of int64, got", "meta device"]),
        ({"nonfinite": state["nonfinite"].double()}, ["nonfinite must be", "of int64, got [3, 3, 2] of float64"]),
        ({"nonfinite": "counts"}, ["nonfinite must be", "got a str"]),
        ({"extremes": None}, ["extremes must be", "got a NoneType"]),
    ):
        # All others differ, so that one that is copied too early shows.
        changed = {key: x + 1 if isinstance(x, torch.Tensor) else x for key, x in state.items()} | change
        changed = {key: value for key, value in changed.items() if value is not ABSENT}
        refused(ValueError, fragments, monitor.load_state_dict, changed)
        assert_same_counts(monitor.compute(), counted_at_once(tokens()))
    refused(ValueError, ["what state_dict() returned, got a NoneType"], monitor.load_state_dict, None)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_the_model_is_not_monitored(copied, monkeypatch):
    model = Doublings()
    monitor = monitored(model)
    copy_of_model = copied(model)
    assert_same_counts(monitor.compute(), monitored(Doublings()).compute())
    model(tokens())
    assert_same_counts(monitor.compute(), counted_at_once(tokens()))

    def refuse(*_, **__):
        raise AssertionError("a copy's tokens were counted")

    monkeypatch.setattr("vitreg_kernels.monitor.monitor.accumulate", refuse)
    copy_of_model(tokens())


SHALLOW = [copy.copy, lambda block: block._replicate_for_data_parallel()]


@pytest.mark.parametrize("copied", SHALLOW)
def test_a_shallow_copy_of_a_monitored_module_is_refused(copied):
    """It would compute with the original's weights."""
    model = Doublings()
    monitor = monitored(model)
    copied_block = copied(model.blocks[0])
    refused(RuntimeError, ["shallow copy", "remove()", "deepcopy"], copied_block, tokens())
    monitor.remove()
    refused(RuntimeError, ["shallow copy", "remove()", "deepcopy"], copied_block, tokens())
    assert torch.equal(model.blocks[0](tokens()), 2.0 * tokens())
    copied_block = copy.copy(model.blocks[0])
    copied_block.weight = nn.Parameter(torch.full_like(copied_block.weight, 3.0))
    del model.blocks[0]
    assert torch.equal(copied_block(tokens()), 3.0 * tokens())


def test_a_copy_computes_with_its_own_weights():
    model = Doublings()
    monitored(model)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        copied.blocks[0].weight.mul_(5.0)
    for _ in range(2):
        assert torch.equal(copied.blocks[0](tokens()), 10.0 * tokens())
    assert "forward" not in copied.blocks[0].__dict__
    assert torch.equal(model.blocks[0](tokens()), 2.0 * tokens())


def test_a_monitored_module_goes_with_its_last_user():
    gc.disable()
    try:
        model = Doublings()
        monitor = monitored(model)
        block = weakref.ref(model.blocks[0])
        model(tokens())
        del model, monitor
        assert block() is None
    finally:
        gc.enable()


def test_a_monitored_forward_has_the_signature_of_its_module():
    block = Doublings().blocks[0]
    expected = inspect.signature(block.forward)
    with TokenNormMonitor(block, layers=[("block", block)], layout=LAYOUT):
        assert inspect.signature(block.forward) == expected


def refused(error, fragments, function, *args, **options):
    with pytest.raises(error) as raised:
        function(*args, **options)
    text = str(raised.value)
    for fragment in fragments:
        assert fragment in text
    assert "\n" not in text
    assert not text.endswith((".", " ")), "error messages end like Python's own"


def test_mistakes_are_refused_in_one_sentence_and_leave_no_hook():
    model = Doublings()
    layers = layers_of(model)
    for error, fragments, options in (
        (TypeError, ["model must be a torch module, got a list"], {"model": [model]}),
        (ValueError, ["Doublings", "layers=[(name, module), ...]", "layout=TokenLayout"], {}),
        (ValueError, ["Doublings", "layout=TokenLayout"], {"layers": layers}),
        (ValueError, ["at least one", "got []"], {"layers": [], "layout": LAYOUT}),
        (ValueError, ["a name of its own", "blocks.0"], {"layers": layers + layers[:1], "layout": LAYOUT}),
        (TypeError, ["the layer b must be", "a str"], {"layers": [layers[0], ("b", "nomodule")], "layout": LAYOUT}),
        (TypeError, ["layout must be a TokenLayout, not 4"], {"layers": layers, "layout": 4}),
        (ValueError, ["no parameters"], {"model": nn.ReLU(), "layers": [("relu", nn.ReLU())], "layout": LAYOUT}),
    ):
        refused(error, fragments, TokenNormMonitor, **{"model": model, **options})
    assert not any(module._forward_hooks for module in model.modules())
    monitor = monitored(model)
    refused(RuntimeError, ["init_process_group"], monitor.compute, all_reduce=True)
    refused(ValueError, ["process_group", "all_reduce=True"], monitor.compute, process_group="ranks")
    with TokenNormMonitor(model, layers=layers, layout=TokenLayout(num_registers=TOKENS)):
        refused(ValueError, [f"{TOKENS} tokens"], model, tokens())
