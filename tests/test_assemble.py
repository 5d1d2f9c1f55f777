"""assemble_tokens by every backend usable here, against fp64 by the one accuracy rule, and at its edges.

``TRITON_INTERPRET=1 pytest tests/test_assemble.py`` adds the Triton kernels.
"""

from __future__ import annotations

import math

import pytest
import torch
from assemble_cases import DIFFERENTIABLE, KINDS, USABLE, Oracle, Spec, make_call, make_upstream, run
from residual_norm_cases import LAYOUTS, assert_passed

from vitreg_kernels._native import library
from vitreg_kernels._triton.mode import INTERPRETING
from vitreg_kernels.functional import assemble_tokens

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
    @pytest.mark.parametrize("layout", ["contiguous", "permuted"])
    @pytest.mark.parametrize("channels", [384, 768, 1536])
    def test_widths_of_vits(self, backend, dtype, channels, layout):
        needs(backend, dtype)
        spec = Spec(batch=2, patches=49, channels=channels, dtype=dtype, layout=layout, position="cls")
        oracle = Oracle(make_call(spec), make_upstream(spec))
        assert_passed(oracle.compare(run(backend.name, oracle.call, oracle.upstream)), str(spec))

    @every_backend
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_sums_over_the_batch_are_fp32(self, backend, dtype):
        """64 ones and a number whose neighbour in the dtype is 2 away: one by one they would all be lost to it."""
        needs(backend, dtype)
        spec = Spec(batch=65, patches=2, channels=8, registers=1, dtype=dtype)
        upstream = torch.ones_like(make_upstream(spec)["tokens"])
        upstream[0] = large = 2 / torch.finfo(dtype).eps
        assert upstream[0, 0, 0] + upstream[1, 0, 0] == large
        results = run(backend.name, make_call(spec), {"tokens": upstream})
        for name in DIFFERENTIABLE[1:]:
            assert (results[f"grad_{name}"] == large + 64).all(), name


class TestResult:
    @every_backend
    def test_the_prefix_of_every_image_is_the_same(self, backend):
        call = make_call(Spec(batch=3, position="cls"))
        tokens = assemble_tokens(**call, backend=backend.name)
        assert torch.equal(tokens[:, :5], tokens[:1, :5].expand(3, -1, -1))
        assert torch.equal(tokens[0, 1:5], call["register_tokens"][0])  # no row for them

    @every_backend
    def test_convolutions_result_as_it_is(self, backend):
        """A patch embedding's ``[B, C, h, w]``, in both of torch's memory formats."""
        image = torch.randn(2, 48, 3, 4)
        call = make_call(Spec(patches=12))
        results = [
            assemble_tokens(**call | {"patches": x.flatten(2).transpose(1, 2)}, backend=backend.name)
            for x in (image, image.to(memory_format=torch.channels_last))
        ]
        assert torch.equal(*results)
        expected = image.permute(0, 2, 3, 1).reshape(2, 12, 48) + call["pos_embed"][:, 5:]
        assert torch.equal(results[0][:, 5:], expected)

    @every_backend
    @every_dtype
    @every_kind
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_to_the_last_bit(self, backend, dtype, spec, layout):
        """One addition is all that is rounded; patches and channels fill several vectors and a part of one."""
        needs(backend, dtype)
        call = make_call(spec._replace(patches=149, channels=77, dtype=dtype, layout=layout))
        assert torch.equal(*(assemble_tokens(**call, backend=name) for name in (backend.name, "reference")))

    @every_backend
    def test_a_number_that_is_none_stays_by_itself(self, backend):
        call, upstream = make_call(Spec()), make_upstream(Spec())
        clean = run(backend.name, call, upstream)["tokens"]
        call["patches"][1, 3, 7], call["register_tokens"][0, 2, 5] = math.nan, math.inf
        spoilt = run(backend.name, call, upstream)["tokens"]
        changed = torch.zeros_like(clean, dtype=torch.bool)
        changed[1, 8, 7] = changed[:, 3, 5] = True
        assert torch.equal(spoilt[~changed], clean[~changed])
        assert not spoilt[changed].isfinite().any()

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
        needs(backend, expected)
        if INTERPRETING and torch.bfloat16 in {patches, parameters, position}:
            pytest.skip("the interpreter has no bf16")
        spec = Spec(batch=5, position=kind)
        call = make_call(spec)
        dtypes = dict(zip(DIFFERENTIABLE, (patches, parameters, parameters, position), strict=True))
        call = {name: x.to(dtypes[name]) for name, x in call.items()}
        upstream = {"tokens": make_upstream(spec)["tokens"].to(expected)}
        results = run(backend.name, call, upstream)
        assert results["tokens"].dtype == expected
        for name, dtype in dtypes.items():
            assert results[f"grad_{name}"].dtype == dtype
        oracle = Oracle(call, upstream)
        assert torch.equal(results["tokens"], oracle.eager["tokens"])
        assert_passed(oracle.compare(results), backend.name)

    @every_backend
    def test_no_register_is_zero_registers(self, backend):
        """A model built with none may hold an empty parameter."""
        call = make_call(Spec(registers=0))
        empty = call["cls_token"][:, :0].clone().requires_grad_()
        tokens = assemble_tokens(**call, register_tokens=empty, backend=backend.name)
        assert torch.equal(tokens, assemble_tokens(**call, backend=backend.name))
        assert torch.autograd.grad(tokens.sum(), empty)[0].shape == (1, 0, 48)


class TestGradients:
    @every_backend
    @every_kind
    def test_tokens_and_patches_used_twice(self, backend, spec):
        """The patches' gradient may be a part of the upstream one, which others then must not write to."""
        results = []
        for name in (backend.name, "reference"):
            call = {key: x.requires_grad_() for key, x in make_call(spec).items()}
            patches = call["patches"] * 2.0
            tokens = assemble_tokens(**call | {"patches": patches}, backend=name)
            again = assemble_tokens(**call | {"patches": patches}, backend=name)
            tokens.retain_grad()
            loss = tokens.square().sum() + (tokens * again).sum() + patches.sin().sum()
            loss.backward()
            results.append([tokens.grad, *(x.grad for x in call.values())])
        torch.testing.assert_close(*results)


class TestEdges:
    @every_backend
    @pytest.mark.parametrize("spec", [Spec(1, 1, 1), Spec(1, 1, 1, 1, 0), Spec(3, 1, 5, position="cls")], ids=str)
    def test_one_of_everything(self, backend, spec):
        call, upstream = make_call(spec), make_upstream(spec)
        torch.testing.assert_close(run(backend.name, call, upstream), run("reference", call, upstream))
