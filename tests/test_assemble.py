"""assemble_tokens by every backend usable here, against fp64 by the one accuracy rule, and at its edges.

``TRITON_INTERPRET=1 pytest tests/test_assemble.py`` adds the Triton kernels.
"""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from assemble_cases import DIFFERENTIABLE, KINDS, USABLE, Spec, Yardstick, make_call, make_upstream, run, specs
from hypothesis import given, settings
from hypothesis import strategies as st
from residual_norm_cases import LAYOUTS, assert_passed
from torch._dynamo.testing import CompileCounterWithBackend

from vitreg_kernels._runtime.triton_mode import INTERPRETING
from vitreg_kernels.functional import assemble_tokens

F32, F64 = torch.float32, torch.float64

every_backend = pytest.mark.parametrize("backend", USABLE, ids=lambda backend: backend.NAME)
every_dtype = pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16], ids=str)
every_kind = pytest.mark.parametrize("spec", KINDS, ids=str)


def needs(backend, dtype):
    if dtype not in backend.REQUIREMENTS.dtypes:
        pytest.skip("not declared")


def test_there_is_something_to_test():
    assert [b.NAME for b in USABLE] == [*(["triton"] if INTERPRETING else []), "composite", "reference"]


class TestParity:
    @every_backend
    @settings(max_examples=20 if INTERPRETING else 100)
    @given(data=st.data())
    def test_any_call(self, backend, data):
        """The tokens have the reference's bits: one addition, rounded once, leaves no choice."""
        spec = data.draw(specs([dtype for dtype in backend.REQUIREMENTS.dtypes if dtype != F64]))
        yardstick = Yardstick(make_call(spec), make_upstream(spec))
        results = run(backend.NAME, yardstick.call, yardstick.upstream)
        assert torch.equal(results["tokens"], yardstick.eager["tokens"])
        assert_passed(yardstick.compare(results), f"{backend.NAME} on {spec}")

    @every_backend
    @settings(max_examples=40)
    @given(data=st.data())
    def test_any_call_in_double(self, backend, data):
        """fp64 has no eager error to be measured by; there a backend agrees with the reference outright."""
        needs(backend, F64)
        spec = data.draw(specs([F64]))
        call, upstream = make_call(spec), make_upstream(spec)
        expected = run("reference", call, upstream)
        torch.testing.assert_close(run(backend.NAME, call, upstream), expected, rtol=1e-13, atol=1e-13)

    @every_backend
    @every_dtype
    @pytest.mark.parametrize("layout", ["contiguous", "permuted"])
    @pytest.mark.parametrize("channels", [384, 768, 1536])
    def test_widths_of_vits(self, backend, dtype, channels, layout):
        needs(backend, dtype)
        spec = Spec(batch=2, patches=49, channels=channels, dtype=dtype, layout=layout, position="cls")
        yardstick = Yardstick(make_call(spec), make_upstream(spec))
        assert_passed(yardstick.compare(run(backend.NAME, yardstick.call, yardstick.upstream)), str(spec))

    @every_backend
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_sums_over_the_batch_are_fp32(self, backend, dtype):
        """64 ones and a number whose neighbour in the dtype is 2 away: one by one they would all be lost to it."""
        needs(backend, dtype)
        spec = Spec(batch=65, patches=2, channels=8, registers=1, dtype=dtype)
        upstream = torch.ones_like(make_upstream(spec)["tokens"])
        upstream[0] = large = 2 / torch.finfo(dtype).eps
        assert upstream[0, 0, 0] + upstream[1, 0, 0] == large
        results = run(backend.NAME, make_call(spec), {"tokens": upstream})
        for name in DIFFERENTIABLE[1:]:
            assert (results[f"grad_{name}"] == large + 64).all(), name


class TestResult:
    @every_backend
    @every_kind
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_memory(self, backend, spec, layout):
        """Contiguous, and nobody else's: the result is written anew even where nothing is added."""
        call = make_call(spec._replace(layout=layout))
        assert call["patches"].is_contiguous() == (layout == "contiguous")
        tokens = assemble_tokens(**call, backend=backend.NAME)
        assert tokens.shape == (2, spec.prefix + 9, 48)
        assert tokens.is_contiguous()
        held = {x.untyped_storage().data_ptr() for x in call.values()}
        assert tokens.untyped_storage().data_ptr() not in held
        compact = call | {"patches": call["patches"].clone(memory_format=torch.contiguous_format)}
        assert torch.equal(tokens, assemble_tokens(**compact, backend=backend.NAME))

    @every_backend
    def test_the_prefix_of_every_image_is_the_same(self, backend):
        call = make_call(Spec(batch=3, position="cls"))
        tokens = assemble_tokens(**call, backend=backend.NAME)
        assert torch.equal(tokens[:, :5], tokens[:1, :5].expand(3, -1, -1))
        assert torch.equal(tokens[0, 1:5], call["register_tokens"][0])  # no row for them

    @every_backend
    def test_convolutions_result_as_it_is(self, backend):
        """A patch embedding's ``[B, C, h, w]``, in both of torch's memory formats."""
        image = torch.randn(2, 48, 3, 4)
        call = make_call(Spec(patches=12))
        results = [
            assemble_tokens(**call | {"patches": x.flatten(2).transpose(1, 2)}, backend=backend.NAME)
            for x in (image, image.to(memory_format=torch.channels_last))
        ]
        assert torch.equal(*results)
        expected = image.permute(0, 2, 3, 1).reshape(2, 12, 48) + call["pos_embed"][:, 5:]
        assert torch.equal(results[0][:, 5:], expected)

    @every_backend
    def test_parameters_in_any_strides(self, backend):
        call = make_call(Spec())
        strided = {name: call[name].repeat_interleave(2, -1)[..., ::2] for name in DIFFERENTIABLE[1:]}
        strided["pos_embed"] = call["pos_embed"].mT.contiguous().mT  # as interpolated ones are
        assert not any(x.is_contiguous() for x in strided.values())
        upstream = make_upstream(Spec())
        torch.testing.assert_close(run(backend.NAME, call | strided, upstream), run(backend.NAME, call, upstream))

    @every_backend
    def test_a_number_that_is_none_stays_by_itself(self, backend):
        call, upstream = make_call(Spec()), make_upstream(Spec())
        clean = run(backend.NAME, call, upstream)["tokens"]
        call["patches"][1, 3, 7], call["register_tokens"][0, 2, 5] = math.nan, math.inf
        spoilt = run(backend.NAME, call, upstream)["tokens"]
        changed = torch.zeros_like(clean, dtype=torch.bool)
        changed[1, 8, 7] = changed[:, 3, 5] = True
        assert torch.equal(spoilt[~changed], clean[~changed])
        assert not spoilt[changed].isfinite().any()

    @every_backend
    @every_dtype
    def test_bitwise_the_same_from_run_to_run(self, backend, dtype):
        needs(backend, dtype)
        spec = Spec(batch=50, patches=30, channels=96, dtype=dtype)
        first, second = (run(backend.NAME, make_call(spec), make_upstream(spec)) for _ in range(2))
        assert first.keys() == second.keys()
        for name in first:
            assert torch.equal(first[name], second[name]), name

    @every_backend
    @pytest.mark.parametrize(
        ("patches", "parameters", "position", "expected"),
        [
            (torch.bfloat16, F32, F32, F32),  # a model under autocast
            (torch.float16, F32, F32, F32),
            (F32, torch.float16, torch.float16, F32),
            (torch.float16, torch.float16, F32, F32),
            (torch.float16, torch.bfloat16, torch.float16, F32),
            (torch.bfloat16, torch.bfloat16, F64, F64),
        ],
        ids=str,
    )
    @pytest.mark.parametrize("kind", ["prefix", "cls", "patches"])
    def test_dtypes_mix(self, backend, patches, parameters, position, expected, kind):
        """As torch promotes them; each gradient has the dtype of its input and is rounded once."""
        if INTERPRETING and {torch.bfloat16, F64} & {patches, parameters, position}:
            pytest.skip("the interpreter has no bf16, and the kernels no fp64")
        spec = Spec(batch=5, position=kind)
        call = make_call(spec)
        dtypes = dict(zip(DIFFERENTIABLE, (patches, parameters, parameters, position), strict=True))
        call = {name: x.to(dtypes[name]) for name, x in call.items()}
        upstream = {"tokens": make_upstream(spec)["tokens"].to(expected)}
        results = run(backend.NAME, call, upstream)
        assert results["tokens"].dtype == expected
        for name, dtype in dtypes.items():
            assert results[f"grad_{name}"].dtype == dtype
        yardstick = Yardstick(call, upstream)
        assert torch.equal(results["tokens"], yardstick.eager["tokens"])
        assert_passed(yardstick.compare(results), backend.NAME)

    @every_backend
    def test_no_register_is_zero_registers(self, backend):
        """A model built with none may hold an empty parameter."""
        call = make_call(Spec(registers=0))
        empty = call["cls_token"][:, :0].clone().requires_grad_()
        tokens = assemble_tokens(**call, register_tokens=empty, backend=backend.NAME)
        assert torch.equal(tokens, assemble_tokens(**call, backend=backend.NAME))
        assert torch.autograd.grad(tokens.sum(), empty)[0].shape == (1, 0, 48)


class TestGradients:
    @every_backend
    @every_kind
    @pytest.mark.parametrize(
        "wanted", [*((name,) for name in DIFFERENTIABLE), ("patches", "pos_embed"), DIFFERENTIABLE[1:3]]
    )
    def test_of_some_inputs_only(self, backend, spec, wanted):
        call, upstream = make_call(spec), make_upstream(spec)
        wanted = [name for name in wanted if name in call]
        if not wanted:
            return
        everything = run(backend.NAME, call, upstream)
        some = run(backend.NAME, call, upstream, wanted)
        assert some.keys() == {"tokens", *(f"grad_{name}" for name in wanted)}
        for name, x in some.items():
            assert torch.equal(x, everything[name]), name

    @every_backend
    @every_kind
    def test_none_where_none_is_wanted(self, backend, spec):
        call = {name: x.requires_grad_() for name, x in make_call(spec).items()}
        assert assemble_tokens(**call, backend=backend.NAME).requires_grad
        with torch.no_grad():
            assert not assemble_tokens(**call, backend=backend.NAME).requires_grad
        with torch.inference_mode():
            assert assemble_tokens(**call, backend=backend.NAME).is_inference()
        constant = {name: x.detach() for name, x in call.items()}
        assert not assemble_tokens(**constant, backend=backend.NAME).requires_grad

    @every_backend
    @every_kind
    def test_upstream_gradient_in_any_strides(self, backend, spec):
        """As ``sum().backward()`` and permutations give them."""
        call, upstream = make_call(spec), make_upstream(spec)["tokens"]
        permuted = upstream.transpose(1, 2).contiguous().transpose(1, 2)
        for gradient in (torch.ones(()).expand(upstream.shape), permuted, upstream[:1].expand(upstream.shape)):
            actual, expected = (run(name, call, {"tokens": gradient}) for name in (backend.NAME, "reference"))
            torch.testing.assert_close(actual, expected)

    @every_backend
    @every_kind
    def test_tokens_and_patches_used_twice(self, backend, spec):
        """The patches' gradient may be a part of the upstream one, which others then must not write to."""
        results = []
        for name in (backend.NAME, "reference"):
            call = {key: x.requires_grad_() for key, x in make_call(spec).items()}
            patches = call["patches"] * 2.0
            tokens = assemble_tokens(**call | {"patches": patches}, backend=name)
            again = assemble_tokens(**call | {"patches": patches}, backend=name)
            tokens.retain_grad()
            loss = tokens.square().sum() + (tokens * again).sum() + patches.sin().sum()
            loss.backward()
            results.append([tokens.grad, *(x.grad for x in call.values())])
        torch.testing.assert_close(*results)

    @every_backend
    def test_functional_gradient(self, backend):
        call = make_call(Spec())

        def loss(call, name):
            return assemble_tokens(**call, backend=name).sin().sum()

        actual, expected = (torch.func.grad(loss)(call, name) for name in (backend.NAME, "reference"))
        torch.testing.assert_close(actual, expected)


class TestEdges:
    @every_backend
    @every_kind
    def test_empty_batch(self, backend, spec):
        spec = spec._replace(batch=0)
        results = run(backend.NAME, make_call(spec), make_upstream(spec))
        assert results["tokens"].shape == (0, spec.prefix + 9, 48)
        assert results["grad_patches"].shape == (0, 9, 48)
        for name in DIFFERENTIABLE[1:]:
            if f"grad_{name}" in results:
                assert not results[f"grad_{name}"].any(), name

    @every_backend
    @pytest.mark.parametrize("spec", [Spec(1, 1, 1), Spec(1, 1, 1, 1, 0), Spec(3, 1, 5, position="cls")], ids=str)
    def test_one_of_everything(self, backend, spec):
        call, upstream = make_call(spec), make_upstream(spec)
        torch.testing.assert_close(run(backend.NAME, call, upstream), run("reference", call, upstream))


class TestAutocast:
    @every_backend
    @every_dtype
    @every_kind
    def test_it_changes_nothing(self, backend, dtype, spec):
        """What a convolution made 16-bit meets fp32 parameters and becomes fp32, as cat and add have it."""
        needs(backend, dtype)
        call = make_call(spec)
        call["patches"] = call["patches"].to(dtype)
        with torch.autocast("cpu", torch.float16 if INTERPRETING else torch.bfloat16):
            tokens = assemble_tokens(**call, backend=backend.NAME)
        alone = len(call) == 1
        assert tokens.dtype == (dtype if alone else F32)
        assert torch.equal(tokens, assemble_tokens(**call, backend=backend.NAME))


@pytest.mark.usefixtures("dynamo")
class TestCompile:
    @staticmethod
    def assert_same(compiled, spec, backend):
        """The tokens and gradients, compiled and not."""
        results = []
        for function in (assemble_tokens, compiled):
            leaves = {name: x.requires_grad_() for name, x in make_call(spec).items()}
            tokens = function(**leaves, backend=backend)
            gradients = torch.autograd.grad(tokens, list(leaves.values()), make_upstream(spec)["tokens"])
            results.append((tokens, *gradients))
        torch.testing.assert_close(results[1], results[0])

    @every_backend
    @every_kind
    def test_whole_graph(self, backend, spec):
        compiled = torch.compile(assemble_tokens, backend="aot_eager", fullgraph=True)
        self.assert_same(compiled, spec, backend.NAME)
        patches = make_call(spec)["patches"]
        assert compiled(patches, backend=backend.NAME).data_ptr() != patches.data_ptr()

    @every_backend
    @pytest.mark.parametrize("position", ["prefix", "cls", "patches"])
    def test_sizes_change_under_a_recompile_limit(self, backend, position):
        """One graph for the first number of patches, one for all others, one more once the batch changes too."""
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(assemble_tokens, backend=counter, fullgraph=True)
        with torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True):
            for batch, patches in ((2, 16), (2, 25), (2, 49), (3, 64), (4, 9)):
                self.assert_same(compiled, Spec(batch=batch, patches=patches, position=position), backend.NAME)
        assert counter.frame_count == 3

    @every_backend
    def test_autocast_around_it(self, backend):
        def function(**call):
            with torch.autocast("cpu", torch.float16):
                return assemble_tokens(**call, backend=backend.NAME)

        call = make_call(Spec())
        compiled = torch.compile(function, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(**call), function(**call))

    @pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="inductor needs a compiler")
    def test_inductor(self):
        """The compiler people use."""
        self.assert_same(torch.compile(assemble_tokens, fullgraph=True), Spec(position="cls"), None)
