"""The opaque ops with the Triton kernels behind them, beside what the contract holds them to."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from vitreg_kernels import Rope, functional
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

TOKENS, PREFIX = 21, 5


def unpacked(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


@pytest.mark.parametrize("outputs", ["", "lse"])
def test_forward_without_statistics(outputs: str) -> None:
    arguments = (*unpacked(torch.randn(2, TOKENS, 3, 2, 16)), None, None, None, False, None, 0, PREFIX, 0.25, outputs)
    opcheck(torch.ops.vitreg.attention_forward.default, (*arguments, "triton"))


def test_packed_gradient_is_one_contiguous_tensor() -> None:
    qkv = torch.randn(2, TOKENS, 3, 2, 16, requires_grad=True)
    output = functional.register_attention_qkv(qkv, backend="triton")
    (grad,) = torch.autograd.grad(output, qkv, torch.randn_like(output))
    assert grad.shape == qkv.shape
    assert grad.is_contiguous()


def test_rope_reaches_the_kernel_through_the_op() -> None:
    """The public function and the op agree on which argument is which."""
    query, key, value = unpacked(torch.randn(2, TOKENS, 3, 2, 16))
    angle = torch.rand(TOKENS - PREFIX, 16)
    results = [
        functional.register_attention(
            query,
            key,
            value,
            num_prefix_tokens=PREFIX,
            rope=Rope(angle.cos(), angle.sin(), interleaved),
            backend=backend,
        )
        for backend in ("triton", "reference")
        for interleaved in (False, True)
    ]
    torch.testing.assert_close(results[0], results[2], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(results[1], results[3], rtol=1e-4, atol=1e-5)
    assert (results[0] - results[1]).abs().max() > 1e-3


def test_an_output_that_nothing_needs_has_no_gradient() -> None:
    class Stop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx, grad: torch.Tensor) -> None:
            return None

    qkv = torch.randn(1, 8, 3, 1, 16, requires_grad=True)
    for output in (
        functional.register_attention_qkv(qkv, backend="triton"),
        functional.register_attention(*unpacked(qkv), backend="triton"),
    ):
        Stop.apply(output).sum().backward()
    assert qkv.grad is None or not qkv.grad.any()


def test_nan_shows_in_every_statistic() -> None:
    """A diverged query must not look like one that sees no key."""
    query, key, value = unpacked(torch.randn(1, TOKENS, 3, 1, 16))
    query[0, 0, 2, 3] = torch.nan
    output, statistics = functional.register_attention(
        query, key, value, num_prefix_tokens=PREFIX, outputs=OUTPUT_NAMES, backend="triton"
    )
    assert output[0, 0, 2].isnan().all()
    assert statistics.lse[0, 0, 2].isnan()
    assert statistics.max_logit[0, 0].isnan()
    assert statistics.token_norms[0, 2].isnan()
    assert statistics.prefix_attention[0, 0, 2].isnan().all()
    assert statistics.received_attention[0, 0].isnan().all()
    assert not statistics.lse[0, 0, 3:].isnan().any()


def test_bounds_of_packed_images_need_not_be_contiguous() -> None:
    """The kernels read them one after another, so a strided view has to be copied."""
    bounds = torch.tensor([[0, 7], [9, 10**6], [TOKENS, 10**6]], dtype=torch.int32)[:, 0]
    assert not bounds.is_contiguous()
    qkv = torch.randn(1, TOKENS, 3, 2, 16)
    results = [
        functional.register_attention_qkv(qkv, cu_seqlens=bounds, max_seqlen=12, backend=backend)
        for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
