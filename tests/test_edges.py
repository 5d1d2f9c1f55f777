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
    torch.testing.assert_close(grad_value, upstream, **({} if backend == "native" else {"rtol": 0, "atol": 0}))
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
