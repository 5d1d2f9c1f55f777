"""The specification of assemble_tokens: each library's order of cat and add, and gradients by finite differences.

timm's own code is asked in ``integrations/test_timm_assemble.py``; DINOv2 is no installable package.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from assemble_cases import KINDS, Spec, make_call

from vitreg_kernels.functional import assemble_tokens


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_it_is_the_formula(spec):
    call = make_call(spec._replace(dtype=torch.float64))
    arrays = {name: x.numpy() for name, x in call.items()}
    expected = np.zeros((2, spec.prefix + 9, 48))
    expected[:, : spec.cls_tokens] = arrays.get("cls_token", 0.0)
    expected[:, spec.cls_tokens : spec.prefix] = arrays.get("register_tokens", 0.0)
    expected[:, spec.prefix :] = arrays["patches"]
    if "pos_embed" in arrays:
        with_row = [*range(spec.prefix_rows), *range(spec.prefix, spec.prefix + 9)]
        expected[:, with_row] += arrays["pos_embed"]
    np.testing.assert_array_equal(assemble_tokens(**call, backend="reference"), expected)


@pytest.mark.parametrize("registers", [0, 4])
def test_it_is_dinov2s_order(registers):
    """CLS token and patches get their position, then the registers are put between them, without one
    (facebookresearch/dinov2, ``DinoVisionTransformer.prepare_tokens_with_masks``)."""
    call = make_call(Spec(registers=registers, position="cls"))
    embedded = torch.cat((call["cls_token"].expand(2, -1, -1), call["patches"]), dim=1) + call["pos_embed"]
    inserted = [call["register_tokens"].expand(2, -1, -1)] if registers else []
    expected = torch.cat((embedded[:, :1], *inserted, embedded[:, 1:]), dim=1)
    assert torch.equal(assemble_tokens(**call, backend="reference"), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_one_rounding(dtype):
    """Of the exact sum: 1 + 2^-12 is 1 in both dtypes, and the patch is not rounded before it meets its row."""
    patches = torch.ones(1, 1, 8, dtype=dtype)
    row = torch.full((1, 1, 8), 2.0**-12)
    assert torch.equal(assemble_tokens(patches, pos_embed=row, backend="reference"), 1 + row)
    assert torch.equal(assemble_tokens(patches, pos_embed=row.to(dtype), backend="reference"), patches)


@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_gradients(spec):
    call = make_call(spec._replace(patches=2, channels=3, dtype=torch.float64))
    leaves = [x.requires_grad_() for x in call.values()]

    def function(*tensors):
        return assemble_tokens(**dict(zip(call, tensors, strict=True)), backend="reference")

    torch.autograd.gradcheck(function, leaves)
