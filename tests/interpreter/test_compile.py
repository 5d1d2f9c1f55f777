"""Packed images under torch.compile; for all else see the contract."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vitreg_kernels import functional


@pytest.fixture(autouse=True)
def _strict_compiler() -> Iterator[None]:
    torch.compiler.reset()
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        yield


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
