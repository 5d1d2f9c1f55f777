"""The ops by name, and how a module resolves ``backend=`` for the ops it calls."""

from __future__ import annotations

import pytest

from vitreg_kernels import RegisterAttention, RegisterViT, ViTConfig
from vitreg_kernels.ops.catalogue import OPS, backend_by_op

ALL = tuple(OPS)


@pytest.mark.parametrize(
    ("backend", "ops", "expected"),
    [
        (None, ALL, dict.fromkeys(ALL)),
        ("reference", ALL, dict.fromkeys(ALL, "reference")),
        ("sdpa", ("attention", "assemble"), {"attention": "sdpa", "assemble": None}),
        ("composite", ("attention", "assemble"), {"attention": None, "assemble": "composite"}),
        ({"attention": "sdpa", "assemble": None}, ALL, {**dict.fromkeys(ALL), "attention": "sdpa"}),
        ({}, ("attention",), {"attention": None}),
    ],
)
def test_resolved(backend, ops, expected):
    assert backend_by_op(backend, ops) == expected


@pytest.mark.parametrize(
    ("backend", "ops", "told"),
    [
        ("flash", ALL, "unknown backend 'flash': expected None or one of 'triton', 'cpu', 'sdpa', 'sdpa_flash', 's"),
        ("sdpa", ("assemble",), "unknown backend 'sdpa': expected None or one of 'triton', 'cpu', 'composite', 'refer"),
        (
            {"attention": "composite"},
            ALL,
            "unknown backend 'composite': expected None or one of 'triton', 'cpu', 'sdpa'",
        ),
        ({"attention": "sdpa"}, ("assemble",), "no op 'attention' is called here: expected any of 'assemble'"),
        (
            {"attn": "sdpa"},
            ALL,
            "no op 'attn' is called here: expected any of 'attention', 'residual_norm', 'token_norms'",
        ),
    ],
)
def test_what_cannot_be_resolved_is_one_sentence(backend, ops, told):
    with pytest.raises(ValueError, match=told):
        backend_by_op(backend, ops)


def test_a_model_takes_a_mapping():
    config = ViTConfig(patch_size=14, image_size=28, dim=32, depth=2, num_heads=2)
    chosen = {"attention": "sdpa", "residual_norm": "composite", "assemble": "reference"}
    model = RegisterViT(config, backend=chosen, device="meta")
    assert [block.attn.backend for block in model.blocks] == ["sdpa", "sdpa"]
    norms = [*(norm for block in model.blocks for norm in (block.norm1, block.norm2)), model.norm]
    assert [norm.backend for norm in norms] == ["composite"] * 5
    assert model._assemble_backend == "reference"
    assert RegisterAttention(32, 2, backend={"attention": "sdpa"}).backend == "sdpa"
    with pytest.raises(ValueError, match="no op 'assemble' is called here"):
        RegisterAttention(32, 2, backend={"assemble": "reference"})


def test_what_is_neither_a_name_nor_a_mapping():
    with pytest.raises(TypeError, match="backend must be a name or a mapping by op, got a list"):
        backend_by_op(["cpu"], ALL)
