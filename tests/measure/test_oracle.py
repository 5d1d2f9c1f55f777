"""The oracle sees every tensor of every op, and lets pass what the reference gives."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from vitreg_kernels import Rope
from vitreg_kernels.measure.cases import CASES, assemble, attention, residual_norm, token_norms
from vitreg_kernels.measure.oracle import Oracle
from vitreg_kernels.measure.poison import guarded
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES
from vitreg_kernels.ops.catalogue import OPS

CPU = torch.device("cpu")
TINY = (2, 9, 48)


def one_of(kinds, ending):
    return next(call for call in kinds(TINY, torch.float32, CPU) if call.name.endswith(ending))


# A call of each op that gives every tensor it can give.
FULLEST = {
    "attention": lambda: attention.call(torch.randn(2, 21, 3, 2, 16), num_prefix_tokens=5, outputs=OUTPUT_NAMES),
    "residual_norm": lambda: residual_norm.full(TINY, torch.float32, CPU),
    "token_norms": lambda: token_norms.contiguous(TINY, torch.float32, CPU),
    "statistics": lambda: one_of(token_norms.kinds, "statistics"),
    "assemble": lambda: one_of(assemble.kinds, "positions of all tokens"),
}
TENSORS = {
    "attention": {"output", *attention.GRADIENTS, *OUTPUT_NAMES},
    "residual_norm": {
        *("residual", "normalized", "token_norms"),
        *("grad_x", "grad_branch", "grad_layer_scale", "grad_weight", "grad_bias"),
    },
    "token_norms": {"token_norms"},
    "statistics": {
        f"{group} {name}"
        for group in ("cls", "registers", "patches")
        for name in ("histogram", "sums", "extremes", "nonfinite")
    },
    "assemble": {"tokens", "grad_patches", "grad_cls_token", "grad_register_tokens", "grad_pos_embed"},
}


@pytest.mark.parametrize("kind", FULLEST)
def test_every_tensor_is_seen(kind):
    """Each tensor 2% off fails alone, and all at once pass untouched."""
    oracle = Oracle(FULLEST[kind]())
    assert oracle.exact.keys() == oracle.eager.keys() == TENSORS[kind]
    assert all(accuracy.passed for accuracy in oracle.compare(oracle.eager).values())
    for name, right in oracle.eager.items():
        results = oracle.eager | {name: right * 1.02 + (right == 0)}
        assert [n for n, accuracy in oracle.compare(results).items() if not accuracy.passed] == [name]


@pytest.mark.parametrize("kind", FULLEST)
def test_a_tensor_that_is_left_out_is_an_error(kind):
    call = FULLEST[kind]()
    oracle = Oracle(call)
    oracle.exact = oracle.exact | {"another": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"reference gave \[.*\] where \['another', .*\] were asked for"):
        oracle.run("reference")


def test_the_exact_answer_is_in_double_whatever_the_call_holds():
    """The numbers of a half-precision call, not others that are rounded to them; masks and indices stay."""
    qkv = torch.randn(1, 30, 3, 2, 16).half()
    angle = torch.rand(20, 16)
    call = attention.call(
        qkv,
        num_prefix_tokens=5,
        rope=Rope(angle.cos(), angle.sin()),
        cu_seqlens=torch.tensor([0, 15, 30], dtype=torch.int32),
    )
    oracle = Oracle(call)
    assert {x.dtype for x in oracle.exact.values()} == {torch.float64}
    assert {x.dtype for x in oracle.eager.values()} == {torch.float16}
    double = call.changed(torch.Tensor.double).arguments
    assert torch.equal(double["qkv"], qkv.double())
    assert torch.equal(double["grad_output"], call.arguments["grad_output"].double())
    assert double["rope"].cos.dtype == torch.float64
    assert double["cu_seqlens"] is call.arguments["cu_seqlens"]


def test_gradients_of_attention_scale_together():
    """With one token those of query and key vanish but for rounding, which is that of the gradient of the value."""
    oracle = Oracle(attention.call(torch.randn(2, 1, 3, 2, 16)))
    assert oracle.exact["grad_query"].abs().max() < 1e-12
    off = oracle.exact["grad_query"].float() + 1e-7
    assert oracle.compare({"grad_query": off})["grad_query"].passed


@pytest.mark.parametrize("kind", FULLEST)
def test_a_call_between_guards_is_the_same_call(kind):
    call = FULLEST[kind]()
    plain, between = call.run("reference"), call.changed(guarded).run("reference")
    assert plain.keys() == between.keys()
    assert all(torch.equal(plain[name], between[name]) for name in plain)


def test_without_gradients():
    oracle = Oracle(attention.call(torch.randn(1, 9, 3, 1, 8), backward=False, outputs=("lse",)))
    assert oracle.exact.keys() == {"output", "lse"}


def test_what_a_call_needs_of_a_backend():
    keep = torch.rand(2, 1, 9, 9) > 0.5
    call = attention.call(torch.randn(2, 9, 3, 1, 16).bfloat16(), attn_mask=keep)
    assert call.request.op == "attention"
    assert (call.request.dtype, call.request.head_dim) == (torch.bfloat16, 16)
    assert call.reasons_against("reference") == []
    assert "does not support boolean masks over query and key" in call.reasons_against("xformers")
    with pytest.raises(ValueError, match="unknown backend 'composite'"):
        call.reasons_against("composite")


def test_every_op_has_cases():
    assert CASES.keys() == OPS.keys()


@pytest.mark.parametrize("op", [op for op in CASES if op != "attention"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cases_have_names_of_their_own_and_are_of_the_dtype(op, dtype):
    with FakeTensorMode():
        calls = list(CASES[op](dtype, CPU))
    assert len({call.name for call in calls}) == len(calls)
    assert {call.request.op for call in calls} == {op}
    assert dtype in {call.request.dtype for call in calls}


def test_norms_that_are_no_numbers_are_among_the_cases():
    norms = one_of(token_norms.kinds, "statistics").arguments["norms"]
    assert math.isnan(norms[0, 0])
    assert math.isinf(norms[0, 1])
    assert norms[0, 2] == 0
