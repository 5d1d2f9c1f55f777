"""The user's file of measurements: who may read it, what counts of it, and that nothing breaks it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from calibration_cases import ONE, X
from torch._dynamo.testing import CompileCounterWithBackend

from vitreg_kernels import dispatch, explain
from vitreg_kernels.dispatch import calibration, devices, preferences
from vitreg_kernels.dispatch.calibration import Measurement
from vitreg_kernels.functional import register_attention, register_attention_qkv

CPU = devices.kind("cpu", 0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A cache of the user's own, and the choice as before at the end."""
    monkeypatch.delenv("VITREG_CALIBRATION")
    monkeypatch.setenv("VITREG_CACHE_DIR", str(tmp_path / "cache"))
    dispatch.read_calibration()
    yield tmp_path / "cache" / "calibration.json"
    monkeypatch.undo()
    dispatch.read_calibration()


def chosen(x: torch.Tensor = X) -> str | None:
    return explain(x).backend


def recorded(*measurements: Measurement) -> None:
    calibration.record(measurements)
    dispatch.read_calibration()


class TestWhereItIs:
    def test_the_cache_named(self, cache):
        assert calibration.path() == cache

    def test_the_user_s_cache(self, monkeypatch):
        monkeypatch.delenv("VITREG_CALIBRATION")
        monkeypatch.delenv("VITREG_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", "/x")
        assert calibration.path() == Path("/x/vitreg_kernels/calibration.json")
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert calibration.path() == Path.home() / ".cache/vitreg_kernels/calibration.json"

    def test_a_file_named(self, cache, tmp_path, monkeypatch):
        """All ranks of a cluster can be given one file."""
        recorded(ONE)
        assert chosen() == "reference"
        os.rename(cache, tmp_path / "ours.json")
        dispatch.read_calibration()
        assert chosen() != "reference"
        monkeypatch.setenv("VITREG_CALIBRATION", str(tmp_path / "ours.json"))
        dispatch.read_calibration()
        assert chosen() == "reference"
        monkeypatch.setenv("VITREG_CALIBRATION", "0")
        dispatch.read_calibration()
        assert chosen() != "reference"
        with pytest.raises(ValueError, match="VITREG_CALIBRATION=0 turns calibration off"):
            calibration.record([ONE])

    def test_a_file_named_that_is_not_there(self, cache, monkeypatch):
        monkeypatch.setenv("VITREG_CALIBRATION", "/nowhere.json")
        dispatch.read_calibration()
        assert (
            explain(X).decided_by == "the declared order (VITREG_CALIBRATION names /nowhere.json, which is not there)"
        )


class TestWhatCounts:
    def test_a_measurement_decides_for_calls_like_it(self, cache):
        before = chosen()
        assert before != "reference"
        recorded(ONE)
        explanation = explain(X)
        assert (explanation.backend, explanation.decided_by) == ("reference", "your calibration, measured 2026-11-30")
        assert explain(X, outputs=("lse",)).backend != "reference"
        for other in (X.double(), X[..., :8], X.repeat(1, 9, 1, 1), X.repeat(1, 1, 4, 1), X.clone().requires_grad_()):
            assert chosen(other) != "reference"
        with torch.no_grad():
            assert chosen(X.clone().requires_grad_()) == "reference"

    def test_a_packed_projection_with_gradients_is_a_call_with_gradients(self, cache, change_backends):
        recorded(ONE._replace(gradients=True, variant="packed projection"))
        ran = []
        forward = dispatch.find(preferences_of("attention"), "reference").forward
        change_backends("reference", op="attention", forward=lambda x: ran.append(1) or forward(x))
        qkv = torch.randn(2, 21, 3, 3, 16)
        register_attention_qkv(qkv)
        assert not ran
        register_attention_qkv(qkv.requires_grad_())
        assert ran

    def test_what_was_wrong_is_no_default(self, cache):
        before = chosen()
        recorded(ONE._replace(backend=None, wrong={before: "output has max error 1"}))
        explanation = explain(X)
        assert explanation.backend not in (None, before)
        assert explanation.reasons[before] == ["was wrong on this machine by your calibration: output has max error 1"]
        assert explain(X, backend=before).backend == before, "whoever names it gets it"

    def test_the_wrong_one_is_never_the_winner(self, cache):
        recorded(ONE, ONE._replace(tokens=20, backend=None, wrong={"reference": "late"}))
        assert chosen() != "reference"

    def test_two_calls_of_a_bucket_must_agree(self, cache):
        recorded(ONE, ONE._replace(tokens=20))
        assert chosen() == "reference"
        recorded(ONE._replace(tokens=20, backend="sdpa"))
        assert explain(X).decided_by == (
            "the declared order (your calibration found different backends fastest for calls like this: "
            "reference at 21 tokens and 6 heads, sdpa at 20 tokens and 6 heads)"
        )

    @pytest.mark.parametrize(("ms", "agrees"), [(2.05, True), (2.5, False)])
    def test_one_that_nobody_won_clearly_agrees_with_whom_it_found_no_slower(self, cache, ms, agrees):
        recorded(ONE, ONE._replace(tokens=20, backend=None, times_ms={"reference": ms, "sdpa": 2.0}))
        assert (chosen() == "reference") is agrees
        if not agrees:
            assert "found reference fastest for calls like this, but not at 20 tokens" in explain(X).decided_by

    def test_one_without_times_says_nothing_of_who_is_slow(self, cache):
        """Such as one whose times could not be trusted, and that is kept for what was wrong in it."""
        recorded(ONE, ONE._replace(tokens=20, backend=None, wrong={"sdpa_math": "late"}, times_ms={}))
        assert chosen() == "reference"

    def test_a_single_token_is_decided_by_no_measurement(self, cache):
        """Not every kernel takes one, and whoever was measured had more."""
        recorded(ONE)
        assert chosen(X[:, :, :2]) == "reference"
        assert explain(X[:, :, :1]).decided_by == "the declared order"

    def test_a_new_measurement_takes_the_place_of_the_old(self, cache):
        recorded(ONE)
        recorded(ONE._replace(backend="sdpa", times_ms={"sdpa": 1.0}, date="2026-12-01"))
        assert explain(X).decided_by == "your calibration, measured 2026-12-01"
        assert len(calibration.read().measurements) == 1

    @pytest.mark.parametrize(
        ("name", "value", "said"),
        [
            ("torch", "1.0", "torch 1.0, and this is"),
            ("threads", "99", "threads 99, and this is"),
            ("processor", "another", "processor another, and this is"),
            ("kernels", "0", "other kernels than this package's"),
        ],
    )
    def test_what_was_measured_elsewhere_does_not(self, cache, name, value, said):
        recorded(ONE)
        contents = json.loads(cache.read_text())
        contents["entries"][0]["machine"][name] = value
        cache.write_text(json.dumps(contents))
        dispatch.read_calibration()
        explanation = explain(X)
        assert explanation.backend != "reference"
        assert f"1 of the 1 measurements in {cache} are of {said}" in explanation.decided_by
        recorded(ONE)
        assert chosen() == "reference"
        assert len(json.loads(cache.read_text())["entries"]) == 2, "the other machine's is kept"

    @pytest.mark.parametrize(
        "text",
        ["{", "[]", '{"format": 99}', '{"format": 1, "entries": [{}]}', "\0", "[" * 100_000],
        ids=lambda t: t[:9],
    )
    def test_a_broken_file_is_told_and_ignored(self, cache, text):
        before = chosen()
        cache.parent.mkdir(exist_ok=True)
        cache.write_text(text)
        with pytest.warns(UserWarning, match="your calibration does not count: .*cannot be read"):
            dispatch.read_calibration()
        assert chosen() == before
        assert "cannot be read" in explain(X).decided_by
        recorded(ONE)
        assert chosen() == "reference"

    @pytest.mark.parametrize("what", ["a folder", "a pipe", "too large", "no home", "warnings are errors"])
    def test_nothing_keeps_the_library_from_being_imported(self, cache, monkeypatch, what):
        cache.parent.mkdir(exist_ok=True)
        if what == "a folder":
            cache.mkdir()
        elif what == "a pipe":
            os.mkfifo(cache)
        elif what == "too large":
            cache.write_text(" " * (calibration._LARGEST + 1))
        elif what == "no home":
            monkeypatch.setenv("VITREG_CACHE_DIR", "~nosuchuser")
        else:
            cache.write_text("{")
        with warnings.catch_warnings(record=what != "warnings are errors"):
            warnings.simplefilter("error" if what == "warnings are errors" else "always")
            assert "cannot be read" in calibration.table().ignored
        monkeypatch.setenv("VITREG_CACHE_DIR", str(cache.parent / "elsewhere"))

    def test_what_was_measured_again_is_not_told_of(self, cache):
        """After an update nobody hears for ever of what was measured before it."""
        recorded(ONE)
        contents = json.loads(cache.read_text())
        contents["entries"][0]["machine"]["torch"] = "1.0"
        cache.write_text(json.dumps(contents))
        assert calibration.read().ignored
        recorded(ONE)
        assert not calibration.read().ignored

    @pytest.mark.parametrize(
        ("told", "version"),
        [
            ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.124.06  Wed Feb", "570.124.06"),
            ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  550.54.15  Release Build", "550.54.15"),
        ],
    )
    def test_the_driver_s_version(self, told, version):
        assert calibration._DRIVER.search(told).group(1) == version

    @pytest.mark.parametrize(
        "change", [{"tokens": "x"}, {"features": 1}, {"wrong": 3}, {"errors": {"a": 1}}, {"machine": 1}], ids=str
    )
    def test_an_entry_that_is_not_as_it_should_be(self, cache, change):
        recorded(ONE)
        contents = json.loads(cache.read_text())
        contents["entries"][0].update(change)
        cache.write_text(json.dumps(contents))
        with pytest.warns(UserWarning, match="an entry is not as it should be"):
            dispatch.read_calibration()
        assert chosen() != "reference"

    def test_a_measurement_of_one_gpu_is_not_of_another(self, cache, monkeypatch):
        """By its own name, of which a part of a GPU has another; a GPU is asked when a call comes to it."""
        of = {0: ("NVIDIA H200", 132), 1: ("NVIDIA H200 MIG 1g.18gb", 16)}
        asked = []

        def properties(device):
            asked.append(device.index)
            name, count = of[device.index]
            return SimpleNamespace(name=name, multi_processor_count=count)

        monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
        devices._gpu.cache_clear()
        key = "NVIDIA H200, 132 multiprocessors"
        recorded(
            ONE._replace(
                device=key,
                dtype="bfloat16",
                width=64,
                tokens=261,
                heads=1024,
                backend="triton",
                times_ms={"triton": 1.0},
            )
        )
        assert not asked, "no GPU is touched before it is used"

        def row(index: int):
            device = torch.device("cuda", index)
            request = dispatch.Request("attention", "cuda", 90, torch.bfloat16, 64)
            workload = preferences.workload(request, device, 261, 1024, ())
            return workload and preferences.measured(request._replace(workload=workload._replace(variant="separate")))

        assert row(0) == ("triton", "2026-11-30", "your calibration")
        assert row(1) is None
        devices._gpu.cache_clear()


class TestWriting:
    def test_two_processes_at_once(self, cache):
        """Neither loses what the other writes."""
        code = (
            "import sys; from vitreg_kernels.dispatch.calibration import Measurement, record\n"
            f"one = Measurement(**{ONE._asdict()!r})\n"
            "for i in range(12): record([one._replace(tokens=int(sys.argv[1]) + i)])\n"
        )
        running = [subprocess.Popen([sys.executable, "-c", code, start], env=os.environ) for start in ("1", "101")]
        assert [process.wait() for process in running] == [0, 0]
        found = {one.tokens for one in calibration.read().measurements}
        assert found == {*range(1, 13), *range(101, 113)}

    def test_a_folder_that_cannot_be_written(self, cache, monkeypatch):
        cache.parent.write_text("a file where the folder would be")
        with pytest.raises(OSError, match=re.escape(str(cache.parent))):
            calibration.check_writable()

    def test_a_cut_leaves_the_old_file(self, cache, monkeypatch):
        recorded(ONE)
        monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            calibration.record([ONE._replace(backend="sdpa")])
        assert calibration.read().measurements == (ONE,)
        assert {path.name for path in cache.parent.iterdir()} == {cache.name, cache.name + ".lock"}

    def test_clearing(self, cache):
        assert calibration.clear() is None
        recorded(ONE)
        assert calibration.clear() == cache
        dispatch.read_calibration()
        assert chosen() != "reference"


def test_the_compiler_takes_what_was_calibrated(cache, dynamo, change_backends):
    """In one graph, with its size as a guard."""
    recorded(ONE, ONE._replace(gradients=True, backend="sdpa", times_ms={"sdpa": 1.0}))
    ran = []
    for name in ("reference", "sdpa"):
        forward = dispatch.find(preferences_of("attention"), name).forward
        change_backends(name, op="attention", forward=lambda x, n=name, f=forward: ran.append(n) or f(x))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: register_attention(x, x, x), backend=counter, fullgraph=True)
    torch.testing.assert_close(compiled(X), register_attention(X, X, X))
    with_gradients = X.clone().requires_grad_()
    compiled(with_gradients).sum().backward()
    assert counter.frame_count == 2
    assert set(ran) == {"reference", "sdpa"}


def test_graphs_of_any_size_stay_few(cache, dynamo):
    """A size is told from others only where a measurement may decide for it."""
    recorded(ONE._replace(tokens=100))
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x: register_attention(x, x, x), backend=counter, fullgraph=True, dynamic=True)
    for tokens in (9, 21, 40, 100, 200, 300, 500):
        compiled(torch.randn(2, 3, tokens, 16))
    assert counter.frame_count <= 3
    other = torch.compile(lambda x: register_attention(x, x, x), backend=counter, fullgraph=True, dynamic=True)
    before = counter.frame_count
    for tokens in (21, 100, 300):
        other(torch.randn(2, 3, tokens, 8))  # of a head dim that was not measured
    assert counter.frame_count == before + 1


@pytest.mark.parametrize("strict", [False, True])
def test_a_program_is_exported_for_other_machines_too(cache, strict):
    recorded(ONE, ONE._replace(tokens=100))

    class Attend(torch.nn.Module):
        def forward(self, x):
            return register_attention(x, x, x)

    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(Attend(), (X,), dynamic_shapes=({2: tokens},), strict=strict).module()
    for count in (9, 500):
        x = torch.randn(2, 3, count, 16)
        torch.testing.assert_close(program(x), register_attention(x, x, x), atol=1e-5, rtol=1e-5)


def test_a_new_process_reads_it(cache):
    recorded(ONE)
    code = "import torch, vitreg_kernels; print(vitreg_kernels.explain(torch.zeros(2, 3, 21, 16)).decided_by)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert done.stdout.strip() == "your calibration, measured 2026-11-30"


class TestSuggestion:
    """On a GPU that was never calibrated one line says that it can be."""

    REQUEST = dispatch.Request("attention", "cuda", 90, torch.float16, 64)

    def backends(self):
        needs = dispatch.Requirements(("cuda",), (torch.float16,))
        ours = dispatch.Backend(name="a", requirements=needs, forward=print, default="if measured")
        return ours, dispatch.Backend(name="b", requirements=needs, forward=print)

    def said(self, recwarn) -> int:
        return sum("until it is calibrated" in str(warning.message) for warning in recwarn.list)

    @pytest.fixture(autouse=True)
    def _fresh(self, monkeypatch):
        monkeypatch.setattr(preferences, "_SUGGESTED", False)

    def test_once(self, cache, recwarn):
        for _ in range(3):
            dispatch.select(self.backends(), self.REQUEST, None)
        assert self.said(recwarn) == 1

    @pytest.mark.parametrize("case", ["named", "nothing to gain", "turned off", "another rank", "calibrated"])
    def test_not_where_it_is_of_no_use(self, cache, recwarn, monkeypatch, case):
        backends, name = self.backends(), None
        if case == "named":
            name = "b"
        elif case == "nothing to gain":
            backends = backends[1:]
        elif case == "turned off":
            monkeypatch.setenv("VITREG_CALIBRATION", "0")
        elif case == "another rank":
            monkeypatch.setenv("LOCAL_RANK", "3")
        else:
            recorded(ONE._replace(device="NVIDIA H200, 132 multiprocessors"))
        dispatch.select(backends, self.REQUEST, name)
        assert self.said(recwarn) == 0


def preferences_of(op: str):
    from vitreg_kernels.ops.catalogue import OPS

    return OPS[op].backends
