"""The specification of residual_layer_norm: torch's own modules in fp64, and gradients by finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from residual_norm_cases import DIFFERENTIABLE, KINDS, PLAIN, Spec, make_call

from vitreg_kernels.functional import residual_layer_norm


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_it_is_the_formula(spec):
    call = make_call(spec._replace(dtype=torch.float64, eps=1e-3))
    arrays = {name: x.numpy() for name, x in call.items() if isinstance(x, torch.Tensor)}
    residual = arrays["x"]
    if spec.branch:
        drop_path = arrays.get("drop_path", np.ones(spec.batch))[:, None, None]
        residual = residual + drop_path * arrays.get("layer_scale", 1.0) * arrays["branch"]
    if spec.rms:
        normalized = residual / np.sqrt((residual**2).mean(-1, keepdims=True) + 1e-3)
    else:
        normalized = (residual - residual.mean(-1, keepdims=True)) / np.sqrt(residual.var(-1, keepdims=True) + 1e-3)
    result = residual_layer_norm(**call, backend="reference")
    expected = residual, normalized * arrays["weight"] + arrays.get("bias", 0.0), np.linalg.norm(residual, axis=-1)
    for name, actual, exact in zip(result._fields, result, expected, strict=True):
        np.testing.assert_allclose(actual, exact, rtol=1e-12, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("rms", [False, True])
def test_it_is_torchs_module(rms):
    module = (torch.nn.RMSNorm if rms else torch.nn.LayerNorm)(48, eps=1e-5)
    torch.nn.init.normal_(module.weight)
    x = torch.randn(2, 9, 48)
    bias = None if rms else module.bias
    result = residual_layer_norm(x, weight=module.weight, bias=bias, eps=1e-5, rms=rms, backend="reference")
    torch.testing.assert_close(result.normalized, module(x))


def test_eps_is_a_millionth():
    x, weight = torch.full((1, 1, 4), 1e-3, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    result = residual_layer_norm(x, weight=weight, rms=True)
    torch.testing.assert_close(result.normalized, torch.full_like(x, 0.5**0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_normalized_as_it_is_stored(dtype):
    """In fp32, from the rounded residual: with a weight of 1 the mean square of the result says so."""
    call = make_call(Spec(dtype=dtype, channels=384))
    result = residual_layer_norm(**call, backend="reference")
    again = residual_layer_norm(result.residual, weight=call["weight"], bias=call["bias"], backend="reference")
    assert torch.equal(again.normalized, result.normalized)
    assert torch.equal(again.token_norms, result.token_norms)
    assert result.token_norms.dtype == torch.float32


@pytest.mark.parametrize("spec", [*KINDS, Spec(batch=1, channels=2), PLAIN._replace(channels=3, rms=True)], ids=str)
def test_gradients(spec):
    bias = spec.bias and not spec.rms
    spec = spec._replace(batch=2, tokens=2, channels=min(spec.channels, 5), dtype=torch.float64, bias=bias)
    call = make_call(spec)
    names = [name for name in DIFFERENTIABLE if name in call]
    leaves = [call[name].requires_grad_() for name in names]

    def function(*tensors):
        result = residual_layer_norm(**{**call, **dict(zip(names, tensors, strict=True))}, backend="reference")
        return result.normalized, result.residual + 0.0  # without a branch it is x, of which gradcheck wants a function

    torch.autograd.gradcheck(function, leaves)
