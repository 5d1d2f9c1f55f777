"""token_norms and token_norm_stats by every backend usable here: norms by the accuracy rule, counts to the last one.

``TRITON_INTERPRET=1 pytest tests/test_token_norms.py`` adds the Triton kernels.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_norms_cases import (
    KINDS,
    ODD_NORMS,
    USABLE,
    Spec,
    assert_parity,
    assert_same_counts,
    counted,
    make_call,
    run,
    specs,
)
from torch.utils.checkpoint import checkpoint

from vitreg_kernels import NormDistribution, TokenLayout
from vitreg_kernels._native import library
from vitreg_kernels._triton.mode import INTERPRETING
from vitreg_kernels.functional import residual_layer_norm, token_norm_stats, token_norms
from vitreg_kernels.ops.token_norms.api import accumulate

F32, F64 = torch.float32, torch.float64
LAYOUT = TokenLayout(num_registers=4)

every_backend = pytest.mark.parametrize("backend", USABLE, ids=lambda backend: backend.name)
every_dtype = pytest.mark.parametrize("dtype", [F32, torch.float16, torch.bfloat16], ids=str)
every_kind = pytest.mark.parametrize("spec", KINDS, ids=str)


def needs(backend, dtype):
    if dtype not in backend.requirements.dtypes:
        pytest.skip("not declared")


def accumulated(batches, backend, layout=LAYOUT):
    into = NormDistribution.zeros((3,), "cpu")
    for norms in batches:
        assert accumulate(norms, layout, into, backend=backend.name) is None
    return into._asdict()


def test_there_is_something_to_test():
    native_ones = [] if library.faults() else ["cpu"]
    assert [b.name for b in USABLE] == [*(["triton"] if INTERPRETING else []), *native_ones, "composite", "reference"]


class TestParity:
    @every_backend
    @settings(max_examples=10 if INTERPRETING else 60)
    @given(data=st.data())
    def test_any_call(self, backend, data):
        spec = data.draw(specs([dtype for dtype in backend.requirements.dtypes if dtype != F64]))
        assert_parity(spec, backend.name, draws=4 if INTERPRETING else 10)

    @every_backend
    @every_dtype
    @pytest.mark.parametrize("channels", [1, 384, 768, 1024, 1280, 1536, 4096])
    def test_widths_of_vits(self, backend, dtype, channels):
        needs(backend, dtype)
        assert_parity(Spec(batch=2, tokens=11, channels=channels, dtype=dtype), backend.name)

    @every_backend
    @every_dtype
    def test_massive_activations(self, backend, dtype):
        """Norms of 500 among norms of 20, most of it in two channels; the squares overflow fp16."""
        needs(backend, dtype)
        x = make_call(Spec(batch=8, tokens=33, channels=384))["x"]
        x *= 20 / x.norm(dim=-1, keepdim=True)
        x[:, 17, :2] = torch.tensor([450.0, -218.0])
        norms = token_norms(x.to(dtype), backend=backend.name)
        torch.testing.assert_close(norms[:, 17], torch.full((8,), 500.0), rtol=0.01, atol=0.0)
        assert token_norm_stats(x.to(dtype), LAYOUT, backend=backend.name).outliers().patches == 8


class TestNorms:
    @every_backend
    @every_dtype
    @pytest.mark.parametrize("channels", [48, 201])
    def test_those_of_residual_layer_norm(self, backend, dtype, channels):
        needs(backend, dtype)
        x = make_call(Spec(channels=channels, dtype=dtype))["x"]
        expected = residual_layer_norm(x, weight=torch.ones(channels), backend=backend.name).token_norms
        assert torch.equal(token_norms(x, backend=backend.name), expected)

    @every_backend
    def test_tokens_that_are_not_numbers_stay_by_themselves(self, backend):
        call = make_call(Spec())
        clean = run(backend.name, call)
        kept = {name: x.clone() for name, x in clean.items()}
        x = call["x"]
        lost = [(0, 0), (1, 3), (1, 20)]
        x[0, 0, 5], x[1, 3, 0], x[1, 20, 47] = math.nan, math.inf, -math.inf
        spoilt = run(backend.name, call)
        others = torch.ones(2, 21, dtype=torch.bool)
        others[tuple(zip(*lost, strict=True))] = False
        assert torch.equal(spoilt["token_norms"][others], kept["token_norms"][others])
        assert spoilt["token_norms"][0, 0].isnan()
        assert spoilt["token_norms"][1, 3] == spoilt["token_norms"][1, 20] == math.inf
        assert spoilt["nonfinite"].tolist() == [[1, 0], [0, 1], [0, 1]]
        assert spoilt["histogram"].sum(-1).tolist() == [1, 7, 31]
        assert spoilt["sums"].isfinite().all()
        assert spoilt["extremes"].isfinite().all()


class TestCounting:
    @every_backend
    def test_every_bin_begins_where_it_should(self, backend):
        norms = ODD_NORMS[None]
        layout = TokenLayout(num_cls_tokens=1000, num_registers=1000)
        result = accumulated([norms], backend, layout)
        assert_same_counts(result, counted(norms, layout), backend.name)
        assert result["nonfinite"].sum(0).tolist() == [2, 2]
        assert (result["histogram"].sum(0)[1:-1] == 2).all()

    @every_backend
    @settings(max_examples=10 if INTERPRETING else 50)
    @given(data=st.data())
    def test_any_norms(self, backend, data):
        tokens = data.draw(st.integers(5, 30))
        some = st.one_of(st.floats(0, 1e4, width=32), st.integers(0, len(ODD_NORMS) - 1).map(lambda i: ODD_NORMS[i]))
        rows = st.lists(some, min_size=tokens, max_size=tokens)
        norms = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=4)), dtype=F32)
        assert_same_counts(accumulated([norms], backend), counted(norms, LAYOUT), backend.name)

    @every_backend
    def test_more_norms_than_a_program_takes(self, backend):
        norms = torch.empty(70, 261).log_normal_(3.0, 0.5)
        assert_same_counts(accumulated([norms], backend), counted(norms, LAYOUT), backend.name)

    @every_backend
    def test_batch_after_batch_is_all_at_once(self, backend):
        norms = torch.empty(20, 37).log_normal_(3.0, 2.0)
        norms[3, 5], norms[4, 0], norms[19, 36] = math.nan, math.inf, math.nan
        expected = counted(norms, LAYOUT)
        for sizes in ([20], [1] * 20, [7, 13], [3, 0, 17]):
            result = accumulated(norms.split(sizes), backend)
            assert_same_counts(result, expected, f"{backend.name} in batches of {sizes}")

    @every_backend
    def test_batches_of_other_lengths(self, backend):
        """Images of several sizes: each sequence has its own number of patches."""
        batches = [torch.empty(3, n).log_normal_() for n in (5, 21, 261)]
        layouts_agree = [counted(norms, LAYOUT) for norms in batches]
        result = accumulated(batches, backend)
        assert torch.equal(result["histogram"], sum(c["histogram"] for c in layouts_agree))

    @every_backend
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F64], ids=str)
    def test_norms_of_other_dtypes_are_counted_in_fp32(self, backend, dtype):
        norms = torch.empty(3, 21).log_normal_(3.0, 1.0).to(dtype)
        assert_same_counts(accumulated([norms], backend), counted(norms.float(), LAYOUT), backend.name)

    @every_backend
    def test_norms_in_any_strides(self, backend):
        norms = torch.empty(8, 21).log_normal_(3.0, 1.0)
        for moved in (
            norms.t().contiguous().t(),
            norms.repeat_interleave(3, -1)[:, ::3],
            norms[::2],
            norms[:1].expand(4, -1),
        ):
            assert not moved.is_contiguous()
            assert_same_counts(accumulated([moved], backend), counted(moved, LAYOUT), backend.name)

    @every_backend
    @pytest.mark.parametrize("dim", [0, 1, 2])
    def test_into_views_of_a_larger_tensor(self, backend, dim):
        """One layer's slice of ``[L, 3, ...]`` changes, in whatever order the dimensions lie; no other does."""
        shape = {0: (4, 3), 1: (3, 4), 2: (3,)}[dim]
        whole = NormDistribution.zeros(shape, "cpu") if dim < 2 else NormDistribution(
            *(torch.stack([x] * 4, -1) for x in NormDistribution.zeros(shape, "cpu"))
        )  # fmt: skip
        before = [x.clone() for x in whole]
        into = NormDistribution(*(x.select(dim, 2) for x in whole))
        norms = torch.empty(3, 21).log_normal_(3.0, 1.0)
        norms[0, 0], norms[1, 7] = math.nan, math.inf
        accumulate(norms, LAYOUT, into, backend=backend.name)
        assert_same_counts(into._asdict(), counted(norms, LAYOUT), backend.name)
        for x, untouched in zip(whole, before, strict=True):
            for layer in (0, 1, 3):
                assert torch.equal(x.select(dim, layer), untouched.select(dim, layer))

    @every_backend
    def test_a_call_inside_inference_mode(self, backend):
        into = NormDistribution.zeros((3,), "cpu")
        with torch.inference_mode():
            accumulate(torch.ones(2, 21), LAYOUT, into, backend=backend.name)
        accumulate(torch.ones(2, 21), LAYOUT, into, backend=backend.name)
        assert into.count.tolist() == [4, 16, 64]


class Layers(torch.nn.Module):
    """Two layers that count the norms of what they receive, checkpointed or not."""

    def __init__(self, backend, checkpointing, skip=True):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(48, 48, generator=generator) / 7)
        self.state = NormDistribution.zeros((2, 3), "cpu")
        self.backend, self.checkpointing, self.skip = backend.name, checkpointing, skip

    def layer(self, x, i):
        into = NormDistribution(*(s[i] for s in self.state))
        norms = token_norms(x, backend=self.backend)
        accumulate(norms, LAYOUT, into, skip_in_backward=self.skip, backend=self.backend)
        return x + (x @ self.weight).sin()

    def forward(self, x):
        for i in range(2):
            if self.checkpointing:
                x = checkpoint(self.layer, x, i, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = self.layer(x, i)
        return x


class TestInTraining:
    @every_backend
    @pytest.mark.parametrize("checkpointing", [None, "reentrant", "not reentrant"])
    def test_each_token_counts_once(self, backend, checkpointing):
        x = make_call(Spec())["x"].requires_grad_()
        plain, model = Layers(backend, None), Layers(backend, checkpointing)
        for one in (plain, model):
            for _ in range(2):
                one(x).square().sum().backward()
        assert model.state.count.tolist() == [[4, 16, 64]] * 2
        assert all(torch.equal(a, b) for a, b in zip(model.state, plain.state, strict=True))
        torch.testing.assert_close(model.weight.grad, plain.weight.grad)

    @every_backend
    @pytest.mark.parametrize("checkpointing", ["reentrant", "not reentrant"])
    def test_twice_if_nothing_is_to_be_skipped(self, backend, checkpointing):
        """So that the test above has something to see."""
        model = Layers(backend, checkpointing, skip=False)
        model(make_call(Spec())["x"].requires_grad_()).square().sum().backward()
        assert model.state.count.tolist() == [[4, 16, 64]] * 2

    @every_backend
    @pytest.mark.usefixtures("dynamo")
    @pytest.mark.parametrize("checkpointing", [None, "not reentrant"])
    def test_compiled_whole(self, backend, checkpointing):
        x = make_call(Spec())["x"]
        plain, model = Layers(backend, None), Layers(backend, checkpointing)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        for one in (plain, compiled):
            for _ in range(2):
                one(x).square().sum().backward()
        assert_same_counts(model.state._asdict(), plain.state._asdict(), backend.name)
        torch.testing.assert_close(model.weight.grad, plain.weight.grad)
