"""The smallest calls there are: one token, tokens that are all prefix. An empty batch is in tests/contract."""

from __future__ import annotations

import pytest
import torch
from cases import PLAIN_BACKENDS, Spec, make_options, make_qkv, views

from vitreg_kernels.functional import register_attention
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

every_backend = pytest.mark.parametrize("backend", PLAIN_BACKENDS)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_one_token_is_its_own_value(backend, dtype):
    spec = Spec(tokens=1, prefix=1, dtype=dtype)
    qkv = make_qkv(spec).requires_grad_()
    query, key, value = views(qkv)
    output, statistics = register_attention(
        query, key, value, num_prefix_tokens=1, outputs=OUTPUT_NAMES, backend=backend
    )
    assert torch.equal(output, value)
    logits = (query.float() * key.float()).sum(-1) / 4
    torch.testing.assert_close(statistics.lse, logits.detach())
    torch.testing.assert_close(statistics.max_logit, logits[..., 0].detach())
    torch.testing.assert_close(statistics.prefix_attention, torch.ones(2, 2, 1, 1))
    torch.testing.assert_close(statistics.received_attention, torch.ones(2, 2, 1))
    upstream = torch.randn_like(output)
    grad_query, grad_key, grad_value = torch.autograd.grad(output, (query, key, value), upstream)
    # A kernel finds the probability again from the log-sum-exp, and so 1 up to rounding.
    torch.testing.assert_close(grad_value, upstream, **({} if backend == "cpu" else {"rtol": 0, "atol": 0}))
    for gradient in (grad_query, grad_key):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-5)


@every_backend
def test_all_tokens_are_prefix(backend):
    """Rope has no rows then, and turns nothing."""
    spec = Spec(prefix=21, rope="halves")
    qkv, options = make_qkv(spec), make_options(spec)
    turned = register_attention(*views(qkv), **options, backend=backend)
    del options["rope"]
    torch.testing.assert_close(turned, register_attention(*views(qkv), **options, backend=backend))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scale_of_zero_attends_to_all_alike(backend, dtype):
    qkv = make_qkv(Spec(tokens=17, dtype=dtype)).requires_grad_()
    query, key, value = views(qkv)
    output, statistics = register_attention(query, key, value, scale=0.0, outputs=("lse",), backend=backend)
    torch.testing.assert_close(output, value.mean(2, keepdim=True).expand_as(output), rtol=0.02, atol=1e-2)
    torch.testing.assert_close(statistics.lse, torch.full((2, 2, 17), 17.0).log())
    assert all(x.isfinite().all() for x in torch.autograd.grad(output, (query, key, value), torch.ones_like(output)))


@every_backend
@pytest.mark.parametrize("size", [1e4, 1e5])
def test_logits_beyond_all_reason_leave_one_key(backend, size):
    """Of 1e8 to 1e10, of which fp32 no longer tells neighbours apart: the largest takes all."""
    qkv = make_qkv(Spec(batch=1, tokens=33, head_dim=64))
    query, key, value = views(qkv)
    query, key, value = ((size * x if i < 2 else x).requires_grad_() for i, x in enumerate((query, key, value)))
    output = register_attention(query, key, value, scale=1.0, backend=backend)
    largest = (query.detach().double() @ key.detach().double().transpose(-1, -2)).argmax(-1)
    expected = value.detach().gather(2, largest[..., None].expand_as(value))
    torch.testing.assert_close(output.detach(), expected, rtol=1e-5, atol=1e-5)
    (grad_value,) = torch.autograd.grad(output, value, torch.ones_like(output))
    chosen = torch.zeros(1, 2, 33).scatter_add_(2, largest, torch.ones(1, 2, 33))
    torch.testing.assert_close(grad_value, chosen[..., None].expand_as(grad_value), rtol=1e-4, atol=1e-4)
