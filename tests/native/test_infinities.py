"""Attention of logits that are no numbers: infinities and NaN stand where they do in the reference."""

from __future__ import annotations

import pytest
import torch
from cases import Spec, make_qkv

from vitreg_kernels import Rope
from vitreg_kernels._native import library
from vitreg_kernels.functional import register_attention
from vitreg_kernels.measure.accuracy import compare
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

pytestmark = pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults()))

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)


def kinds(x):
    """0 for a number, 1 for inf, 2 for -inf, 3 for NaN."""
    return x.isposinf() + 2 * x.isneginf() + 3 * x.isnan()


@every_dtype
@pytest.mark.parametrize("tokens", [33, 700])
@pytest.mark.parametrize("outputs", [("lse", "max_logit"), OUTPUT_NAMES], ids=["of logits", "all"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        ({1: torch.inf}, {}),
        ({1: -torch.inf}, {}),
        ({1: torch.nan}, {}),
        ({}, {300: torch.inf}),
        ({}, {300: -torch.inf}),
        ({}, {300: torch.inf, 690: torch.nan}),
        ({}, {300: torch.nan, 690: torch.inf}),
        ({}, dict.fromkeys(range(690, 700), torch.nan)),
    ],
    ids=str,
)
def test_forward(dtype, tokens, outputs, queries, keys):
    """The log-sum-exp beside an infinite logit is inf, the output NaN; a row of -inf is one of zeros."""
    query, key, value = make_qkv(Spec(batch=1, tokens=tokens, head_dim=32, dtype=dtype)).abs().permute(2, 0, 3, 1, 4)
    for x, marked in ((query, queries), (key, keys)):
        for token, number in marked.items():
            x[..., token % tokens, 3] = number
    # The reference in fp64: torch's own products of bf16 let a row's NaN into its neighbour's on some CPUs (AMX).
    (output, statistics), (expected, of_reference) = (
        register_attention(
            *(x.to(precision) for x in (query, key, value)), num_prefix_tokens=3, outputs=outputs, backend=backend
        )
        for backend, precision in (("cpu", dtype), ("reference", torch.float64))
    )
    assert torch.equal(kinds(output), kinds(expected))
    for name in outputs:
        assert torch.equal(kinds(getattr(statistics, name)), kinds(getattr(of_reference, name))), name


@every_dtype
@pytest.mark.parametrize("tokens", [33, 700])
def test_gradients_of_the_values(dtype, tokens):
    """NaN if a row of the output is; a row of zeros adds nothing to them, and leaves the other rows' alone."""
    query, key, value = make_qkv(Spec(batch=1, tokens=tokens, head_dim=32, dtype=dtype)).abs().permute(2, 0, 3, 1, 4)
    value.requires_grad_()
    for number, kind in ((torch.inf, 3), (-torch.inf, 0)):
        query[..., 1, 3] = number
        output = register_attention(query, key, value, backend="cpu")
        (gradient,) = torch.autograd.grad(output, value, torch.ones_like(output))
        assert (kinds(gradient) == kind).all()


@every_dtype
@pytest.mark.parametrize("tokens", [33, 700])
def test_a_query_that_looks_nowhere_gives_nothing(dtype, tokens):
    """All its logits are -inf: the values have no part of its output's gradient, however large that is."""
    query, key, value = make_qkv(Spec(batch=1, tokens=tokens, head_dim=32, dtype=dtype)).abs().permute(2, 0, 3, 1, 4)
    query[..., 1, 3] = -torch.inf
    value.requires_grad_()
    output = register_attention(query, key, value, backend="cpu")
    upstream = torch.randn(query.shape).to(dtype)

    def gradient(of_it):
        upstream[..., 1, :] = of_it
        return torch.autograd.grad(output, value, upstream, retain_graph=True)

    torch.testing.assert_close(gradient(1000.0), gradient(0.0), rtol=torch.finfo(dtype).eps, atol=1e-6)


@every_dtype
@pytest.mark.parametrize("tokens", [33, 34, 701])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_of_keys_and_values_beside_one_at_minus_infinity(dtype, tokens, count):
    """No query looks at such a key: it has no gradient, and the others' are as without it."""
    query, key, value = make_qkv(Spec(batch=1, tokens=tokens, dtype=dtype)).abs().permute(2, 0, 3, 1, 4)
    looked_at = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    looked_at[..., tokens - 1 - count : tokens - 1] = False
    upstream = torch.randn(query.shape).to(dtype)

    def gradients(key, attn_mask=None):
        inputs = key.requires_grad_(), value.detach().requires_grad_()
        output = register_attention(query, *inputs, attn_mask=attn_mask, backend="cpu")
        return torch.autograd.grad(output, inputs, upstream)

    expected = gradients(key.detach().clone(), looked_at)
    key = key.detach().clone()
    key[..., ~looked_at[0, 0, 0], 3] = -torch.inf
    for actual, wanted in zip(gradients(key), expected, strict=True):
        rounding = torch.finfo(dtype).eps
        torch.testing.assert_close(actual, wanted, rtol=4 * rounding, atol=4 * rounding * wanted.abs().max().item())


@every_dtype
@pytest.mark.parametrize("tokens", [34, 701])
@pytest.mark.parametrize("count", [1, 2])
def test_gradients_beside_a_key_at_minus_infinity_are_accurate(dtype, tokens, count):
    """By the rule, as with more channels a masked call and one with an infinity may be multiplied in different ways."""
    query, key, value = make_qkv(Spec(batch=1, tokens=tokens, head_dim=32, dtype=dtype)).abs().permute(2, 0, 3, 1, 4)
    looked_at = torch.ones(1, 1, 1, tokens, dtype=torch.bool)
    looked_at[..., tokens - 1 - count : tokens - 1] = False
    upstream = torch.randn(query.shape).to(dtype)

    def gradients(backend, precision, key, attn_mask=None):
        inputs = [x.detach().to(precision).requires_grad_() for x in (key, value)]
        output = register_attention(query.to(precision), *inputs, attn_mask=attn_mask, backend=backend)
        return torch.autograd.grad(output, inputs, upstream.to(precision))

    exact = gradients("reference", torch.float64, key, looked_at)
    eager = gradients("reference", dtype, key, looked_at)
    key = key.clone()
    key[..., ~looked_at[0, 0, 0], 3] = -torch.inf
    for actual, expected, rounded in zip(gradients("cpu", dtype, key), exact, eager, strict=True):
        assert (actual[..., ~looked_at[0, 0, 0], :].abs() <= 2.0**-90).all()  # 0, or what exp2.h makes of -inf
        accuracy = compare(actual, expected, rounded, terms=tokens)
        assert accuracy.passed, accuracy


@every_dtype
@pytest.mark.parametrize("tokens", [33, 700])
def test_an_infinite_gradient_of_the_output(dtype, tokens):
    """All values have a share of it, each in the same channel."""
    query, key, value = make_qkv(Spec(batch=1, tokens=tokens, head_dim=32, dtype=dtype)).permute(2, 0, 3, 1, 4)
    value.requires_grad_()
    upstream = torch.randn(query.shape).to(dtype)
    upstream[..., 1, 3] = -torch.inf
    output = register_attention(query, key, value, scale=0.01, backend="cpu")
    (gradient,) = torch.autograd.grad(output, value, upstream)
    assert (kinds(gradient) == torch.tensor([0, 0, 0, 2, *[0] * 28])).all()


@pytest.mark.parametrize("tokens", [33, 200])
def test_a_key_that_its_rotation_takes_beyond_fp16(tokens):
    """It is at minus infinity then: no query looks at it, and it takes no other's gradient away."""
    query, key, value = make_qkv(Spec(batch=1, tokens=tokens, head_dim=64)).abs().half().permute(2, 0, 3, 1, 4)
    query[..., 35], key[..., 20, 3], key[..., 20, 35] = 0.0, -50000.0, 50000.0
    eighth = torch.full((tokens, 64), 0.5**0.5)
    leaves = [x.clone().requires_grad_() for x in (key, value)]
    output = register_attention(query, *leaves, rope=Rope(eighth, eighth), backend="cpu")
    of_key, of_value = torch.autograd.grad(output, leaves, torch.randn(query.shape).half())
    assert not of_key[..., 20, :].any()
    assert not of_value[..., 20, :].any()
    assert of_key.isfinite().all()
    assert of_value.isfinite().all()
