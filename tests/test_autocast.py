"""Under autocast a call is the same call on inputs cast by hand; its statistics stay fp32."""

from __future__ import annotations

import pytest
import torch
from cases import PLAIN_BACKENDS, Spec, make_options, make_qkv, needs, views

from vitreg_kernels.check import Yardstick
from vitreg_kernels.functional import register_attention, register_attention_qkv

every_backend = pytest.mark.parametrize("backend", PLAIN_BACKENDS)
every_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def cast(options, dtype):
    mask = options.get("attn_mask")
    return options | {"attn_mask": mask.to(dtype)} if mask is not None and mask.is_floating_point() else options


@every_backend
@every_dtype
@pytest.mark.parametrize(
    "spec",
    [Spec(), Spec(rope="halves"), Spec(mask="additive"), Spec(mask="key_padding"), Spec(batch=1, lengths=(9, 12))],
    ids=str,
)
def test_equals_inputs_cast_by_hand(backend, dtype, spec):
    needs(backend, spec)
    qkv, options = make_qkv(spec), make_options(spec)
    by_hand, expected = register_attention(*views(qkv.to(dtype)), **cast(options, dtype), backend=backend)
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
    yardstick = Yardstick(qkv.to(dtype), backward=False, **options)
    with torch.autocast("cpu", dtype):
        output, statistics = register_attention(*views(qkv), **options, backend=backend)
    errors = yardstick.compare({"output": output, **statistics._asdict()})
    assert not [f"{name}: {accuracy}" for name, accuracy in errors.items() if not accuracy.passed]


@every_backend
def test_gradients_come_back_in_the_inputs_dtype(backend):
    qkv = make_qkv(Spec()).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        output = register_attention_qkv(qkv, backend=backend)
    output.sum().backward()
    assert qkv.grad.dtype == torch.float32
    assert qkv.grad.abs().sum() > 0


@every_backend
def test_double_is_left_alone(backend):
    spec = Spec(dtype=torch.float64)
    needs(backend, spec)
    with torch.autocast("cpu", torch.bfloat16):
        assert register_attention_qkv(make_qkv(spec), backend=backend).dtype == torch.float64


@every_backend
def test_half_is_cast_to_the_autocast_dtype(backend):
    """As torch casts the operands of a matrix product."""
    with torch.autocast("cpu", torch.bfloat16):
        assert register_attention_qkv(make_qkv(Spec(dtype=torch.float16)), backend=backend).dtype == torch.bfloat16
