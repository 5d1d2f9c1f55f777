"""Index arithmetic beyond 2^31 elements, in memory of which only the pages that hold a value are ever committed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vitreg_kernels.ops.attention.backends import triton
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES, AttentionInputs

HEAD_DIM = 16
BEYOND = 2**31 + 64


@pytest.fixture(scope="module")
def memory() -> Tensor:
    return torch.empty(2 * BEYOND, dtype=torch.float16)


def forward_and_backward(query: Tensor, key: Tensor, value: Tensor, grad_output: Tensor, *gradients: Tensor) -> tuple:
    inputs = AttentionInputs(query, key, value, scale=0.25, num_prefix_tokens=1, outputs=OUTPUT_NAMES)
    output, statistics = triton.forward(inputs)
    triton.backward(inputs, output, statistics.lse, grad_output, *gradients)
    return output, *gradients, *statistics


@pytest.mark.parametrize(
    ("shape", "strides"),
    [
        pytest.param((2, 1, 3), (BEYOND, HEAD_DIM, HEAD_DIM, 1), id="batch"),
        pytest.param((1, 3, 2), (0, 2**30, HEAD_DIM, 1), id="head"),
        pytest.param((1, 1, 3), (0, 0, 2**30, 1), id="token"),
        pytest.param((1, 1, 3), (0, 0, 1, 2**28), id="channel"),
    ],
)
def test_strides(memory: Tensor, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """The last index of one axis lies 2^31 elements away; a 32-bit product would land before the tensor.

    The same call on compact copies must give the same bits.
    """
    torch.manual_seed(0)
    # Query, key, value, the output's gradient and theirs side by side on every page that is touched.
    far = [memory.as_strided((*shape, HEAD_DIM), strides, 512 + 64 * slot) for slot in range(7)]
    for x in far[:4]:
        x.copy_(torch.randn(x.shape))
    for gradient in far[4:]:
        gradient.fill_(torch.nan)
    near = [x.clone(memory_format=torch.contiguous_format) for x in far]
    for result, compact in zip(forward_and_backward(*far), forward_and_backward(*near), strict=True):
        assert not compact.isnan().any()
        assert torch.equal(result, compact)
