"""Native results are the same to the last bit whatever the number of threads."""

from __future__ import annotations

import assemble_cases
import pytest
import token_norms_cases
import torch
from cases import Spec, make_options, make_qkv, oracle
from residual_norm_cases import Spec as NormSpec
from residual_norm_cases import make_call, make_upstream, run

from vitreg_kernels._native import library
from vitreg_kernels.functional import register_attention

pytestmark = pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults()))

THREADS = (1, 2, 3, 7)

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


@pytest.fixture
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def assert_the_same(compute):
    results = []
    for count in THREADS:
        torch.set_num_threads(count)
        results.append(compute())
    for result in results[1:]:
        assert result.keys() == results[0].keys()
        for name in result:
            assert torch.equal(result[name], results[0][name]), name


@pytest.mark.usefixtures("_threads")
@every_dtype
@pytest.mark.parametrize("tokens", [1, 200, 261])
def test_residual_norm(dtype, tokens):
    """261 tokens of three images are thirteen blocks of partial sums."""
    spec = NormSpec(batch=3, tokens=tokens, channels=200, dtype=dtype)
    call, upstream = make_call(spec), make_upstream(spec)
    assert_the_same(lambda: run("cpu", call, upstream))


@pytest.mark.usefixtures("_threads")
@every_dtype
def test_token_norms_and_their_counts(dtype):
    call = token_norms_cases.make_call(token_norms_cases.Spec(batch=3, tokens=261, channels=200, dtype=dtype))
    assert_the_same(lambda: token_norms_cases.run("cpu", call))


@pytest.mark.usefixtures("_threads")
@every_dtype
@pytest.mark.parametrize("layout", ["contiguous", "permuted"])
def test_assemble(dtype, layout):
    spec = assemble_cases.Spec(batch=5, patches=300, channels=200, position="cls", dtype=dtype, layout=layout)
    call, upstream = assemble_cases.make_call(spec), assemble_cases.make_upstream(spec)
    assert_the_same(lambda: assemble_cases.run("cpu", call, upstream))


@pytest.mark.usefixtures("_threads")
@every_dtype
@pytest.mark.parametrize(
    "spec",
    [
        Spec(batch=1, heads=1, tokens=261, head_dim=64),
        Spec(batch=2, heads=3, tokens=201, head_dim=40, rope="halves", mask="key_padding", seed=1),
        Spec(batch=1, heads=2, tokens=394, head_dim=32, lengths=(201, 9, 54, 130)),
    ],
    ids=str,
)
def test_attention(dtype, spec):
    spec = spec._replace(dtype=dtype)
    judge = oracle(make_qkv(spec), **make_options(spec))
    assert_the_same(lambda: judge.run("cpu"))


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("heads", [1, 5])
def test_attention_beside_a_key_at_minus_infinity(heads):
    """How a head is cut among threads does not decide how its numbers are multiplied."""
    query, key, value = make_qkv(Spec(batch=1, heads=heads, tokens=400, head_dim=64)).abs().permute(2, 0, 3, 1, 4)
    key[..., 390, 3] = -torch.inf
    upstream = torch.randn_like(query)

    def gradients():
        leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
        output = register_attention(*leaves, backend="cpu")
        return dict(zip(("query", "key", "value"), torch.autograd.grad(output, leaves, upstream), strict=True))

    of_queries = gradients()["query"]
    assert not of_queries[..., 3].isfinite().any()  # 0, or what exp2.h makes of -inf, times -inf
    assert_the_same(lambda: {name: gradient[..., 4:] for name, gradient in gradients().items()})
