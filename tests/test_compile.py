"""torch.compile: whole graphs with gradients and statistics, and lengths that change without compiling anew."""

from __future__ import annotations

import shutil

import pytest
import torch
from cases import PLAIN_BACKENDS, Spec, make_mask, make_options, make_qkv, needs, views
from torch._dynamo.testing import CompileCounterWithBackend

from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

pytestmark = pytest.mark.usefixtures("dynamo")

every_backend = pytest.mark.parametrize("backend", PLAIN_BACKENDS)


def separate(qkv, **options):
    result = register_attention(*views(qkv), **options)
    return result if isinstance(result, tuple) else (result, None)


def packed(qkv, **options):
    result = register_attention_qkv(qkv, **options)
    return result if isinstance(result, tuple) else (result, None)


def assert_same(function, compiled, qkv, **options):
    """Output, statistics and gradient, compiled and not."""
    results = []
    for f in (function, compiled):
        leaf = qkv.detach().requires_grad_()
        output, statistics = f(leaf, **options)
        upstream = torch.linspace(-1, 1, output.numel(), dtype=output.dtype).view(output.shape)
        results.append((output, statistics, *torch.autograd.grad(output, leaf, upstream)))
    torch.testing.assert_close(results[1], results[0])


@every_backend
@pytest.mark.parametrize("function", [separate, packed])
@pytest.mark.parametrize(
    "spec",
    [
        Spec(outputs=()),
        Spec(),
        Spec(rope="halves", outputs=("prefix_attention",)),
        Spec(rope="pairs", rope_batch=True, outputs=()),
        Spec(mask="key_padding", seed=1),
        Spec(mask="additive", outputs=("received_attention", "token_norms")),
    ],
    ids=str,
)
def test_whole_graph(backend, function, spec):
    needs(backend, spec)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(function, compiled, make_qkv(spec), **make_options(spec), backend=backend)


@pytest.mark.parametrize("function", [separate, packed])
@pytest.mark.parametrize("outputs", [(), OUTPUT_NAMES], ids=["output alone", "all statistics"])
def test_lengths_change_under_a_recompile_limit(function, outputs):
    """One graph for the first length, one for all others, one more once the batch changes too."""
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter, fullgraph=True)
    options = {"num_prefix_tokens": 5, "outputs": outputs}
    with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
        for batch, tokens in ((2, 21), (2, 33), (2, 54), (3, 70), (4, 15)):
            assert_same(function, compiled, make_qkv(Spec(batch=batch, tokens=tokens)), **options)
    assert counter.frame_count == 3


def test_one_graph_for_all_lengths_that_are_marked():
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(packed, backend=counter, fullgraph=True)
    options = {"num_prefix_tokens": 5, "outputs": OUTPUT_NAMES}
    for tokens in (21, 33, 54):
        qkv = make_qkv(Spec(tokens=tokens))
        torch._dynamo.mark_dynamic(qkv, 1)
        keep = make_mask(Spec(tokens=tokens, mask="key_padding"))
        torch._dynamo.mark_dynamic(keep, 3)
        compiled(qkv, attn_mask=keep, **options)
    assert counter.frame_count == 1


def test_the_backend_is_chosen_while_tracing():
    """No name, so sdpa; and autocast inside the graph is seen."""

    def function(qkv):
        with torch.autocast("cpu", torch.bfloat16):
            return register_attention_qkv(qkv, num_prefix_tokens=5, outputs=("lse",))

    qkv = make_qkv(Spec())
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)(qkv)
    assert compiled[0].dtype == torch.bfloat16
    torch.testing.assert_close(compiled, function(qkv))


def test_packed_images_cannot_be_traced_here_and_say_so():
    compiled = torch.compile(packed, backend="aot_eager", fullgraph=True)
    spec = Spec(batch=1, lengths=(9, 12))
    with pytest.raises(Exception, match=r"cu_seqlens under torch\.compile"):
        compiled(make_qkv(spec), **make_options(spec), backend="sdpa")


@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="inductor needs a compiler")
def test_inductor():
    """The compiler people use."""
    spec = Spec(outputs=("lse",))
    assert_same(packed, torch.compile(packed, fullgraph=True), make_qkv(spec), **make_options(spec))
