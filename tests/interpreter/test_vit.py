"""A whole RegisterViT on the Triton kernels: what one op writes, the next must take as it lies."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vit_cases import TINY, assert_accurate, gradients_of, leaves_of, vit, vit_formula


@pytest.mark.parametrize("position", ["absolute", "rope"])
def test_every_op_by_its_kernels(position):
    config = replace(TINY, depth=2, dim=64, num_heads=2, position=position, position_rows="cls")
    model, pixels = vit(config, backend="triton"), torch.randn(2, 3, 16, 12)
    output = model.forward_features(pixels)
    upstream = torch.randn_like(output)

    def formula(dtype):
        leaves = leaves_of(model, dtype)
        return gradients_of(vit_formula(leaves, pixels.to(dtype), config), leaves, upstream)

    actual = gradients_of(output, dict(model.named_parameters()), upstream)
    assert_accurate(actual, formula(torch.float64), formula(torch.float32), terms=4 * config.dim)
