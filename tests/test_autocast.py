"""Under autocast: what tests/contract leaves out."""

from __future__ import annotations

import pytest
import torch
from cases import PLAIN_BACKENDS, Spec, make_options, make_qkv, needs, oracle, views

from vitreg_kernels.functional import register_attention, register_attention_qkv

every_backend = pytest.mark.parametrize("backend", PLAIN_BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


@every_backend
@every_dtype
def test_an_additive_mask_is_cast_too(backend, dtype):
    spec = Spec(mask="additive")
    needs(backend, spec)
    qkv, options = make_qkv(spec), make_options(spec)
    cast = options | {"attn_mask": options["attn_mask"].to(dtype)}
    by_hand, expected = register_attention(*views(qkv.to(dtype)), **cast, backend=backend)
    with torch.autocast("cpu", dtype):
        output, statistics = register_attention(*views(qkv), **options, backend=backend)
        packed, _ = register_attention_qkv(qkv, **options, backend=backend)
    assert output.dtype == packed.dtype == dtype
    assert torch.equal(output, by_hand)
    assert torch.equal(packed, by_hand.transpose(1, 2).flatten(2))
    for name, actual in statistics._asdict().items():
        assert actual.dtype == torch.float32, name
        assert torch.equal(actual, getattr(expected, name)), name


@every_backend
@every_dtype
def test_statistics_keep_the_rule(backend, dtype):
    """Nothing inside runs in the autocast dtype that is meant to run in fp32."""
    spec = Spec(batch=4, heads=4, tokens=69, rope="pairs")
    qkv, options = make_qkv(spec), make_options(spec)
    judge = oracle(qkv.to(dtype), backward=False, **options)
    with torch.autocast("cpu", dtype):
        output, statistics = register_attention(*views(qkv), **options, backend=backend)
    errors = judge.compare({"output": output, **statistics._asdict()})
    assert not [f"{name}: {accuracy}" for name, accuracy in errors.items() if not accuracy.passed]


@every_backend
def test_half_is_cast_to_the_autocast_dtype(backend):
    """As torch casts the operands of a matrix product."""
    with torch.autocast("cpu", torch.bfloat16):
        assert register_attention_qkv(make_qkv(Spec(dtype=torch.float16)), backend=backend).dtype == torch.bfloat16
