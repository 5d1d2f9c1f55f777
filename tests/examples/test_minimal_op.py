"""``examples/minimal_op`` under the contract of the library's own ops, and what the contract cannot know of it.

Its Triton kernels run in tests/interpreter/test_minimal_op.py.
"""

from __future__ import annotations

import pytest
import torch
from contract.test_contract import *  # noqa: F403
from minimal_op import backends, unit_tokens
from minimal_op.contract import UnitTokens

from vitreg_kernels import UnsupportedError

OPS = (UnitTokens(),)


@pytest.mark.parametrize("backend", ["composite", "reference"])
def test_tokens_have_length_one(backend):
    x = 30 * torch.randn(2, 9, 16)
    unit = unit_tokens(x, backend=backend)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(x, dim=-1))
    torch.testing.assert_close(unit @ unit.mT, torch.cosine_similarity(x[:, :, None], x[:, None], dim=-1))
    assert not unit_tokens(torch.zeros(1, 2, 3), backend=backend).any()


def test_gradients_of_the_reference_in_double():
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unit_tokens(x, backend="reference"), x)


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"x must be a \[batch, tokens, channels\] tensor, got \[3\] float32 on cpu"):
        unit_tokens(torch.zeros(3))
    with pytest.raises(TypeError, match=r"x must be fp32, fp16, bf16 or fp64, got .* int64"):
        unit_tokens(torch.zeros(1, 2, 3, dtype=torch.int64))
    with pytest.raises(UnsupportedError, match="backend 'triton' cannot serve this call: runs on cuda, not on cpu"):
        unit_tokens(torch.zeros(1, 2, 3), backend="triton")


@pytest.mark.parametrize("channels", [384, 1024])
def test_kernels_compile_for_a_gpu_that_is_not_there(channels):
    """For an H100, without spilled registers."""
    pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")
    from vitreg_kernels._triton.offline import compile_launch

    launches = backends.launches(torch.empty(2, 201, channels, dtype=torch.bfloat16, device="meta"))
    assert len(launches) == 2
    for launch in launches:
        assert compile_launch(launch, 90).spill_bytes == 0
