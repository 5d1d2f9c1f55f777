"""assemble_tokens in the place of timm's ``VisionTransformer._pos_embed``: the same tokens and gradients."""

from __future__ import annotations

import pytest
import torch

from vitreg_kernels.functional import assemble_tokens

timm = pytest.importorskip("timm")
from timm.models.vision_transformer import VisionTransformer  # noqa: E402  (importable only where timm is)


@pytest.mark.parametrize("options", [
    {"reg_tokens": 4, "no_embed_class": True},
    {"reg_tokens": 4, "no_embed_class": False},
    {"reg_tokens": 0, "no_embed_class": True},
    {"reg_tokens": 0, "no_embed_class": False},
    {"reg_tokens": 4, "class_token": False, "global_pool": "avg"},
    {"reg_tokens": 4, "pos_embed": "none"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("autocast", [False, True])
def test_timms_tokens(options, autocast):
    model = VisionTransformer(img_size=56, patch_size=14, embed_dim=48, depth=1, num_heads=1, num_classes=0, **options)
    given = {"cls_token": model.cls_token, "register_tokens": model.reg_token, "pos_embed": model.pos_embed}
    parameters = {name: parameter for name, parameter in given.items() if parameter is not None}
    for parameter in parameters.values():
        torch.nn.init.normal_(parameter)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        patches = model.patch_embed(torch.randn(2, 3, 56, 56))
        assert patches.stride(1) == 1  # a convolution's, transposed
        tokens, expected = assemble_tokens(patches, **parameters), model._pos_embed(patches)
    assert torch.equal(tokens, expected)
    assert tokens.dtype == expected.dtype == torch.float32
    upstream = torch.randn_like(tokens)
    leaves = [patches, *parameters.values()]
    actual, exact = (torch.autograd.grad(x, leaves, upstream) for x in (tokens, expected))
    torch.testing.assert_close(actual, exact)
