"""residual_layer_norm by every backend usable here, beside what tests/contract holds it to.

``TRITON_INTERPRET=1 pytest tests/test_residual_norm.py`` adds the Triton kernels.
"""

from __future__ import annotations

import math

import pytest
import torch
from residual_norm_cases import (
    DIFFERENTIABLE,
    KINDS,
    PLAIN,
    USABLE,
    Oracle,
    Spec,
    assert_parity,
    assert_passed,
    make_call,
    make_upstream,
    run,
)

from vitreg_kernels._native import library
from vitreg_kernels._triton.mode import INTERPRETING
from vitreg_kernels.functional import residual_layer_norm

F32, F64 = torch.float32, torch.float64

every_backend = pytest.mark.parametrize("backend", USABLE, ids=lambda backend: backend.name)
every_dtype = pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16], ids=str)
every_kind = pytest.mark.parametrize("spec", KINDS, ids=str)


def needs(backend, dtype):
    if dtype not in backend.requirements.dtypes:
        pytest.skip("not declared")


def test_there_is_something_to_test():
    native_ones = [] if library.faults() else ["cpu"]
    assert [b.name for b in USABLE] == [*(["triton"] if INTERPRETING else []), *native_ones, "composite", "reference"]


class TestParity:
    @every_backend
    @every_dtype
    @pytest.mark.parametrize("channels", [384, 768, 1024, 1280, 1536, 4096])
    def test_widths_of_vits(self, backend, dtype, channels):
        needs(backend, dtype)
        assert_parity(Spec(batch=2, tokens=11, channels=channels, dtype=dtype), backend.name)

    @every_backend
    @every_dtype
    @pytest.mark.parametrize("rms", [False, True])
    def test_massive_activations(self, backend, dtype, rms):
        """One token of norm 500 among tokens of norm 20, most of it in two channels as in trained ViTs."""
        needs(backend, dtype)
        spec = Spec(batch=8, tokens=33, channels=384, dtype=dtype, rms=rms, bias=not rms)
        call = make_call(spec._replace(dtype=F32))
        call["x"] *= 20 / call["x"].norm(dim=-1, keepdim=True)
        call["x"][:, 17, :2] = torch.tensor([450.0, -218.0])
        call = {name: x.to(dtype) if isinstance(x, torch.Tensor) else x for name, x in call.items()}
        oracle = Oracle(call, make_upstream(spec))
        results = run(backend.name, call, oracle.upstream)
        assert_passed(oracle.compare(results), backend.name)
        torch.testing.assert_close(results["token_norms"][:, 17], torch.full((8,), 500.0), rtol=0.01, atol=0.0)

    @every_backend
    @pytest.mark.parametrize(("mean", "spread"), [(10.0, 0.1), (30.0, 0.01), (-1000.0, 0.01)])
    def test_a_mean_far_beyond_the_spread(self, backend, mean, spread):
        """Where E[x^2] - E[x]^2 has lost the variance: at 1000 and 0.01 it is 2^-33 of the square.

        torch's own backward is a sum of multiples of x and grad_normalized, whose terms cancel: good to 100 spreads.
        """
        spec = PLAIN._replace(batch=4, tokens=33, channels=384, mean=mean, spread=spread)
        oracle = Oracle(make_call(spec), make_upstream(spec))
        errors = oracle.compare(run(backend.name, oracle.call, oracle.upstream))
        if backend.name == "composite" and abs(mean) > 100 * spread:
            del errors["grad_x"]
        assert_passed(errors, backend.name)


class TestResult:
    @every_backend
    @every_kind
    def test_without_a_branch_the_residual_is_x(self, backend, spec):
        x = (call := make_call(spec))["x"].requires_grad_()
        assert (residual_layer_norm(**call, backend=backend.name).residual is x) == (not spec.branch)

    @every_backend
    def test_a_dropped_sample_passes_unchanged(self, backend):
        call = make_call(Spec(batch=3)) | {"drop_path": torch.tensor([0.0, 1.0, 4.0])}
        residual = residual_layer_norm(**call, backend=backend.name).residual
        assert torch.equal(residual[0], call["x"][0])
        update = call["branch"] * call["layer_scale"]
        torch.testing.assert_close(residual[1:], call["x"][1:] + update[1:] * torch.tensor([1.0, 4.0])[:, None, None])

    @every_backend
    @pytest.mark.parametrize("rms", [False, True])
    def test_tokens_that_are_not_numbers_stay_by_themselves(self, backend, rms):
        spec = Spec(batch=2, tokens=9, rms=rms, bias=not rms)
        call, upstream = make_call(spec), make_upstream(spec)
        clean = run(backend.name, call, upstream)
        call["x"][0, 2, 5], call["x"][1, 7, 0], call["x"][1, 8, 40] = math.nan, math.inf, -math.inf
        spoilt = run(backend.name, call, upstream)
        others = torch.ones(2, 9, dtype=torch.bool)
        others[0, 2] = others[1, 7] = others[1, 8] = False
        for name in ("residual", "normalized", "token_norms", "grad_x", "grad_branch"):
            assert torch.equal(spoilt[name][others], clean[name][others]), name
        norms = spoilt["token_norms"]
        assert norms[0, 2].isnan()
        assert norms[1, 7] == norms[1, 8] == math.inf
        assert spoilt["normalized"][~others].isnan().any(-1).all()

    @every_backend
    @pytest.mark.parametrize(
        ("dtype", "branch", "parameters"),
        [
            (torch.bfloat16, torch.bfloat16, F32),
            (F32, torch.bfloat16, F32),
            (F32, torch.float16, F32),
            (F32, torch.float16, torch.float16),
            (torch.float16, F32, F32),
        ],
        ids=str,
    )
    def test_dtypes_mix(self, backend, dtype, branch, parameters):
        """Each result has the dtype of its input and the accuracy of the reference on the same mixture."""
        if INTERPRETING and torch.bfloat16 in (dtype, branch):
            pytest.skip("the interpreter has no bf16")
        call = make_call(Spec(tokens=33))
        for name in ("layer_scale", "weight", "bias", "drop_path"):
            call[name] = call[name].to(parameters)
        call |= {"x": call["x"].to(dtype), "branch": call["branch"].to(branch)}
        upstream = {name: g.to(dtype) for name, g in make_upstream(Spec(tokens=33)).items()}
        results = run(backend.name, call, upstream)
        assert results["residual"].dtype == results["normalized"].dtype == dtype
        assert results["token_norms"].dtype == F32
        for name in DIFFERENTIABLE:
            assert results[f"grad_{name}"].dtype == call[name].dtype
        assert_passed(Oracle(call, upstream).compare(results), backend.name)


class TestEdges:
    @every_backend
    def test_empty_batch_of_channels_that_are_not_side_by_side(self, backend):
        result = residual_layer_norm(torch.empty(0, 4, 3).transpose(1, 2), weight=torch.ones(4), backend=backend.name)
        assert result.normalized.shape == (0, 3, 4)

    @every_backend
    @pytest.mark.parametrize("rms", [False, True])
    def test_one_channel(self, backend, rms):
        """LayerNorm makes it 0, whatever it is, and hands no gradient on; RMSNorm leaves its sign."""
        call = make_call(Spec(channels=1, branch=False, layer_scale=False, drop_path=False, bias=False, rms=rms))
        upstream = {"normalized": make_upstream(Spec(channels=1))["normalized"]}
        results = run(backend.name, call, upstream)
        expected = call["x"].sign() * call["weight"] if rms else torch.zeros(2, 9, 1)
        torch.testing.assert_close(results["normalized"], expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(results["token_norms"], call["x"][..., 0].abs())
        if not rms:  # rstd is 1000 there, which torch's own backward multiplies by before it subtracts
            torch.testing.assert_close(results["grad_x"], torch.zeros(2, 9, 1), rtol=0.0, atol=1e-3)

    @every_backend
    def test_a_token_of_zeros(self, backend):
        """Its variance is 0, and eps is all there is."""
        call = make_call(PLAIN)
        call["x"][0, 3] = 0.0
        upstream = {"normalized": make_upstream(PLAIN)["normalized"]}
        results = run(backend.name, call, upstream)
        assert torch.equal(results["normalized"][0, 3], call["bias"])
        assert results["token_norms"][0, 3] == 0.0
        expected = run("reference", call, upstream)["grad_x"][0, 3]
        torch.testing.assert_close(results["grad_x"][0, 3], expected, rtol=1e-4, atol=1e-2)
