"""Probabilities of the backward are found again from the log-sum-exp; its rounding, and the output's, must not show."""

from __future__ import annotations

import pytest
import torch

from vitreg_kernels._native import library
from vitreg_kernels.functional import register_attention

pytestmark = pytest.mark.skipif(bool(library.faults()), reason="; ".join(library.faults()))


def gradients(query, key, value, upstream, **options):
    leaves = [x.detach().clone().requires_grad_() for x in (query, key, value)]
    output = register_attention(*leaves, backend="cpu", **options)
    return torch.autograd.grad(output, leaves, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tokens", [1, 300])
def test_a_single_key_keeps_its_probability(dtype, tokens):
    """By the softmax it is 1 whatever the logits, so they have no gradient, and the value has all of the output's."""
    query, key, value, upstream = torch.randn(4, 8, 4, tokens, 64).to(dtype)
    kept = torch.zeros(8, 1, 1, tokens, dtype=torch.bool)
    kept[..., tokens // 2] = True
    of_query, of_key, of_value = gradients(query, key, value, upstream, attn_mask=kept, scale=1.0)
    assert not of_query.any()
    assert not of_key.any()
    expected = upstream.double().sum(2)
    accumulated = tokens**0.5 * torch.finfo(torch.float32).eps * expected.abs().max().item()
    actual = of_value[:, :, tokens // 2].double()
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=accumulated)


@pytest.mark.parametrize(
    ("dtype", "size", "rounding"), [(torch.float32, 64.0, 2e-6), (torch.bfloat16, 1024.0, 2**-7)], ids=["fp32", "bf16"]
)
@pytest.mark.parametrize("tokens", [2, 5, 54, 64, 65, 261])
def test_probabilities_sum_up_to_one_under_large_logits(tokens, dtype, size, rounding):
    """Rounding a large log-sum-exp would be an error of all probabilities of its query alike, which adds up."""
    query, key, value, upstream = torch.randn(4, 4, 2, tokens, 16).to(dtype)
    query[..., 0] = key[..., 0] = size
    _, _, of_value = gradients(query, key, value, upstream, scale=1.0)
    sums = of_value.double().sum(2), upstream.double().sum(2)
    torch.testing.assert_close(*sums, rtol=0, atol=tokens**0.5 * rounding)


@pytest.mark.parametrize("tokens", [2, 5, 54, 64])
def test_what_all_keys_share_has_no_gradient(tokens):
    """It shifts all logits of a query alike, so dS sums up to 0, however coarsely a large log-sum-exp is rounded.

    With more than 64 keys delta is that of the output, which knows the probabilities as the forward rounded them.
    """
    query, key, value, upstream = torch.randn(4, 4, 2, tokens, 16)
    query[..., 0] = key[..., 0] = 64.0
    of_query, _, _ = gradients(query, key, value, upstream, scale=1.0)
    shared = of_query[..., 0] / 64.0
    torch.testing.assert_close(shared, torch.zeros_like(shared), rtol=0, atol=2e-5)
