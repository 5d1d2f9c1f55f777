"""Numbers that are multiplied in parts: on AMX those of fp32 and fp16, from 192 tokens and head dim 32 on.

The contract's random calls are shorter. Every instruction set is held to what is here.
"""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Spec, assert_parity, make_qkv, views
from hypothesis import given, settings

from vitreg_kernels._native import library
from vitreg_kernels.functional import register_attention
from vitreg_kernels.ops.attention.backends import BACKENDS
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

pytestmark = pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults()))

TOKENS, HEAD_DIM = 192, 32
DTYPES = (torch.float32, torch.float16)
SERVED = next(backend.requirements for backend in BACKENDS if backend.name == "cpu")

both_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def longer(spec: Spec) -> Spec:
    lengths = (spec.lengths[0] + TOKENS, *spec.lengths[1:]) if spec.lengths else ()
    few = {"batch": min(spec.batch, 2), "heads": min(spec.heads, 2)}
    return spec._replace(tokens=spec.tokens + TOKENS, lengths=lengths, head_dim=spec.head_dim + HEAD_DIM - 8, **few)


@settings(max_examples=50)
@given(spec=cases.specs(SERVED._replace(dtypes=DTYPES), degenerate=False).map(longer))
def test_any_longer_call_is_accurate(spec):
    assert_parity(spec, "cpu", draws=2)


def run(query, key, value, upstream):
    """The output, all statistics and the gradients, heads second."""
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    output, statistics = register_attention(
        *leaves, num_prefix_tokens=5, outputs=OUTPUT_NAMES[:-1], backend="cpu", scale=0.125
    )
    return output.detach(), *statistics[: len(OUTPUT_NAMES) - 1], *torch.autograd.grad(output, leaves, upstream)


@both_dtypes
@pytest.mark.parametrize("number", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("which", ["query", "key", "value", "upstream"])
def test_a_head_that_is_not_finite_leaves_the_others_alone(dtype, number, which):
    """Not a bit of the others' results changes, whatever is computed otherwise for its sake."""
    query, key, value = views(make_qkv(Spec(heads=3, tokens=261, head_dim=64, dtype=dtype)))
    inputs = {"query": query, "key": key, "value": value, "upstream": torch.randn_like(query)}
    expected = run(**inputs)
    inputs[which] = inputs[which].clone()
    inputs[which][0, 1, 100, 7] = number
    actual = run(**inputs)
    assert not all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    for a, e in zip(actual, expected, strict=True):
        others = torch.ones(a.shape[:2], dtype=torch.bool)
        others[0, 1] = False
        assert torch.equal(a[others], e[others])


@both_dtypes
def test_a_query_that_is_not_finite_leaves_those_far_from_it_alone(dtype):
    """Queries are worked on by 96, and those after it find the keys packed as those before it did."""
    query, key, value = views(make_qkv(Spec(tokens=300, head_dim=64, dtype=dtype)))
    expected = register_attention(query, key, value, backend="cpu")
    query = query.clone()
    query[..., 100, 7] = torch.inf
    output = register_attention(query, key, value, backend="cpu")
    assert output[..., 100, :].isnan().all()
    assert torch.equal(output[..., :96, :], expected[..., :96, :])
    assert torch.equal(output[..., 192:, :], expected[..., 192:, :])


@pytest.mark.parametrize("exponent", [-60, 60])
def test_the_size_of_the_values_is_no_matter(exponent):
    """Parts of a number keep its exponent: a power of two changes no other bit."""
    query, key, value = views(make_qkv(Spec(tokens=261, head_dim=64)))
    upstream = torch.randn_like(query)
    size = 2.0**exponent
    output, *_, of_query, of_key, of_value = run(query, key, value, upstream)
    sized, *_, of_query_too, of_key_too, of_value_too = run(query, key, value * size, upstream)
    assert torch.equal(sized, output * size)
    assert torch.equal(of_query_too, of_query * size)
    assert torch.equal(of_key_too, of_key * size)
    assert torch.equal(of_value_too, of_value)
