"""torch.compile: what the contract leaves out, namely masks that only torch serves, marked lengths and packs."""

from __future__ import annotations

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
        Spec(mask="bool"),
        Spec(mask="additive", outputs=("received_attention", "token_norms")),
    ],
    ids=str,
)
def test_whole_graph_with_masks(backend, function, spec):
    needs(backend, spec)
    compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert_same(function, compiled, make_qkv(spec), **make_options(spec), backend=backend)


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
