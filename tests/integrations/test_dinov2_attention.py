"""RegisterAttention in DINOv2's place. DINOv2 is no installable package, so its attention is written out here as the
plain formula under its parameter names (facebookresearch/dinov2, ``dinov2/layers/attention.py``)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from vitreg_kernels import RegisterAttention
from vitreg_kernels.measure.accuracy import compare


class Dinov2Attention(nn.Module):
    def __init__(self, dim, num_heads=8, qkv_bias=False, proj_bias=True):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim, bias=proj_bias)

    def forward(self, x):
        batch, tokens, dim = x.shape
        query, key, value = (
            t.view(batch, tokens, self.num_heads, -1).transpose(1, 2) for t in self.qkv(x).split(dim, dim=-1)
        )
        logits = torch.einsum("bhqd,bhkd->bhqk", query, key) / query.shape[-1] ** 0.5
        attended = torch.einsum("bhqk,bhkd->bqhd", logits.softmax(-1), value)
        return self.proj(attended.flatten(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
def test_loads_dinov2_weights_and_gives_its_output(dtype, bias):
    torch.manual_seed(0)
    theirs = Dinov2Attention(384, 6, qkv_bias=bias, proj_bias=bias).to(dtype)
    with torch.no_grad():
        theirs.qkv.weight.normal_(std=1.5 * 384**-0.5)
    ours = RegisterAttention(384, 6, num_registers=4, qkv_bias=bias, proj_bias=bias, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 21, 384, dtype=dtype)
    with torch.no_grad():
        exact = copy.deepcopy(theirs).double()(x.double())
        accuracy = compare(ours(x), exact, theirs(x), terms=384)
    assert accuracy.passed, accuracy


def test_weights_of_another_model_are_refused():
    ours = RegisterAttention(96, 3)
    with pytest.raises(RuntimeError, match=r"qkv\.bias"):
        ours.load_state_dict(Dinov2Attention(96, 3, qkv_bias=False).state_dict(), strict=True)
