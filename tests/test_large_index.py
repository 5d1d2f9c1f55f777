"""Offsets and strides beyond 2**31 elements. The storage is never written, so next to no memory is really taken."""

from __future__ import annotations

import pytest
import torch
from cases import PLAIN_BACKENDS, make_cu_seqlens, views

from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

BATCH, HEADS, TOKENS, HEAD_DIM = 2, 2, 5, 16
ELEMENTS = 2**31 + 2**16

# torch may take another kernel for other strides; an element read from the wrong place is off by about 1.
NEAR = {"rtol": 0.0, "atol": 1e-2}

LAYOUTS = {
    # The second image, head, token or channel, and all of it, begin beyond 2**31 elements.
    "batch": ((2**31, 480, 160, 16, 1), 0),
    "token": ((240, 2**31 // 4, 80, 16, 1), 0),
    "head": ((240, 48, 16, 2**31, 1), 0),
    "channel": ((960, 192, 64, 32, 2**31 // 15), 0),
    "offset": ((480, 96, 32, 16, 1), 2**31 + 7),
}


@pytest.fixture(scope="module")
def storage():
    return torch.empty(ELEMENTS, dtype=torch.float16)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
def test_inputs_beyond_the_32_bit_range(storage, backend, layout):
    strides, offset = LAYOUTS[layout]
    shape = (BATCH, TOKENS, 3, HEADS, HEAD_DIM)
    far = storage.as_strided(shape, strides, offset)
    reach = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    assert 2**31 <= reach < ELEMENTS
    near = torch.randn(shape).to(torch.float16)
    far.copy_(near)
    assert torch.equal(far, near), "the layout overlaps itself"
    options = {"num_prefix_tokens": 2, "outputs": OUTPUT_NAMES, "backend": backend}
    expected = register_attention(*views(near), **options)
    torch.testing.assert_close(register_attention(*views(far), **options), expected, **NEAR)
    # Gradients have memory of their own; what matters is where the backward reads.
    gradients = []
    for x in (near, far):
        leaves = [v.detach().requires_grad_() for v in views(x)]
        output = register_attention(*leaves, num_prefix_tokens=2, backend=backend)
        gradients.append(torch.autograd.grad(output, leaves, torch.ones_like(output)))
    torch.testing.assert_close(gradients[1], gradients[0], **NEAR)


@pytest.mark.parametrize("backend", PLAIN_BACKENDS)
def test_packed_images_beyond_the_32_bit_range(storage, backend):
    far = storage.as_strided((1, 9, 3, 2, 16), (0, 2**31 // 8, 32, 16, 1), 0)
    near = torch.randn(far.shape).to(torch.float16)
    far.copy_(near)
    options = {"cu_seqlens": make_cu_seqlens((4, 5)), "num_prefix_tokens": 1, "backend": backend}
    torch.testing.assert_close(register_attention_qkv(far, **options), register_attention_qkv(near, **options), **NEAR)
