"""Kernels compiled ahead are those that calls launch, and triton finds them in its cache."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from vitreg_kernels import dispatch, functional
from vitreg_kernels._triton import mode
from vitreg_kernels.measure import warm
from vitreg_kernels.ops._shared import capability
from vitreg_kernels.ops.attention.backends import BACKENDS

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")
if mode.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver as nvidia
from triton.runtime import driver

from vitreg_kernels._triton import offline

ARCH = 90
GPU = torch.device("cuda")


class NoDriver:
    """Stands in for a GPU's driver so that triton's launcher gets as far as compiling."""

    def get_current_target(self):
        return GPUTarget("cuda", ARCH, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def test_what_was_compiled_ahead_is_what_a_launch_loads(tmp_path, monkeypatch, change_backends):
    """Our kernels take CPU tensors for those of a GPU."""
    requirements = dispatch.find(BACKENDS, "triton").requirements._replace(devices=("cpu",))
    change_backends("triton", op="attention", requirements=requirements, faults=list)
    monkeypatch.setattr(capability, "capability", lambda device: ARCH)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    qkv = torch.randn(2, 22, 3, 2, 16)

    def call(dtype):
        functional.register_attention_qkv(qkv.to(dtype), num_prefix_tokens=5, backend="triton")

    calls = [partial(call, dtype) for dtype in (torch.bfloat16, torch.float16, torch.bfloat16)]
    told = warm.compile_ahead(calls, GPU)
    assert (told.cached, told.compiled, told.left) == (0, 2, 0)
    assert told.seconds > 0
    launches = [launch for call in calls for launch in warm.launched(call)]
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

    assert warm.compile_ahead(calls, GPU) == (2, 0, 0, 0.0)


def test_keys_do_not_hang_on_which_kernel_a_process_uses_first():
    """Each order in a process of its own, as triton hashes a function once."""
    script = """
import sys
from vitreg_kernels._triton.keys import settle
from vitreg_kernels.ops.attention.backends.triton import backward_kernels, forward_kernel
kernels = {"bwd": backward_kernels._attention_bwd_kernel, "fwd": forward_kernel._attention_fwd_kernel}
for name in sys.argv[1:]:
    settle(kernels[name])
print(*(kernels[name].cache_key for name in sorted(kernels)))
"""
    orders = (("fwd", "bwd"), ("bwd", "fwd"))
    found = {
        subprocess.run([sys.executable, "-c", script, *order], capture_output=True, text=True, check=True).stdout
        for order in orders
    }
    assert len(found) == 1


@pytest.fixture
def compiling(monkeypatch):
    """Calls give names of kernels, and ``compile`` is told to compile each in a thread."""
    told = SimpleNamespace(compile=lambda name: True, began=[], ended=[])

    @contextmanager
    def processes(deadline):
        pool = ThreadPoolExecutor(1)
        try:
            yield pool
        finally:
            pool.shutdown(cancel_futures=True)

    def compile_one(kernel):
        told.began.append(kernel.key)
        compiled = told.compile(kernel.key)
        told.ended.append(kernel.key)
        return None if compiled else "too many registers"

    monkeypatch.setattr(capability, "capability", lambda device: ARCH)
    monkeypatch.setattr(warm, "processes", processes)
    monkeypatch.setattr(warm, "launched", lambda call: [SimpleNamespace(kernel=name) for name in call()])
    monkeypatch.setattr(warm, "_compile", compile_one)
    monkeypatch.setattr(
        offline, "compilation", lambda launch, arch: SimpleNamespace(key=launch.kernel, cached=launch.kernel == "old")
    )
    return told


def of(*names):
    return lambda: names


def test_a_kernel_is_compiled_once_and_only_if_no_cache_has_it(compiling):
    told = warm.compile_ahead([of("a", "b"), of("old"), of("b", "c", "old"), of()], GPU)
    assert compiling.began == ["a", "b", "c"]
    assert told[:3] == (1, 3, 0)


def test_a_call_does_not_wait_for_the_kernels_of_later_ones(compiling):
    first_is_judged = threading.Event()
    compiling.compile = lambda name: name == "a" or first_is_judged.wait(10)
    with warm.Compiler(GPU) as compiler:
        first, second = compiler.begin(of("a")), compiler.begin(of("b"))
        compiler.wait(first)
        assert compiling.ended == ["a"]
        first_is_judged.set()
        compiler.wait(second)
        assert compiling.ended == ["a", "b"]


def test_what_fails_is_left_to_the_real_call(compiling):
    def wrong():
        raise IndexError("out of its bounds")

    def compile(name):
        if name == "crash":
            raise MemoryError("no memory")
        return name != "refused"

    compiling.compile = compile
    with warm.Compiler(GPU) as compiler:
        for call in (wrong, of("crash"), of("refused"), of("right")):
            compiler.wait(compiler.begin(call))
    assert compiler.told[:3] == (0, 1, 2)
    assert [str(error) for error in compiler.raised] == ["out of its bounds"]
    assert sorted(compiler.refused) == ["no memory", "too many registers"]


def test_nothing_is_waited_for_after_the_deadline(compiling):
    judged = threading.Event()
    compiling.compile = lambda name: judged.wait(10)
    deadline = time.monotonic() + 0.2
    with warm.Compiler(GPU, deadline=deadline) as compiler:
        jobs = [job for name in "abc" for job in compiler.begin(of(name))]
        compiler.wait(jobs)
        assert time.monotonic() >= deadline
        assert (compiling.began, compiling.ended) == (["a"], [])
        judged.set()
    assert warm.compile_ahead([of("d")], GPU, deadline=deadline) == (0, 0, 0, 0.0)
    assert "d" not in compiling.began


def test_what_is_still_being_compiled_at_the_deadline_is_ended():
    start = time.monotonic()
    with warm.processes(start + 1.0) as pool:
        jobs = [pool.submit(time.sleep, 60) for _ in range(3)]
    assert time.monotonic() - start < 30
    assert all(job.cancelled() or isinstance(job.exception(10), BrokenProcessPool) for job in jobs)


def test_without_a_deadline_what_has_begun_is_waited_for():
    with warm.processes() as pool:
        job = pool.submit(time.sleep, 0.5)
        while not job.running():
            time.sleep(0.01)
    assert job.result(0) is None


class Kernel:
    """What a process is given to compile; compiled, it is told to the launcher of ``built``."""

    source, src, metadata = SimpleNamespace(fn=None), "source", "metadata"

    def run(self):
        return self


@pytest.mark.parametrize("triton", ["3.6", "3.7"])
def test_a_launcher_is_built_where_triton_has_one_for_each_signature(monkeypatch, triton):
    built = []
    monkeypatch.setattr(nvidia, "CudaLauncher", lambda source, metadata: built.append((source, metadata)))
    monkeypatch.delattr(nvidia, "make_launcher", raising=False)
    if triton == "3.6":
        monkeypatch.setattr(nvidia, "make_launcher", None, raising=False)
    assert warm._compile(Kernel()) is None
    assert built == ([("source", "metadata")] if triton == "3.6" else [])


@pytest.mark.parametrize("what", ["kernel", "launcher"])
def test_what_does_not_compile_is_no_error(monkeypatch, what):
    def refuse(*_):
        raise RuntimeError("no compiler here")

    if what == "kernel":
        monkeypatch.setattr(Kernel, "run", refuse)
    monkeypatch.setattr(warm, "_build_launcher", refuse)
    assert warm._compile(Kernel()) == "RuntimeError: no compiler here"


def test_a_script_without_a_guard_is_run_once(tmp_path):
    """``calibrate`` in a notebook's or a plain script's top level is what users write."""
    script = tmp_path / "script.py"
    script.write_text(
        "import math\n"
        "from vitreg_kernels.measure.warm import processes\n"
        "print('once', flush=True)\n"
        "with processes() as pool:\n"
        "    print(pool.submit(math.sqrt, 4).result())\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["once", "2.0"]
