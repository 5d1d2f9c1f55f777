"""Which backend a call takes: declarations, defaults, names, reasons."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from cases import Spec, make_options, make_qkv, views
from torch._dynamo.testing import CompileCounterWithBackend

from vitreg_kernels import UnsupportedError, explain, functional
from vitreg_kernels._native import library
from vitreg_kernels.dispatch import Backend, Request, Requirements, Workload, devices, preferences, tables
from vitreg_kernels.dispatch import rules as dispatch
from vitreg_kernels.dispatch.tables import Default, Key, Table
from vitreg_kernels.functional import register_attention
from vitreg_kernels.ops._shared import observers
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import BACKENDS
from vitreg_kernels.ops.attention.validation import validated
from vitreg_kernels.ops.catalogue import OPS

NAMES = [backend.name for backend in BACKENDS]
TRITON, SDPA, XFORMERS = (dispatch.find(BACKENDS, name) for name in ("triton", "sdpa", "xformers"))
ABLE = replace(TRITON, faults=list)  # as on a machine that has a GPU
DECLARED = Requirements(("cuda",), (torch.float16, torch.bfloat16), (16, 128), (features.ROPE,), (80, 2**31 - 1))
CALL = Request("attention", "cuda", 90, torch.float16, 64)
GPU = torch.device("cuda", 0)
SIZE = Workload(272, 128, gradients=False)
ROW = Key("attention", "sm_90", "float16", 64, 272, 128, False, "", ())


def a_table(name, **backends):
    """A table with rows for calls of so many tokens: ``_272="triton"``."""
    rows = {ROW._replace(tokens=int(tokens[1:])): Default(who, "2026-12-01") for tokens, who in backends.items()}
    return Table.of(name, rows)


@pytest.fixture
def measured(monkeypatch, dynamo):
    """The shipped table of a GPU says that triton is the fastest up to 272 tokens and sdpa up to 2048."""
    shipped = a_table("the shipped table", _272="triton", _2048="sdpa")
    monkeypatch.setattr(preferences, "TABLES", (shipped,))
    dispatch.select_cached.cache_clear()


def fake(name, supported=(), default="yes"):
    """A backend with the reasons given."""
    return Backend(
        name=name,
        requirements=Requirements(("cuda",), (torch.float16,)),
        forward=lambda inputs: None,
        default=default,
        refuses=lambda request: list(supported),
    )


class TestDeclarations:
    def test_a_call_within_them(self):
        assert dispatch.unmet(DECLARED, CALL) == []

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"device": "cpu", "capability": 0}, "runs on cuda, not on cpu"),
            ({"capability": 75}, "runs on sm_80 and newer, not on sm_75"),
            ({"dtype": torch.float64}, "takes float16 or bfloat16, not float64"),
            ({"head_dim": 15}, "takes head dims 16 to 128, not 15"),
            ({"head_dim": 129}, "takes head dims 16 to 128, not 129"),
            ({"features": (features.ROPE, features.DROPOUT)}, "does not support dropout"),
        ],
    )
    def test_each_has_its_reason(self, changes, reason):
        assert dispatch.unmet(DECLARED, CALL._replace(**changes)) == [reason]

    def test_a_range_of_capabilities(self):
        """ "sm_90 and nothing else" can be said, and what reaches no further than sm_89."""
        only = DECLARED._replace(capabilities=(90, 90))
        assert dispatch.unmet(only, CALL) == []
        for capability in (80, 89, 100, 120):
            (reason,) = dispatch.unmet(only, CALL._replace(capability=capability))
            assert reason == f"runs on sm_90, not on sm_{capability}"
        until = DECLARED._replace(capabilities=(80, 89))
        assert dispatch.unmet(until, CALL) == ["runs on sm_80 to sm_89, not on sm_90"]

    def test_channels_of_an_op_that_takes_whole_tokens(self):
        needs = Requirements(("cuda",), (torch.float16,), channels=(1, 4096))
        call = Request("residual_norm", "cuda", 90, torch.float16, channels=4096)
        assert dispatch.unmet(needs, call) == []
        assert dispatch.unmet(needs, call._replace(channels=4097)) == ["takes channel counts 1 to 4096, not 4097"]
        assert dispatch.unmet(needs, CALL) == [], "a call without channels is not asked for them"

    def test_all_reasons_are_given(self):
        call = Request("attention", "cpu", 0, torch.float64, 8, None, (features.DROPOUT, features.ADDITIVE_MASK))
        assert len(dispatch.unmet(DECLARED, call)) == 5

    @pytest.mark.parametrize("backend", BACKENDS, ids=NAMES)
    def test_features_are_of_the_vocabulary(self, backend):
        assert set(backend.requirements.features) <= {*features.ALL, *observers.ALL}
        assert set(backend.requirements.features_if_named) <= set(backend.requirements.features)
        assert isinstance(backend.requirements, Requirements)


class TestSelection:
    def test_the_first_that_may(self):
        backends = fake("a", ["no"]), fake("b", default="if measured"), fake("c"), fake("d")
        assert dispatch.select(backends, CALL, None).name == "c"

    @pytest.mark.parametrize("default", ["if measured", "never"])
    def test_a_named_one_need_not_be_a_default(self, default):
        backends = fake("a", default=default), fake("b")
        assert dispatch.select(backends, CALL, "a").name == "a"

    def test_a_named_one_never_falls_back(self):
        backends = fake("a", ["too wide", "too new"]), fake("b")
        with pytest.raises(UnsupportedError, match="backend 'a' cannot serve this call: too wide; too new"):
            dispatch.select(backends, CALL, "a")

    def test_none_that_can(self):
        backends = fake("a", ["too wide", "too new"]), fake("b", ["too old"])
        with pytest.raises(UnsupportedError, match=r"no backend can .*a: too wide, too new; b: too old"):
            dispatch.select(backends, CALL, None)

    def test_none_that_may_be_a_default_says_so(self):
        backends = fake("a", default="if measured"), fake("b", default="never")
        with pytest.raises(UnsupportedError, match=r"a: has not been measured on sm_90 .*; b: is never the default"):
            dispatch.select(backends, CALL, None)

    def test_faults_are_asked_of_what_runs_on_the_device(self):
        broken = replace(fake("a"), faults=lambda: ["broken"])
        assert broken.reasons_against(CALL) == ["broken"]
        assert broken.reasons_against(CALL._replace(device="cpu")) == ["runs on cuda, not on cpu"]

    def test_a_feature_that_a_backend_serves_only_if_it_is_named(self):
        """Whoever names it gets it, and nobody else."""
        serves = DECLARED._replace(features_if_named=(features.ROPE,))
        backends = replace(fake("a"), requirements=serves), replace(fake("b"), requirements=DECLARED)
        turned = CALL._replace(features=(features.ROPE,))
        assert [dispatch.select(backends, call, None).name for call in (CALL, turned)] == ["a", "b"]
        assert dispatch.select(backends, turned, "a").name == "a"
        assert dispatch.explain(backends, turned, None).reasons == {"a": ["serves rope only if it is named"]}
        with pytest.raises(UnsupportedError, match="a: serves rope only if it is named"):
            dispatch.select(backends[:1], turned, None)

    def test_one_that_the_user_switched_off_is_taken_by_its_name_alone(self):
        """At any time, and whoever has been found for such a call before."""
        off = []
        backends = replace(fake("a"), switched_off=lambda: "".join(off)), fake("b")
        assert dispatch.select(backends, CALL, None).name == "a"
        off.append("is off")
        assert dispatch.select(backends, CALL, None).name == "b"
        assert dispatch.select(backends, CALL, "a").name == "a"
        assert dispatch.explain(backends, CALL, None).reasons == {"a": ["is off"]}
        assert dispatch.explain(backends, CALL, "b").reasons == {"a": ["b was named"]}
        with pytest.raises(UnsupportedError, match="no backend can serve this call"):
            dispatch.select(backends[:1], CALL, None)
        off.clear()
        assert dispatch.select(backends, CALL, None).name == "a"

    def test_who_cannot_be_the_default_is_not_asked(self):
        """The question may load a library, and a call that names no backend is to pay for none."""
        asked = []
        unmeasured = replace(fake("a", default="if measured"), refuses=lambda request: asked.append(request) or [])
        assert dispatch.select((unmeasured, fake("b")), CALL, None).name == "b"
        assert not asked
        assert dispatch.select((unmeasured, fake("b")), CALL, "a").name == "a"
        assert asked == [CALL]

    def test_explanation(self):
        backends = fake("a", default="if measured"), fake("b"), fake("c"), fake("d", ["too wide", "too new"])
        explanation = dispatch.explain(backends, CALL, None)
        assert explanation.backend == "b"
        unmeasured = "has not been measured on sm_90 for such a call yet; name it to use it"
        assert explanation.reasons == {"a": [unmeasured], "c": ["b comes first"], "d": ["too wide", "too new"]}
        assert str(explanation).splitlines() == [
            "backend: b, by the declared order",
            f"  not a: {unmeasured}",
            "  not c: b comes first",
            "  not d: too wide; too new",
        ]

    def test_explanation_of_a_named_one(self):
        backends = fake("a"), fake("b", ["no"])
        assert dispatch.explain(backends, CALL, "a") == ("a", {"b": ["no"]}, "its name")
        assert dispatch.explain(backends, CALL, "b") == (None, {"a": ["b was named"], "b": ["no"]}, "its name")


class TestMeasurements:
    """What the tables say goes before the declared order."""

    BACKENDS = fake("a", default="if measured"), fake("b"), fake("c"), fake("d", default="never")

    def chosen(self, tokens=272, backends=BACKENDS, **changes):
        call = CALL._replace(workload=SIZE._replace(tokens=tokens), **changes)
        return dispatch.explain(backends, call, None)

    def test_any_backend_can_be_named_by_a_row(self, monkeypatch):
        for name in "abc":
            monkeypatch.setattr(preferences, "TABLES", (a_table("a table", _272=name),))
            dispatch.select_cached.cache_clear()
            assert self.chosen().backend == name
            assert self.chosen().decided_by == "a table, measured 2026-12-01"
            for other in set("abc") - {name}:
                (reason,) = self.chosen().reasons[other]
                assert reason.startswith(f"a table names {name} for such a call")

    def test_the_first_table_with_a_row_decides(self, monkeypatch):
        tables = a_table("yours", _272="a"), a_table("shipped", _272="c", _2048="c")
        monkeypatch.setattr(preferences, "TABLES", tables)
        dispatch.select_cached.cache_clear()
        assert (self.chosen().backend, self.chosen().decided_by) == ("a", "yours, measured 2026-12-01")
        assert (self.chosen(2048).backend, self.chosen(2048).decided_by) == ("c", "shipped, measured 2026-12-01")
        assert (self.chosen(64).backend, self.chosen(64).decided_by) == ("b", "the declared order")

    @pytest.mark.parametrize(
        "change",
        [
            {"op": "residual_norm"},
            {"capability": 80},
            {"dtype": torch.float32},
            {"head_dim": 63},
            {"features": (features.ROPE,)},
            {"dtype": torch.bfloat16},
            {"workload": SIZE._replace(heads=512)},
            {"workload": SIZE._replace(tokens=2048)},
            {"workload": SIZE._replace(gradients=True)},
            {"workload": SIZE._replace(variant="packed projection")},
            {"workload": None},
        ],
        ids=str,
    )
    def test_a_row_decides_for_nothing_else(self, change, monkeypatch):
        monkeypatch.setattr(preferences, "TABLES", (a_table("a table", _272="c"),))
        call = CALL._replace(workload=SIZE)
        assert preferences.measured(call) == ("c", "2026-12-01", "a table")
        assert preferences.measured(call._replace(**change)) is None

    @pytest.mark.parametrize("name", ["d", "gone"])
    def test_a_row_that_names_what_cannot_be_is_passed_over(self, name, monkeypatch):
        monkeypatch.setattr(preferences, "TABLES", (a_table("a table", _272=name),))
        dispatch.select_cached.cache_clear()
        assert (self.chosen().backend, self.chosen().decided_by) == ("b", "the declared order")

    def test_what_cannot_serve_the_call_is_passed_over_with_its_reason(self, monkeypatch):
        backends = fake("a", ["too new"], default="if measured"), fake("b")
        monkeypatch.setattr(preferences, "TABLES", (a_table("a table", _272="a"),))
        explanation = self.chosen(backends=backends)
        assert explanation == ("b", {"a": ["too new"]}, "the declared order")
        others = (*backends, fake("c", default="if measured"))
        (reason,) = self.chosen(backends=others).reasons["c"]
        assert reason == "a table names a for such a call, which cannot serve it here; name this one to use it"

    def test_a_named_backend_needs_no_row(self, monkeypatch):
        monkeypatch.setattr(preferences, "TABLES", (a_table("a table", _272="c"),))
        assert dispatch.select(self.BACKENDS, CALL._replace(workload=SIZE), "d").name == "d"

    def test_sizes_are_told_apart_where_there_are_rows_only(self, monkeypatch):
        """Elsewhere a graph that is compiled for any size stays so."""

        def workload(call=CALL, tokens=201, heads=100, device=GPU):
            return preferences.workload(call, device, tokens, heads, (torch.zeros(1),))

        assert workload() is None
        monkeypatch.setattr(preferences, "TABLES", (a_table("a table", _272="c"),))
        assert workload() == (272, 128, False, "", "")
        for change in ({"op": "residual_norm"}, {"capability": 80}, {"dtype": torch.float32}, {"head_dim": 80}):
            assert workload(CALL._replace(**change)) is None
        assert [workload(tokens=n) is None for n in (64, 65, 272, 273)] == [True, False, False, True]
        assert [workload(heads=n) is None for n in (32, 33, 128, 129)] == [True, False, False, True]
        assert workload(CALL._replace(device="cpu", capability=0), device=torch.device("cpu")) is None

    def test_calls_with_gradients_are_told_from_those_without(self, monkeypatch):
        monkeypatch.setattr(preferences, "TABLES", (a_table("a table", _272="c"),))

        def gradients(*inputs):
            return preferences.workload(CALL, GPU, 201, 100, inputs).gradients

        plain, wanted = torch.zeros(1), torch.zeros(1, requires_grad=True)
        assert gradients(None, plain, wanted)
        assert not gradients(None, plain)
        with torch.no_grad():
            assert not gradients(wanted)

    def test_a_cpu_can_have_rows(self, monkeypatch):
        """SDPA of a CPU too, by the instruction set that runs there."""
        device = devices.kind("cpu", 0)
        assert device == (f"cpu_{library.isa()}" if library.isa() else "cpu")
        key = Key("attention", device, "float32", 16, 64, 32, False, "separate", ())
        monkeypatch.setattr(preferences, "TABLES", (Table.of("mine", {key: Default("sdpa", "2026-12-01")}),))
        query = views(make_qkv(Spec()))[0]
        explanation = explain(query)
        assert (explanation.backend, explanation.decided_by) == ("sdpa", "mine, measured 2026-12-01")
        assert explain(query.double()).decided_by == "the declared order"

    @pytest.mark.parametrize("op", [op for op in OPS if op != "attention"])
    def test_every_op_has_rows(self, op, monkeypatch, change_backends):
        """What is measured of norms, token norms and assembly can be adopted too."""
        x = torch.randn(2, 9, 16)
        calls = {
            "residual_norm": partial(functional.residual_layer_norm, x, weight=torch.ones(16)),
            "token_norms": partial(functional.token_norms, x),
            "assemble": partial(functional.assemble_tokens, x),
        }
        variant = "LayerNorm to float32" if op == "residual_norm" else ""
        key = Key(op, devices.kind("cpu", 0), "float32", 16, 64, 32, False, variant, ())
        ran = []
        for name in ("reference", "composite"):
            monkeypatch.setattr(preferences, "TABLES", (Table.of("a table", {key: Default(name, "2026-12-01")}),))
            forward = dispatch.find(OPS[op].backends, name).forward
            change_backends(name, op=op, forward=lambda x, n=name, f=forward: ran.append(n) or f(x))
            calls[op]()
        assert ran == ["reference", "composite"]


class TestTables:
    def test_a_file_holds_what_was_put_in(self, tmp_path):
        rows = {ROW: Default("triton", "2026-12-01"), ROW._replace(features=("rope",)): Default("sdpa", "2026-12-02")}
        other = {ROW._replace(device="cpu_amx"): Default("cpu", "2026-12-03")}
        assert {path.name for path in tables.adopt(tmp_path, rows | other)} == {"sm_90.json", "cpu_amx.json"}
        assert tables.defaults(tables.read(tmp_path, "defaults")) == rows | other

    def test_a_new_row_takes_the_place_of_one_alike(self, tmp_path):
        tables.adopt(
            tmp_path, {ROW: Default("sdpa", "2026-12-01"), ROW._replace(heads=0): Default("sdpa", "2026-12-01")}
        )
        tables.merge(tmp_path, "sm_90", "others", [{"a": 1}], ["a"])
        tables.adopt(tmp_path, {ROW: Default("triton", "2026-12-02")})
        found = tables.defaults(tables.read(tmp_path, "defaults"))
        assert found[ROW] == Default("triton", "2026-12-02")
        assert found[ROW._replace(heads=0)] == Default("sdpa", "2026-12-01")
        assert tables.read(tmp_path, "others") == {"sm_90": [{"a": 1}]}

    def test_buckets(self):
        tokens = {1: 64, 64: 64, 65: 272, 272: 272, 273: 2048, 2048: 2048, 2049: 0}
        assert {n: tables.token_bucket(n) for n in tokens} == tokens
        heads = {1: 32, 32: 32, 33: 128, 128: 128, 129: 512, 512: 512, 513: 0}
        assert {n: tables.size_of(1, n).heads for n in heads} == heads

    def test_a_file_that_is_no_table_is_named(self, tmp_path):
        (tmp_path / "sm_90.json").write_text("{")
        with pytest.raises(ValueError, match=r"sm_90.json is no table of measurements \(.*\); mend it or move it away"):
            tables.read(tmp_path, "defaults")

    def test_nothing_is_read_where_there_are_no_tables(self, tmp_path):
        assert tables.read(tmp_path / "absent", "defaults") == {}


class TestAttention:
    @pytest.mark.parametrize(
        "spec",
        [Spec(), Spec(dtype=torch.float64), Spec(mask="additive"), Spec(rope="pairs"), Spec(batch=1, lengths=(9, 12))],
        ids=str,
    )
    @pytest.mark.usefixtures("dynamo")
    @pytest.mark.parametrize("built", [False, True], ids=["pure Python", "cpu"])
    def test_the_default_on_a_cpu(self, spec, built, change_backends):
        """The C++ kernels where there are any and they serve the call, torch's own elsewhere."""
        if built and library.faults():
            pytest.skip(library.faults()[0])
        if not built:
            change_backends("cpu", faults=lambda: ["there are none"])
        served = built and spec.dtype != torch.float64 and spec.mask is None
        expected = "cpu" if served else "sdpa"
        options = make_options(spec)
        explanation = explain(*views(make_qkv(spec)), **options)
        assert explanation.backend == expected
        assert set(explanation.reasons) == set(NAMES) - {expected}
        assert all(explanation.reasons.values()), "a reason is missing"
        ran = []
        for backend in BACKENDS:
            run = backend.forward
            change_backends(
                backend.name, op="attention", forward=lambda x, n=backend.name, f=run: ran.append(n) or f(x)
            )
        register_attention(*views(make_qkv(spec)), **options)
        assert ran == [expected]

    @pytest.mark.parametrize("name", ["reference", "sdpa"])
    def test_the_named_one_runs(self, name, change_backends):
        for backend in BACKENDS:
            if name != backend.name:
                change_backends(backend.name, op="attention", forward=None)
        register_attention(*views(make_qkv(Spec())), backend=name)
        with pytest.raises(TypeError, match="NoneType"):
            register_attention(*views(make_qkv(Spec())), backend="reference" if name == "sdpa" else "sdpa")

    def test_every_named_backend_that_cannot_says_all_its_reasons(self):
        spec = Spec(head_dim=9, dtype=torch.float64, mask="additive")
        qkv, options = views(make_qkv(spec)), make_options(spec)
        for backend in (TRITON, XFORMERS):
            reasons = explain(*qkv, **options, backend=backend.name).reasons[backend.name]
            assert len(reasons) >= 3
            with pytest.raises(UnsupportedError) as raised:
                register_attention(*qkv, **options, backend=backend.name)
            for reason in (repr(backend.name), *reasons):
                assert reason in str(raised.value)

    @pytest.mark.parametrize("capability", [80, 90, 100])
    def test_triton_is_no_default_where_it_was_not_measured(self, capability):
        call = CALL._replace(capability=capability, workload=SIZE)
        explanation = dispatch.explain((ABLE, SDPA), call, None)
        assert explanation.backend == "sdpa"
        assert f"has not been measured on sm_{capability}" in explanation.reasons["triton"][0]

    def test_the_default_on_a_gpu_is_what_its_table_shows_fastest(self, measured):
        backends = ABLE, SDPA
        call = CALL._replace(workload=SIZE)
        assert dispatch.select(backends, call, None).name == "triton"
        longer = call._replace(workload=SIZE._replace(tokens=2048))
        explanation = dispatch.explain(backends, longer, None)
        assert explanation.backend == "sdpa"
        assert "the shipped table names sdpa for such a call" in explanation.reasons["triton"][0]
        other = SIZE._replace(tokens=0)
        for change in ({"capability": 80}, {"dtype": torch.float32}, {"head_dim": 65}, {"workload": other}):
            unmeasured = dispatch.explain(backends, call._replace(**change), None)
            assert unmeasured.backend == "sdpa"
            assert "has not been measured on sm_" in unmeasured.reasons["triton"][0]
        assert dispatch.select(backends, longer, "triton").name == "triton"

    def test_the_choice_by_size_can_be_traced(self, measured):
        """One graph a bucket: what the compiler sees of a GPU's call, without one."""
        backends = ABLE, SDPA

        def chosen(x):
            call = CALL._replace(dtype=x.dtype, head_dim=x.shape[1])
            call = call._replace(workload=preferences.workload(call, GPU, x.shape[0], x.shape[2], (x,)))
            return x + 1 if dispatch.select(backends, call, None) is ABLE else x - 1

        counter = CompileCounterWithBackend("eager")
        compiled = torch.compile(chosen, backend=counter, fullgraph=True)
        for tokens in (201, 261, 70, 1374, 1029):
            x = torch.zeros(tokens, 64, 100, dtype=torch.float16)
            assert compiled(x)[0, 0, 0] == (1 if tokens <= 272 else -1)
        assert counter.frame_count == 3  # 201 alone, then 65 to 272, then up to 2048

    @pytest.mark.parametrize("backend", [TRITON, XFORMERS], ids=lambda b: b.name)
    def test_what_was_not_measured_is_no_default(self, backend):
        assert backend.default == "if measured"

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

        assert request(spec) == Request(
            "attention", "cpu", 0, torch.float16, 24, None, (features.BOOL_MASK, features.ROPE)
        )
        assert request(spec).workload is None, "without rows no graph may hang on the size"
        assert request(Spec(mask="key_padding")).features == (features.KEY_PADDING_MASK,)
        assert request(Spec(mask="additive"), dropout_p=0.1).features == (features.ADDITIVE_MASK, features.DROPOUT)
        assert request(Spec(batch=1, lengths=(9, 12))).features == (features.PACKING,)
        mask = torch.zeros(21, 21, requires_grad=True)
        assert request(Spec(), attn_mask=mask).features == (features.ADDITIVE_MASK, features.MASK_GRADIENT)
        with torch.no_grad():
            assert request(Spec(), attn_mask=mask).features == (features.ADDITIVE_MASK,)
