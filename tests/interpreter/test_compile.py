"""The Triton kernels under torch.compile: one graph, gradients, and lengths that do not recompile each time."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vitreg_kernels import functional

LENGTHS = (21, 37, 33, 50, 64, 22)


@pytest.fixture(autouse=True)
def _strict_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        yield


def separate(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    output, statistics = functional.register_attention(
        query, key, value, num_prefix_tokens=5, outputs=("prefix_attention", "max_logit"), backend="triton"
    )
    return output, statistics.prefix_attention, statistics.max_logit


def packed(qkv: torch.Tensor) -> tuple[torch.Tensor, ...]:
    output, statistics = functional.register_attention_qkv(
        qkv, num_prefix_tokens=5, outputs=("lse", "token_norms"), backend="triton"
    )
    return output, statistics.lse, statistics.token_norms


@pytest.mark.parametrize("call", [separate, packed])
def test_one_graph_for_all_lengths_with_gradients(call) -> None:
    compiled = torch.compile(call, fullgraph=True)
    for tokens in LENGTHS:
        qkv = torch.randn(2, tokens, 3, 2, 16, requires_grad=True)
        actual, expected = compiled(qkv), call(qkv)
        grad = torch.randn_like(expected[0])
        actual_grad, expected_grad = (torch.autograd.grad(result[0], qkv, grad)[0] for result in (actual, expected))
        for a, e in zip((*actual, actual_grad), (*expected, expected_grad), strict=True):
            torch.testing.assert_close(a, e)


def test_packed_images_compile() -> None:
    """`cu_seqlens` is read by the kernel, not by the host, so the graph needs no values."""

    def call(qkv: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
        return functional.register_attention_qkv(
            qkv, num_prefix_tokens=3, cu_seqlens=cu_seqlens, max_seqlen=20, backend="triton"
        )

    compiled = torch.compile(call, fullgraph=True)
    for bounds in ([0, 11, 30], [0, 20, 30]):
        qkv = torch.randn(1, 30, 3, 2, 16)
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
        torch.testing.assert_close(compiled(qkv, cu_seqlens), call(qkv, cu_seqlens))
