"""Which backend a call takes: declarations, defaults, names, reasons."""

from __future__ import annotations

import pytest
import torch
from cases import Spec, make_options, make_qkv, views
from torch._dynamo.testing import CompileCounterWithBackend

from vitreg_kernels import UnsupportedError, explain
from vitreg_kernels._runtime import dispatch, tuning
from vitreg_kernels._runtime import native as _runtime_native
from vitreg_kernels._runtime.dispatch import Request, Requirements
from vitreg_kernels.functional import register_attention
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import BACKENDS, sdpa, triton, xformers
from vitreg_kernels.ops.attention.validation import validated

NAMES = [backend.NAME for backend in BACKENDS]
DECLARED = Requirements(("cuda",), (torch.float16, torch.bfloat16), (16, 128), (features.ROPE,), (8, 0))
CALL = Request("cuda", (9, 0), torch.float16, 64, ())


@pytest.fixture
def measured(tmp_path, monkeypatch, dynamo):
    """A GPU's file says that triton is the fastest up to 272 tokens and sdpa up to 2048, and triton runs here."""
    (tmp_path / "sm90.json").write_text('{"fastest": {"16-bit,64,272": "triton", "16-bit,64,2048": "sdpa"}}')
    monkeypatch.setattr(tuning, "_TABLES", tuning.read_tables(tmp_path))
    monkeypatch.setattr(triton, "not_supported_reasons", lambda request: [])


class Fake:
    """A backend with the reasons given."""

    def __init__(self, name, supported=(), default=()):
        self.NAME, self.supported, self.default = name, list(supported), list(default)

    def not_supported_reasons(self, request):
        return self.supported

    def not_default_reasons(self, request):
        return self.default


class TestDeclarations:
    def test_a_call_within_them(self):
        assert dispatch.unmet(DECLARED, CALL) == []

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"device": "cpu", "capability": (0, 0)}, "runs on cuda, not on cpu"),
            ({"capability": (7, 5)}, "needs compute capability 8.0, this GPU has 7.5"),
            ({"dtype": torch.float64}, "takes float16 or bfloat16, not float64"),
            ({"head_dim": 15}, "takes head dims 16 to 128, not 15"),
            ({"head_dim": 129}, "takes head dims 16 to 128, not 129"),
            ({"features": (features.ROPE, features.DROPOUT)}, "does not support dropout"),
        ],
    )
    def test_each_has_its_reason(self, changes, reason):
        assert dispatch.unmet(DECLARED, CALL._replace(**changes)) == [reason]

    def test_channels_of_an_op_that_takes_whole_tokens(self):
        needs = Requirements(("cuda",), (torch.float16,), channels=(1, 4096))
        call = Request("cuda", (9, 0), torch.float16, channels=4096)
        assert dispatch.unmet(needs, call) == []
        assert dispatch.unmet(needs, call._replace(channels=4097)) == ["takes channel counts 1 to 4096, not 4097"]
        assert dispatch.unmet(needs, CALL) == [], "a call without channels is not asked for them"

    def test_all_reasons_are_given(self):
        call = Request("cpu", (0, 0), torch.float64, 8, (features.DROPOUT, features.ADDITIVE_MASK))
        assert len(dispatch.unmet(DECLARED, call)) == 5

    @pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
    def test_features_are_of_the_vocabulary(self, backend):
        assert set(backend.REQUIREMENTS.features) <= set(features.ALL)
        assert isinstance(backend.REQUIREMENTS, Requirements)


class TestSelection:
    def test_the_first_that_may(self):
        backends = Fake("a", supported=["no"]), Fake("b", default=["unproven"]), Fake("c"), Fake("d")
        assert dispatch.select(backends, CALL, None).NAME == "c"

    def test_a_named_one_need_not_be_a_default(self):
        backends = Fake("a", default=["unproven"]), Fake("b")
        assert dispatch.select(backends, CALL, "a").NAME == "a"

    def test_a_named_one_never_falls_back(self):
        backends = Fake("a", supported=["too wide", "too new"]), Fake("b")
        with pytest.raises(UnsupportedError, match="backend 'a' cannot serve this call: too wide; too new"):
            dispatch.select(backends, CALL, "a")

    def test_none_that_can(self):
        backends = Fake("a", supported=["too wide", "too new"]), Fake("b", supported=["too old"])
        with pytest.raises(UnsupportedError, match=r"no backend can .*a: too wide, too new; b: too old"):
            dispatch.select(backends, CALL, None)

    def test_none_that_may_be_a_default_says_so(self):
        with pytest.raises(UnsupportedError, match="unproven"):
            dispatch.select((Fake("a", default=["unproven"]),), CALL, None)

    def test_explanation(self):
        backends = Fake("a", default=["unproven"]), Fake("b"), Fake("c"), Fake("d", supported=["too wide", "too new"])
        explanation = dispatch.explain(backends, CALL, None)
        assert explanation.backend == "b"
        assert explanation.reasons == {"a": ["unproven"], "c": ["b comes first"], "d": ["too wide", "too new"]}
        assert str(explanation).splitlines() == [
            "backend: b",
            "  not a: unproven",
            "  not c: b comes first",
            "  not d: too wide; too new",
        ]

    def test_explanation_of_a_named_one(self):
        backends = Fake("a"), Fake("b", supported=["no"])
        assert dispatch.explain(backends, CALL, "a") == ("a", {"b": ["no"]})
        assert dispatch.explain(backends, CALL, "b") == (None, {"a": ["b was named"], "b": ["no"]})


class TestAttention:
    @pytest.mark.parametrize(
        "spec",
        [Spec(), Spec(dtype=torch.float64), Spec(mask="additive"), Spec(rope="pairs"), Spec(batch=1, lengths=(9, 12))],
        ids=str,
    )
    @pytest.mark.usefixtures("dynamo")
    @pytest.mark.parametrize("built", [False, True], ids=["pure Python", "native"])
    def test_the_default_on_a_cpu(self, spec, built, monkeypatch):
        """The native kernels where there are any and they serve the call, torch's own elsewhere."""
        if built and _runtime_native.faults():
            pytest.skip(_runtime_native.faults()[0])
        if not built:
            monkeypatch.setattr(_runtime_native, "faults", lambda: ["there are none"])
        dispatch._select_cached.cache_clear()
        served = built and spec.dtype != torch.float64 and spec.mask is None
        expected = "native" if served else "sdpa"
        options = make_options(spec)
        explanation = explain(*views(make_qkv(spec)), **options)
        assert explanation.backend == expected
        assert set(explanation.reasons) == set(NAMES) - {expected}
        assert all(explanation.reasons.values()), "a reason is missing"
        ran = []
        for backend in BACKENDS:
            forward = backend.forward
            monkeypatch.setattr(
                backend, "forward", lambda x, name=backend.NAME, forward=forward: ran.append(name) or forward(x)
            )
        register_attention(*views(make_qkv(spec)), **options)
        assert ran == [expected]
        dispatch._select_cached.cache_clear()

    @pytest.mark.parametrize("name", ["reference", "sdpa"])
    def test_the_named_one_runs(self, name, monkeypatch):
        for backend in BACKENDS:
            if name != backend.NAME:
                monkeypatch.setattr(backend, "forward", None)
        register_attention(*views(make_qkv(Spec())), backend=name)
        with pytest.raises(TypeError, match="NoneType"):
            register_attention(*views(make_qkv(Spec())), backend="reference" if name == "sdpa" else "sdpa")

    def test_every_named_backend_that_cannot_says_all_its_reasons(self):
        spec = Spec(head_dim=9, dtype=torch.float64, mask="additive")
        qkv, options = views(make_qkv(spec)), make_options(spec)
        for backend in (triton, xformers):
            reasons = explain(*qkv, **options, backend=backend.NAME).reasons[backend.NAME]
            assert len(reasons) >= 3
            with pytest.raises(UnsupportedError) as raised:
                register_attention(*qkv, **options, backend=backend.NAME)
            for reason in (repr(backend.NAME), *reasons):
                assert reason in str(raised.value)

    @pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
    def test_triton_is_no_default_where_it_was_not_measured(self, capability, monkeypatch):
        call = CALL._replace(capability=capability, length_bucket="272")
        monkeypatch.setattr(triton, "not_supported_reasons", lambda _: [])
        monkeypatch.setattr(tuning, "_TABLES", {})
        assert "has not been measured" in triton.not_default_reasons(call)[0]
        assert dispatch._select(BACKENDS, call, None).NAME == "sdpa"

    def test_the_default_on_a_gpu_is_what_its_file_shows_fastest(self, measured):
        backends = triton, sdpa
        call = CALL._replace(length_bucket="272")
        assert dispatch._select(backends, call, None).NAME == "triton"
        explanation = dispatch.explain(backends, call._replace(length_bucket="2048"), None)
        assert explanation.backend == "sdpa"
        assert "is no faster than sdpa" in explanation.reasons["triton"][0]
        for change in (
            {"capability": (8, 0)},
            {"dtype": torch.float32},
            {"head_dim": 65},
            {"length_bucket": "any"},
        ):
            unmeasured = dispatch.explain(backends, call._replace(**change), None)
            assert unmeasured.backend == "sdpa"
            assert "has not been measured on compute capability" in unmeasured.reasons["triton"][0]
        assert dispatch._select(backends, call._replace(length_bucket="2048"), "triton").NAME == "triton"

    def test_the_choice_by_length_can_be_traced(self, measured):
        """One graph a bucket: what the compiler sees of a GPU's call, without one."""

        def chosen(x):
            call = CALL._replace(dtype=x.dtype, head_dim=x.shape[1], length_bucket=tuning.length_bucket(x.shape[0]))
            return x + 1 if dispatch.select(BACKENDS, call, None) is triton else x - 1

        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(chosen, backend=counter, fullgraph=True)
        for tokens in (201, 261, 70, 1374, 1029):
            x = torch.zeros(tokens, 64, dtype=torch.float16)
            assert compiled(x)[0, 0] == (1 if tokens <= 272 else -1)
        assert counter.frame_count == 3  # 201 alone, then 65 to 272, then up to 2048

    def test_buckets_and_sizes(self):
        lengths = {1: "64", 64: "64", 65: "272", 272: "272", 273: "2048", 2048: "2048", 2049: "any"}
        assert {tokens: tuning.length_bucket(tokens) for tokens in lengths} == lengths
        assert tuning.size_key(torch.bfloat16, 33, "64") == tuning.size_key(torch.float16, 64, "64") == "16-bit,64,64"
        assert tuning.size_key(torch.float32, 65, "any") == "32-bit,128,any"

    def test_nothing_is_read_where_there_are_no_tables(self, tmp_path):
        assert tuning.read_tables(tmp_path / "absent") == {}

    def test_xformers_is_never_a_default(self):
        assert xformers.not_default_reasons(CALL)

    def test_the_request_describes_the_call(self):
        spec = Spec(head_dim=24, dtype=torch.float16, rope="pairs", mask="bool")

        def request(spec, **changes):
            arguments = {
                **dict.fromkeys(("attn_mask", "rope", "cu_seqlens", "max_seqlen")),
                "dropout_p": 0.0,
                **make_options(spec),
                **changes,
            }
            return features.request_of(validated(*views(make_qkv(spec)), **arguments))

        assert request(spec) == Request("cpu", (0, 0), torch.float16, 24, (features.BOOL_MASK, features.ROPE))
        assert request(spec).length_bucket == "any", "off a GPU no graph may hang on the length"
        assert request(Spec(mask="key_padding")).features == (features.KEY_PADDING_MASK,)
        assert request(Spec(mask="additive"), dropout_p=0.1).features == (features.ADDITIVE_MASK, features.DROPOUT)
        assert request(Spec(batch=1, lengths=(9, 12))).features == (features.PACKING,)
        mask = torch.zeros(21, 21, requires_grad=True)
        assert request(Spec(), attn_mask=mask).features == (features.ADDITIVE_MASK, features.MASK_GRADIENT)
        with torch.no_grad():
            assert request(Spec(), attn_mask=mask).features == (features.ADDITIVE_MASK,)
