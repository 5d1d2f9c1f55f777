"""Kernels compiled ahead are those that the stages' own calls launch, and triton finds them in its cache."""

from __future__ import annotations

import math
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from benchmarks.gpu import accuracy, calls, norms, outputs, race, warm
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer
from benchmarks.shapes import Case
from vitreg_kernels import dispatch, functional
from vitreg_kernels._triton import mode
from vitreg_kernels.ops._shared import capability
from vitreg_kernels.ops.catalogue import OPS

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")
if mode.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from vitreg_kernels._triton import offline

ARCH = 90
CPU = torch.device("cpu")
DRY = Setup(CPU, dry=True, deadline=math.inf)
GPU = Setup(torch.device("cuda"), dry=False, deadline=math.inf)


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


@pytest.fixture
def pretending(monkeypatch, change_backends):
    """Our kernels take CPU tensors for those of a GPU; whoever launches one in earnest fails."""
    for op in OPS.values():
        requirements = dispatch.find(op.backends, "triton").requirements._replace(devices=("cpu",))
        change_backends("triton", op=op.name, requirements=requirements, faults=list)
    monkeypatch.setattr(capability, "capability", lambda device: ARCH)


def keys(call):
    return {offline.compilation(launch, ARCH).key for launch in warm.launched(call)}


def rehearsed(rehearse, pieces):
    return set().union(*(keys(partial(rehearse, piece)) for piece in pieces))


@pytest.mark.usefixtures("pretending")
def test_the_accuracy_stage_launches_what_was_rehearsed(writer):
    launched = keys(lambda: list(accuracy.run(DRY, writer)))
    assert launched == rehearsed(accuracy._rehearse, accuracy._pieces(DRY))
    # Two cases in four precisions, with three forwards, the statistics and a backward or two.
    assert len(launched) >= 2 * 4 * 5
    assert all(row["crash"] is None and row["reasons"] == [] for row in writer.find(backend="triton"))


@pytest.mark.usefixtures("pretending")
def test_the_race_launches_what_was_rehearsed(writer, monkeypatch):
    cases = [
        *race._uniform({22: (32, 16)}, "bf16", 16),
        *race._multicrop((32, 2), ((2, 22), (2, 9)), "bf16", 16),
    ]
    monkeypatch.setattr(race, "_cases", lambda setup: cases)
    launched = keys(lambda: list(race.run(DRY, writer)))
    assert launched == rehearsed(partial(race.rehearse, device=CPU), cases)
    assert all(row["reason"] is None for row in writer.find(variant="vitreg:triton"))
    for layout in ("packed", "separate", "multicrop"):
        its = rehearsed(partial(race.rehearse, device=CPU), [case for case in cases if case.layout == layout])
        assert len(its) >= 3  # a forward with and one without the log-sum-exp, and a backward or two


@pytest.mark.usefixtures("pretending")
def test_the_outputs_stage_launches_what_was_rehearsed(writer, monkeypatch):
    cases = [Case(32, 16, 22, "bf16", "forward", 16)]
    monkeypatch.setattr(outputs, "_cases", lambda setup: cases)
    launched = keys(lambda: list(outputs.run(DRY, writer)))
    assert launched == rehearsed(partial(outputs.rehearse, device=CPU), cases)
    assert all(row["reason"] is None for row in writer.find(backend="triton"))
    assert len(launched) >= len(outputs._ASKED)


@pytest.mark.usefixtures("pretending")
def test_the_norms_stage_launches_what_was_rehearsed(writer, monkeypatch, ceilings):
    writer.extend([{"kind": "roofline", **ceilings._asdict()}])
    launched = keys(lambda: list(norms.run(DRY, writer)))
    checked = rehearsed(norms.rehearse_check, norms._checks(DRY))
    raced = rehearsed(partial(norms.rehearse_race, device=CPU), norms._cases(DRY))
    assert launched == checked | raced
    assert min(len(checked), len(raced)) >= 3
    served = [row for row in writer.find(kind="norm_accuracy") if row["backend"].endswith(":triton")]
    assert {row["backend"].partition(":")[0] for row in served if not row["reasons"]} == {op.name for op in calls.OPS}


class NoDriver:
    """Stands in for a GPU's driver so that triton's launcher gets as far as compiling."""

    def get_current_target(self):
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.mark.usefixtures("pretending")
def test_what_was_compiled_ahead_is_what_a_launch_loads(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    qkv = torch.randn(2, 22, 3, 2, 16)

    def rehearse(dtype):
        functional.register_attention_qkv(qkv.to(dtype), num_prefix_tokens=5, backend="triton")

    dtypes = (torch.bfloat16, torch.float16, torch.bfloat16)
    assert list(warm.ahead(dtypes, rehearse, GPU)) == list(dtypes)
    assert "    2 of 2 kernels compiled ahead in " in capsys.readouterr().out
    launches = [launch for dtype in dtypes for launch in warm.launched(partial(rehearse, dtype))]
    assert all(offline.compilation(launch, ARCH).cached for launch in launches)

    monkeypatch.setattr(driver, "_active", NoDriver())
    loaded = []
    monkeypatch.setattr(knobs.compilation, "listener", lambda **told: loaded.append(told["cache_hit"]))
    for launch in launches:
        monkeypatch.setattr(launch.kernel, "device_caches", defaultdict(launch.kernel.create_binder))
        options = {"num_warps": launch.num_warps, "num_stages": launch.num_stages, "grid": launch.grid, "warmup": True}
        compiled = launch.kernel.run(**launch.arguments, **launch.constants, **options)
        assert compiled.hash == offline.compilation(launch, ARCH).key
    assert loaded == [True] * 3

    warm.up(dtypes, rehearse, GPU)
    assert capsys.readouterr().out == ""  # nothing is left to compile


@pytest.fixture
def compiling(monkeypatch):
    """Pieces are names of kernels, and ``compile`` is told to compile each in a thread."""
    told = SimpleNamespace(compile=lambda name: True, began=[], ended=[])

    @contextmanager
    def processes():
        pool = ThreadPoolExecutor(1)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)

    def compile_one(kernel):
        told.began.append(kernel.key)
        compiled = told.compile(kernel.key)
        told.ended.append(kernel.key)
        return compiled

    monkeypatch.setattr(capability, "capability", lambda device: ARCH)
    monkeypatch.setattr(warm, "processes", processes)
    monkeypatch.setattr(warm, "launched", lambda call: call())
    monkeypatch.setattr(warm, "_compile", compile_one)
    monkeypatch.setattr(offline, "compilation", lambda name, arch: SimpleNamespace(key=name, cached=name == "old"))
    return told


def test_a_kernel_is_compiled_once_and_only_if_no_cache_has_it(compiling, capsys):
    pieces = [["a", "b"], ["old"], ["b", "c"], []]
    assert list(warm.ahead(pieces, list, GPU)) == pieces
    assert compiling.began == ["a", "b", "c"]
    assert capsys.readouterr().out == "    3 of 3 kernels compiled ahead in 0 s\n"


def test_a_piece_does_not_wait_for_the_kernels_of_later_ones(compiling):
    first_is_judged = threading.Event()
    compiling.compile = lambda name: name == "a" or first_is_judged.wait(10)
    pieces = warm.ahead([["a"], ["b"]], list, GPU)
    assert next(pieces) == ["a"]
    assert compiling.ended == ["a"]
    first_is_judged.set()
    assert next(pieces) == ["b"]


def test_what_fails_is_left_to_the_real_call(compiling, capsys):
    def rehearse(piece):
        if piece == "wrong":
            raise IndexError("out of its bounds")
        return [piece]

    def compile(name):
        if name == "crash":
            raise MemoryError
        return name != "refused"

    compiling.compile = compile
    pieces = ["wrong", "crash", "refused", "right"]
    assert list(warm.ahead(pieces, rehearse, GPU)) == pieces
    assert "    1 of 3 kernels compiled ahead" in capsys.readouterr().out


def test_nothing_is_waited_for_after_the_deadline(compiling):
    judged = threading.Event()
    compiling.compile = lambda name: judged.wait(10)
    setup = GPU._replace(deadline=time.monotonic() + 0.2)
    pieces = warm.ahead([["a"], ["b"], ["c"]], list, setup)
    assert next(pieces) == ["a"]
    assert setup.expired
    assert (compiling.began, compiling.ended) == (["a"], [])
    judged.set()
    pieces.close()
    assert list(warm.ahead([["d"]], list, setup)) == [["d"]]
    assert "d" not in compiling.began


def test_off_a_gpu_nothing_is_rehearsed():
    asked = []
    assert list(warm.ahead(["piece"], asked.append, DRY)) == ["piece"]
    assert asked == []


def test_a_kernel_that_does_not_compile_is_no_error():
    broken = SimpleNamespace(run=lambda: 1 / 0)
    assert not warm._compile(broken)
