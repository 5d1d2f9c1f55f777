"""What patched models go through: replicas, threads, orders of patching, and compilation block by block."""

from __future__ import annotations

import copy
import inspect
import itertools
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.patching.small_vit import images, vit
from vitreg_kernels import RegisterViT, TokenNormMonitor, ViTConfig, capture, patch, patched, unpatch
from vitreg_kernels.integrations.patching.method import fused_method
from vitreg_kernels.measure.accuracy import same_bits

timm = pytest.importorskip("timm")
from timm.layers.attention import Attention  # noqa: E402  (importable only where timm is)


def ours(depth: int) -> nn.Module:
    return RegisterViT(ViTConfig(image_size=56, patch_size=14, dim=64, depth=depth, num_heads=2)).eval()


WAYS: dict[str, Callable[[nn.Module], AbstractContextManager]] = {
    "patched": patched,
    "patched by blocks": partial(patched, level="block"),
    "captured": partial(capture, output="lse"),
    "monitored": TokenNormMonitor,
}


@pytest.mark.parametrize(
    ("make", "ways"),
    [
        (vit, ["patched"]),
        (vit, ["patched by blocks", "monitored"]),
        (ours, ["captured"]),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                (vit, ["patched by blocks"]),
                (vit, ["patched", "captured"]),
                (vit, ["monitored", "patched by blocks"]),
                (ours, ["monitored"]),
            )
        ),
    ],
)
def test_blocks_that_are_compiled_one_by_one_share_their_graph(make, ways, dynamo):
    model, x, graphs = make(depth=12), images(), []

    def backend(graph: torch.fx.GraphModule, _: list) -> object:
        graphs.append(graph)
        return graph.forward

    with ExitStack() as stack, torch.no_grad():
        for way in ways:
            stack.enter_context(WAYS[way](model))
        expected = model(x)
        for block in model.blocks:
            block.compile(fullgraph=True, backend=backend)
        torch.testing.assert_close(model(x), expected)
    assert len(graphs) <= 2  # the first block is called with what the embedding gives


def test_a_replica_computes_with_its_own_weights():
    """As ``DataParallel`` makes them: a copy of ``__dict__`` whose weights are then replaced."""
    model, x = vit(), torch.randn(2, 21, 64)
    patch(model)
    attn = model.blocks[0].attn
    replica = attn._replicate_for_data_parallel()
    assert type(replica) is Attention
    with torch.no_grad():
        for name, part in attn.named_children():
            twin = copy.deepcopy(part)
            for parameter in twin.parameters():
                parameter.zero_()
            replica._modules[name] = twin
    assert not replica(x).any()
    assert attn(x).any()
    assert fused_method(replica).op is fused_method(attn).op
    unpatch(model)
    assert "_replicate_for_data_parallel" not in vars(attn)


def test_a_shallow_copy_whose_original_is_gone_says_so():
    module = Attention(64, 2)
    patch(module)
    shallow = copy.copy(module)
    del module
    with pytest.raises(RuntimeError, match="shallow copy of a module that was patched"):
        shallow(torch.randn(1, 5, 64))


def test_the_signature_is_the_classs():
    module = Attention(64, 2)
    own = inspect.signature(module.forward)
    with patched(module):
        assert inspect.signature(module.forward) == own


@pytest.mark.parametrize("order", [*itertools.permutations(("patch", "monitor", "unpatch", "remove"))])
def test_in_any_order_with_a_monitor_it_can_be_patched_again(order):
    model, x, monitors = vit(), images(), []
    expected = model(x)
    steps = {
        "patch": lambda: patch(model, level="block"),
        "unpatch": lambda: unpatch(model),
        "monitor": lambda: monitors.append(TokenNormMonitor(model)),
        "remove": lambda: [monitor.remove() for monitor in monitors],
    }
    for step in order:
        steps[step]()
    unpatch(model), steps["remove"]()
    assert same_bits(model(x), expected)
    assert not patch(model, level="block").left
    unpatch(model)
    assert same_bits(copy.deepcopy(model)(x), expected)


def test_a_wrapper_put_on_after_patching_is_not_lost_by_patching_again():
    module, x, calls = Attention(64, 2), torch.randn(1, 5, 64), []
    patch(module)
    inner = module.forward
    module.forward = lambda *args, **options: calls.append(1) or inner(*args, **options)
    (left,) = patch(module).left
    assert left.reason == "its forward was replaced on the instance by another"
    module(x)
    assert calls == [1]


def test_patched_within_patched_puts_the_first_back():
    model = vit()
    patch(model, backend="reference")
    with patched(model, level="block", backend="sdpa"):
        assert fused_method(model.blocks[0].attn).op.backend == "sdpa"
        assert fused_method(model.blocks[0])
    assert fused_method(model.blocks[0].attn).op.backend == "reference"
    assert fused_method(model.blocks[0]) is None


def test_a_part_patched_again_keeps_what_was_known_of_its_prefix():
    model, x = vit(), images()
    patch(model)
    patch(model.blocks[2], backend="reference")
    with capture(model, "prefix_attention", layers=["blocks.2.attn"]) as maps:
        model(x)
    assert maps["blocks.2.attn"].shape == (2, 2, 5, 21)


def test_patching_again_within_a_capture_goes_on_capturing():
    model, x = vit(), images()
    patch(model)
    with capture(model, "lse", layers=[0]) as statistics:
        patch(model, backend="reference")
        model(x)
        assert len(statistics) == 1


def test_a_call_that_gives_no_statistic_leaves_no_old_one():
    module, x = Attention(64, 2), torch.randn(1, 5, 64)
    patch(module)
    with capture(module, "lse") as statistics:
        module(x)
        assert len(statistics) == 1
        module(x, is_causal=True)
        assert not statistics


def test_threads_that_run_while_another_captures():
    model, x, failures, stop = vit(depth=1), images(), [], threading.Event()
    patch(model)

    def run() -> None:
        while not stop.is_set():
            try:
                with torch.no_grad():
                    model(x)
            except Exception as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        with capture(model, "lse") as statistics, torch.no_grad():
            model(x)
            failures += [value for value in dict(statistics).values() if value is None]
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


class Doubling(Attention):
    """Of the very name of its parent, in another package."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        return 2 * super().forward(x, attn_mask, is_causal)


Doubling.__name__ = "Attention"


def test_another_packages_class_of_the_same_name_is_left_alone():
    (left,) = patch(Doubling(64, 2)).left
    assert left.reason == "Attention has a forward of its own"


@pytest.mark.parametrize("change", ["module", "identity", "scale", "forward"])
def test_what_the_unfused_class_asks_is_asked(change):
    class Recorder(nn.Dropout):
        def forward(self, probabilities: Tensor) -> Tensor:
            return probabilities * 0.5

    module, x = Attention(64, 2).train(), torch.randn(1, 5, 64)
    module.fused_attn = False
    if change == "scale":
        module.scale = 1.0
    elif change == "forward":
        module.attn_drop.forward = lambda probabilities: probabilities * 0.5
    else:
        module.attn_drop = Recorder() if change == "module" else nn.Identity()
    expected = module(x)
    with patched(module):
        torch.testing.assert_close(module(x), expected)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda model: unpatch(3), TypeError, "torch.nn.Module, not int"),
        (lambda model: capture(3, "lse").__enter__(), TypeError, "torch.nn.Module, not int"),
        (lambda model: capture(model, "lse", layers=-1).__enter__(), TypeError, "a sequence of names and numbers"),
        (lambda model: capture(model, "lse", layers="blocks.0.attn").__enter__(), TypeError, "a sequence of names"),
        (lambda model: capture(model, "lse", layers=["attn"]).__enter__(), KeyError, "no attention layer 'attn'"),
        (lambda model: patch(model, level=["block"]), ValueError, "level must be one of 'attention', 'block'"),
    ],
)
def test_bad_arguments(call, error, words):
    model = vit(depth=1)
    patch(model)
    with pytest.raises(error, match=words):
        call(model)
