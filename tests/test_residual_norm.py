"""residual_layer_norm by every backend usable here, against fp64 by the one accuracy rule, and at its edges.

``TRITON_INTERPRET=1 pytest tests/test_residual_norm.py`` adds the Triton kernels.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_norm_cases import (
    DIFFERENTIABLE,
    KINDS,
    LAYOUTS,
    PLAIN,
    USABLE,
    Spec,
    Yardstick,
    assert_parity,
    assert_passed,
    make_call,
    make_upstream,
    run,
    specs,
)
from torch._dynamo.testing import CompileCounterWithBackend

from vitreg_kernels._runtime import native
from vitreg_kernels._runtime.triton_mode import INTERPRETING
from vitreg_kernels.functional import residual_layer_norm

F32, F64 = torch.float32, torch.float64

every_backend = pytest.mark.parametrize("backend", USABLE, ids=lambda backend: backend.NAME)
every_dtype = pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16], ids=str)
every_kind = pytest.mark.parametrize("spec", KINDS, ids=str)


def needs(backend, dtype):
    if dtype not in backend.REQUIREMENTS.dtypes:
        pytest.skip("not declared")


def test_there_is_something_to_test():
    native_ones = [] if native.faults() else ["native"]
    assert [b.NAME for b in USABLE] == [*(["triton"] if INTERPRETING else []), *native_ones, "composite", "reference"]


class TestParity:
    @every_backend
    @settings(max_examples=10 if INTERPRETING else 100)
    @given(data=st.data())
    def test_any_call(self, backend, data):
        spec = data.draw(specs([dtype for dtype in backend.REQUIREMENTS.dtypes if dtype != F64]))
        assert_parity(spec, backend.NAME, draws=4 if INTERPRETING else 10)

    @every_backend
    @settings(max_examples=60)
    @given(data=st.data())
    def test_any_call_in_double(self, backend, data):
        """fp64 has no eager error to be measured by; there a backend agrees with the reference outright."""
        needs(backend, F64)
        spec = data.draw(specs([F64]))
        call, upstream = make_call(spec), make_upstream(spec)
        expected = run("reference", call, upstream)
        torch.testing.assert_close(run(backend.NAME, call, upstream), expected, rtol=1e-11, atol=1e-11)

    @every_backend
    @every_dtype
    @pytest.mark.parametrize("channels", [384, 768, 1024, 1280, 1536, 4096])
    def test_widths_of_vits(self, backend, dtype, channels):
        needs(backend, dtype)
        assert_parity(Spec(batch=2, tokens=11, channels=channels, dtype=dtype), backend.NAME)

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
        yardstick = Yardstick(call, make_upstream(spec))
        results = run(backend.NAME, call, yardstick.upstream)
        assert_passed(yardstick.compare(results), backend.NAME)
        torch.testing.assert_close(results["token_norms"][:, 17], torch.full((8,), 500.0), rtol=0.01, atol=0.0)

    @every_backend
    @pytest.mark.parametrize(("mean", "spread"), [(10.0, 0.1), (30.0, 0.01), (-1000.0, 0.01)])
    def test_a_mean_far_beyond_the_spread(self, backend, mean, spread):
        """Where E[x^2] - E[x]^2 has lost the variance: at 1000 and 0.01 it is 2^-33 of the square.

        torch's own backward is a sum of multiples of x and grad_normalized, whose terms cancel: good to 100 spreads.
        """
        spec = PLAIN._replace(batch=4, tokens=33, channels=384, mean=mean, spread=spread)
        yardstick = Yardstick(make_call(spec), make_upstream(spec))
        errors = yardstick.compare(run(backend.NAME, yardstick.call, yardstick.upstream))
        if backend.NAME == "composite" and abs(mean) > 100 * spread:
            del errors["grad_x"]
        assert_passed(errors, backend.NAME)


class TestResult:
    @every_backend
    @every_kind
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_memory_of_the_outputs(self, backend, spec, layout):
        call = make_call(spec._replace(layout=layout))
        assert call["x"].is_contiguous() == (layout == "contiguous")
        residual, normalized, token_norms = residual_layer_norm(**call, backend=backend.NAME)
        assert (residual is call["x"]) == (not spec.branch)
        for output in (normalized, token_norms, *([residual] if spec.branch else [])):
            assert output.is_contiguous()
        compact = {name: x.clone(memory_format=torch.contiguous_format) if isinstance(x, torch.Tensor) else x
                   for name, x in call.items()}  # fmt: skip
        expected = residual_layer_norm(**compact, backend=backend.NAME)
        torch.testing.assert_close(tuple(expected), (residual, normalized, token_norms))

    @every_backend
    def test_a_dropped_sample_passes_unchanged(self, backend):
        call = make_call(Spec(batch=3)) | {"drop_path": torch.tensor([0.0, 1.0, 4.0])}
        residual = residual_layer_norm(**call, backend=backend.NAME).residual
        assert torch.equal(residual[0], call["x"][0])
        update = call["branch"] * call["layer_scale"]
        torch.testing.assert_close(residual[1:], call["x"][1:] + update[1:] * torch.tensor([1.0, 4.0])[:, None, None])

    @every_backend
    @pytest.mark.parametrize("rms", [False, True])
    def test_tokens_that_are_not_numbers_stay_by_themselves(self, backend, rms):
        spec = Spec(batch=2, tokens=9, rms=rms, bias=not rms)
        call, upstream = make_call(spec), make_upstream(spec)
        clean = run(backend.NAME, call, upstream)
        call["x"][0, 2, 5], call["x"][1, 7, 0], call["x"][1, 8, 40] = math.nan, math.inf, -math.inf
        spoilt = run(backend.NAME, call, upstream)
        others = torch.ones(2, 9, dtype=torch.bool)
        others[0, 2] = others[1, 7] = others[1, 8] = False
        for name in ("residual", "normalized", "token_norms", "grad_x", "grad_branch"):
            assert torch.equal(spoilt[name][others], clean[name][others]), name
        norms = spoilt["token_norms"]
        assert norms[0, 2].isnan()
        assert norms[1, 7] == norms[1, 8] == math.inf
        assert spoilt["normalized"][~others].isnan().any(-1).all()

    @every_backend
    @every_dtype
    def test_bitwise_the_same_from_run_to_run(self, backend, dtype):
        needs(backend, dtype)
        spec = Spec(batch=3, tokens=40, channels=96, dtype=dtype)
        first, second = (run(backend.NAME, make_call(spec), make_upstream(spec)) for _ in range(2))
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name

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
        results = run(backend.NAME, call, upstream)
        assert results["residual"].dtype == results["normalized"].dtype == dtype
        assert results["token_norms"].dtype == F32
        for name in DIFFERENTIABLE:
            assert results[f"grad_{name}"].dtype == call[name].dtype
        assert_passed(Yardstick(call, upstream).compare(results), backend.NAME)


class TestGradients:
    @every_backend
    @every_kind
    @pytest.mark.parametrize("arrives", ["residual", "normalized"])
    def test_at_one_output_only(self, backend, spec, arrives):
        call, upstream = make_call(spec), make_upstream(spec)
        upstream = {arrives: upstream[arrives]}
        if arrives == "residual" and not spec.branch:
            leaf = call["x"].requires_grad_()
            assert residual_layer_norm(**call, backend=backend.NAME).residual is leaf
            return
        actual = run(backend.NAME, call, upstream)
        torch.testing.assert_close(actual, run("reference", call, upstream))
        assert ("grad_weight" in actual) == (arrives == "normalized")

    @every_backend
    @every_kind
    @pytest.mark.parametrize("wanted", [*((name,) for name in DIFFERENTIABLE), ("x", "weight"), ("branch", "bias")])
    def test_of_some_inputs_only(self, backend, spec, wanted):
        call, upstream = make_call(spec), make_upstream(spec)
        wanted = [name for name in wanted if name in call]
        if not wanted:
            return
        if not spec.branch:
            del upstream["residual"]
        everything = run(backend.NAME, call, upstream)
        some = run(backend.NAME, call, upstream, wanted)
        gradients = {name for name in some if name.startswith("grad_")}
        assert gradients == {f"grad_{name}" for name in wanted}
        for name in gradients:
            torch.testing.assert_close(some[name], everything[name])

    @every_backend
    @every_kind
    def test_the_norms_carry_none(self, backend, spec):
        call = make_call(spec)
        leaves = {name: call[name].requires_grad_() for name in DIFFERENTIABLE if name in call}
        result = residual_layer_norm(**{**call, **leaves}, backend=backend.NAME)
        assert result.residual.requires_grad
        assert result.normalized.requires_grad
        assert not result.token_norms.requires_grad
        with torch.no_grad():
            assert not residual_layer_norm(**{**call, **leaves}, backend=backend.NAME).normalized.requires_grad
        with torch.inference_mode():
            assert residual_layer_norm(**{**call, **leaves}, backend=backend.NAME).normalized.is_inference()

    @every_backend
    @pytest.mark.parametrize("spec", KINDS[:2], ids=str)
    def test_upstream_gradients_in_any_strides(self, backend, spec):
        """As ``sum().backward()`` and permutations give them."""
        call = make_call(spec)
        one = torch.ones(()).expand(2, 9, 48)
        permuted = make_upstream(spec)["normalized"].transpose(1, 2).contiguous().transpose(1, 2)
        for residual, normalized in ((one, permuted), (permuted, one)):
            upstream = {"residual": residual, "normalized": normalized}
            actual, expected = (run(name, call, upstream) for name in (backend.NAME, "reference"))
            torch.testing.assert_close(actual, expected)

    @every_backend
    def test_functional_gradient(self, backend):
        call = make_call(Spec())

        def loss(x, name):
            result = residual_layer_norm(**{**call, "x": x}, backend=name)
            return result.residual.square().sum() + result.normalized.sin().sum()

        actual, expected = (torch.func.grad(loss)(call["x"], name) for name in (backend.NAME, "reference"))
        torch.testing.assert_close(actual, expected)


class TestEdges:
    @every_backend
    @every_kind
    def test_empty_batch(self, backend, spec):
        spec = spec._replace(batch=0)
        upstream = {"normalized": make_upstream(spec)["normalized"]}
        results = run(backend.NAME, make_call(spec), upstream)
        assert results["residual"].shape == results["normalized"].shape == results["grad_x"].shape == (0, 9, 48)
        assert results["token_norms"].shape == (0, 9)
        assert torch.equal(results["grad_weight"], torch.zeros(48))

    @every_backend
    @pytest.mark.parametrize("rms", [False, True])
    def test_one_channel(self, backend, rms):
        """LayerNorm makes it 0, whatever it is, and hands no gradient on; RMSNorm leaves its sign."""
        call = make_call(Spec(channels=1, branch=False, layer_scale=False, drop_path=False, bias=False, rms=rms))
        upstream = {"normalized": make_upstream(Spec(channels=1))["normalized"]}
        results = run(backend.NAME, call, upstream)
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
        results = run(backend.NAME, call, upstream)
        assert torch.equal(results["normalized"][0, 3], call["bias"])
        assert results["token_norms"][0, 3] == 0.0
        expected = run("reference", call, upstream)["grad_x"][0, 3]
        torch.testing.assert_close(results["grad_x"][0, 3], expected, rtol=1e-4, atol=1e-2)


class TestAutocast:
    @every_backend
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @every_kind
    def test_only_the_normalized_tokens_change_dtype(self, backend, dtype, spec):
        """An fp32 residual stream stays fp32; what the next product reads is what it would have cast."""
        needs(backend, dtype)
        call = make_call(spec)
        plain = residual_layer_norm(**call, backend=backend.NAME)
        with torch.autocast("cpu", dtype):
            residual, normalized, token_norms = residual_layer_norm(**call, backend=backend.NAME)
        assert torch.equal(residual, plain.residual)
        assert torch.equal(token_norms, plain.token_norms)
        assert torch.equal(normalized, plain.normalized.to(dtype))

    @every_backend
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_gradients_come_back_in_the_inputs_dtype(self, backend, dtype):
        needs(backend, dtype)
        call = make_call(Spec())
        call["branch"] = call["branch"].to(dtype)
        leaves = {name: call[name].requires_grad_() for name in DIFFERENTIABLE}
        with torch.autocast("cpu", dtype):
            result = residual_layer_norm(**{**call, **leaves}, backend=backend.NAME)
        (result.normalized.float().square().sum() + result.residual.square().sum()).backward()
        for name, leaf in leaves.items():
            assert leaf.grad.dtype == leaf.dtype, name
            assert leaf.grad.any(), name

    @every_backend
    def test_double_is_left_alone(self, backend):
        needs(backend, F64)
        with torch.autocast("cpu", torch.bfloat16):
            result = residual_layer_norm(**make_call(Spec(dtype=F64)), backend=backend.NAME)
        assert all(x.dtype == F64 for x in result)


@pytest.mark.usefixtures("dynamo")
class TestCompile:
    @staticmethod
    def assert_same(compiled, spec, backend):
        """Outputs and gradients, compiled and not."""
        results = []
        for function in (residual_layer_norm, compiled):
            call = make_call(spec)
            leaves = {name: call[name].requires_grad_() for name in DIFFERENTIABLE if name in call}
            result = function(**{**call, **leaves}, backend=backend)
            upstream = make_upstream(spec)
            outputs = [getattr(result, name) for name in upstream]
            gradients = torch.autograd.grad(outputs, list(leaves.values()), list(upstream.values()))
            results.append((*result, *gradients))
        torch.testing.assert_close(results[1], results[0])

    @every_backend
    @every_kind
    def test_whole_graph(self, backend, spec):
        compiled = torch.compile(residual_layer_norm, backend="aot_eager", fullgraph=True)
        self.assert_same(compiled, spec, backend.NAME)

    @every_backend
    def test_sizes_change_under_a_recompile_limit(self, backend):
        """One graph for the first length, one for all others, one more once the batch changes too."""
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(residual_layer_norm, backend=counter, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
            for batch, tokens in ((2, 21), (2, 33), (2, 54), (3, 70), (4, 15)):
                self.assert_same(compiled, Spec(batch=batch, tokens=tokens), backend.NAME)
        assert counter.frame_count == 3

    @every_backend
    def test_autocast_is_seen_while_tracing(self, backend):
        def function(**call):
            with torch.autocast("cpu", torch.float16):
                return residual_layer_norm(**call, backend=backend.NAME)

        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        call = make_call(Spec())
        assert compiled(**call).normalized.dtype == torch.float16
        torch.testing.assert_close(tuple(compiled(**call)), tuple(function(**call)))

    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a compiler")
    def test_inductor(self):
        """The compiler people use."""
        self.assert_same(torch.compile(residual_layer_norm, fullgraph=True), Spec(), None)
