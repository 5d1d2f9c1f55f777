"""Packed images beyond 2**31 elements; for all other calls see tests/contract.

The storage is hardly written, so next to no memory is really taken.
"""

from __future__ import annotations

import pytest
import torch
from cases import PLAIN_BACKENDS, make_cu_seqlens

from vitreg_kernels.functional import register_attention_qkv

# torch may take another kernel for other strides; an element read from the wrong place is off by about 1.
NEAR = {"rtol": 0.0, "atol": 1e-2}


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
def test_packed_images_beyond_the_32_bit_range(backend):
    storage = torch.empty(2**31 + 2**16, dtype=torch.float16)
    far = storage.as_strided((1, 9, 3, 2, 16), (0, 2**31 // 8, 32, 16, 1), 0)
    near = torch.randn(far.shape).to(torch.float16)
    far.copy_(near)
    options = {"cu_seqlens": make_cu_seqlens((4, 5)), "num_prefix_tokens": 1, "backend": backend}
    torch.testing.assert_close(register_attention_qkv(far, **options), register_attention_qkv(near, **options), **NEAR)
