"""The meta device: every op and module gives there what it gives elsewhere, without the numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only
from vit_cases import TINY

from vitreg_kernels import RegisterAttention, RegisterViT, Rope, TokenLayout, UnsupportedError, explain, functional
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES
from vitreg_kernels.ops.catalogue import OPS

X = torch.zeros(2, 9, 8)
C = torch.zeros(8)
QKV = torch.zeros(2, 9, 3, 2, 8)
MASK = torch.ones(2, 1, 1, 9, dtype=torch.bool)
ROPE = Rope(torch.ones(6, 8), torch.zeros(6, 8))
ATTENTION = {"num_prefix_tokens": 3, "outputs": OUTPUT_NAMES}


def separate(qkv, **options):
    return functional.register_attention(*(x.transpose(1, 2) for x in qkv.unbind(2)), **options)


def statistics(x, **options):
    return functional.token_norm_stats(x, TokenLayout(num_registers=2), **options)


CALLS = {
    "packed": ("attention", functional.register_attention_qkv, (QKV,), ATTENTION),
    "separate": ("attention", separate, (QKV,), ATTENTION),
    "masked": ("attention", separate, (QKV,), {**ATTENTION, "attn_mask": MASK, "rope": ROPE, "dropout_p": 0.1}),
    "residual_norm": ("residual_norm", functional.residual_layer_norm, (X, X), {"weight": C, "bias": C}),
    "token_norms": ("token_norms", functional.token_norms, (X,), {}),
    "statistics": ("token_norms", statistics, (X,), {}),
    "assemble": ("assemble", functional.assemble_tokens, (X, X[:1, :1], X[:1, :4], X[:1, :9]), {}),
}


def described(device, function, tensors, options):
    """Shape, dtype and strides of all results and gradients."""
    tensors = [x.detach().to(device).requires_grad_() for x in tensors]
    options = tree_map_only(torch.Tensor, lambda x: x.to(device), options)
    results = [x for x in tree_leaves(function(*tensors, **options)) if isinstance(x, torch.Tensor)]
    derived = [x for x in results if x.requires_grad]
    if derived:
        results += torch.autograd.grad([x.sum() for x in derived], tensors)
    assert {x.device.type for x in results} == {device}
    return [(x.shape, x.dtype, x.stride()) for x in results]


@pytest.mark.parametrize("name", CALLS)
def test_every_backend_that_says_so_gives_shapes(name):
    op, function, tensors, options = CALLS[name]
    saying = [b.name for b in OPS[op].backends if "meta" in b.requirements.devices and b.name != "sdpa_math"]
    assert saying == ["sdpa" if op == "attention" else "composite", "reference"]
    for backend in (None, *saying):
        if (name, backend) == ("statistics", "reference"):
            with pytest.raises(UnsupportedError, match="the meta device cannot tell"):
                described("meta", function, tensors, {**options, "backend": backend})
        else:
            expected = described("cpu", function, tensors, {**options, "backend": backend or saying[0]})
            assert described("meta", function, tensors, {**options, "backend": backend}) == expected


def test_explain_says_which():
    query = QKV.to("meta")[:, :, 0].transpose(1, 2)
    explanation = explain(query)
    assert explanation.backend == "sdpa"
    assert explanation.reasons["cpu"] == ["runs on cpu, not on meta"]


@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_module(qk_norm):
    def attend(x, **options):
        return RegisterAttention(8, 2, qk_norm=qk_norm, device=x.device)(x, outputs=("lse", "token_norms"))

    assert described("meta", attend, (X,), {}) == described("cpu", attend, (X,), {})


@pytest.mark.parametrize("changes", [{}, {"position": "rope"}, {"qk_norm": True}], ids=str)
@pytest.mark.parametrize("size", [(16, 20), (24, 24)], ids=str)
def test_whole_model(changes, size):
    config = replace(TINY, **changes)

    def features(pixels, **options):
        return RegisterViT(config, device=pixels.device).forward_features(pixels)

    pixels = torch.zeros(2, 3, *size)
    assert described("meta", features, (pixels,), {}) == described("cpu", features, (pixels,), {})
