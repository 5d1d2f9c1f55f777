"""Calibration as a GPU's user has it, without a GPU: kernels are compiled and launched into a driver that runs none.

What the Triton backend gives is then put right by the formula, and the clock is moved by the backends alone.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")

from benchmarks.host_cost import NoGPU, active
from vitreg_kernels import calibrate, dispatch
from vitreg_kernels._triton import mode
from vitreg_kernels.dispatch import calibration, devices, preferences
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.calibrate import contest as contests
from vitreg_kernels.measure.calibrate import idle, judge, run, subjects
from vitreg_kernels.measure.poison import poisoned
from vitreg_kernels.measure.warm import launched
from vitreg_kernels.ops._shared import capability
from vitreg_kernels.ops.attention import reference
from vitreg_kernels.ops.catalogue import OPS

if mode.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
NAME = "NVIDIA H200, 132 multiprocessors"
SHAPE = (2, 2, 54, 16)


@pytest.fixture
def gpu(tmp_path, monkeypatch, change_backends, clock):
    """An H200 whose memory is the CPU's; the names of the kernels launched on it."""
    monkeypatch.delenv("VITREG_CALIBRATION")
    monkeypatch.setenv("VITREG_CACHE_DIR", str(tmp_path / "cache"))
    properties = SimpleNamespace(name="NVIDIA H200", multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    devices._gpu.cache_clear()
    monkeypatch.setattr(capability, "capability", lambda device: 90)
    monkeypatch.setattr(contests, "capability", lambda device: 90)
    # Tensors, and what is made for them, lie where there is memory.
    numbers = subjects._numbers
    monkeypatch.setattr(subjects, "_numbers", lambda device, *draw: numbers(CPU, *draw))
    monkeypatch.setattr(judge, "poisoned", lambda device: poisoned(CPU))
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**12)
    monkeypatch.setattr(contests, "time", clock)
    monkeypatch.setattr(contests, "_SAMPLE_MS", 0.0)
    monkeypatch.setattr(contests, "_BUDGET_S", 0.0)
    monkeypatch.setattr(contests, "_FEWEST_ROUNDS", 3)
    monkeypatch.setattr(idle, "check", lambda device: None)
    for backend in OPS["attention"].backends:
        if backend.name not in ("triton", "sdpa", "reference"):  # who would ask the GPU
            change_backends(backend.name, op="attention", refuses=lambda request: ["away for this test"])
    triton = dispatch.find(OPS["attention"].backends, "triton")
    needs = triton.requirements._replace(devices=("cpu", "cuda"))
    change_backends("triton", op="attention", requirements=needs, faults=list)
    dispatch.read_calibration()
    names: list[str] = []
    with active(NoGPU(lambda kernel, *_: names.append(kernel))):
        yield names
    monkeypatch.undo()
    devices._gpu.cache_clear()
    dispatch.read_calibration()


def right_after(seconds, change_backends, clock, *, factor=1.0):
    """The Triton backend: launched as ever, and its results put right, or made wrong by a factor."""
    triton = dispatch.find(OPS["attention"].backends, "triton")
    forward, backward = triton.forward, triton.backward

    def launching_forward(inputs):
        clock.sleep(seconds)
        forward(inputs)
        result = reference.attention(inputs)
        return result._replace(output=factor * result.output)

    def launching_backward(inputs, output, lse, grad_output, *gradients):
        clock.sleep(seconds)
        backward(inputs, output, lse, grad_output, *gradients)
        leaves = [x.detach().requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]
        query, key, value = leaves
        with torch.enable_grad():
            again = reference.attention(inputs._replace(query=query, key=key, value=value, outputs=())).output
        for into, gradient in zip(gradients, torch.autograd.grad(again, leaves, grad_output), strict=True):
            into.copy_(gradient)

    change_backends("triton", op="attention", forward=launching_forward, backward=launching_backward)


def sleeping(seconds, change_backends, clock):
    sdpa = dispatch.find(OPS["attention"].backends, "sdpa").forward
    change_backends("sdpa", op="attention", forward=lambda inputs: clock.sleep(seconds) or sdpa(inputs))


def attention_alone(monkeypatch, compiled):
    """Of a block's calls attention of separate query, key and value; what is compiled ahead is told."""
    of_shape = subjects.of_shape
    monkeypatch.setattr(run, "of_shape", lambda *arguments, **options: of_shape(*arguments, **options)[1:2])
    monkeypatch.setattr(
        run, "compile_ahead", lambda calls, device: compiled.extend(x for call in calls for x in launched(call))
    )


def a_call(gradients: bool) -> dispatch.Explanation:
    workload = preferences.of_size(GPU, SHAPE[2], SHAPE[0] * SHAPE[1], gradients=gradients, variant="separate")
    request = dispatch.Request("attention", "cuda", 90, torch.float16, SHAPE[3], workload=workload)
    return dispatch.explain(OPS["attention"].backends, request, None)


def test_what_is_fastest_on_a_gpu_is_the_default_there(gpu, change_backends, clock, monkeypatch):
    """Triton, which no table names, is taken from then on, and by its own GPU only."""
    compiled = []
    attention_alone(monkeypatch, compiled)
    right_after(1e-3, change_backends, clock)
    sleeping(4e-3, change_backends, clock)
    assert a_call(False).backend == "sdpa"
    done = calibrate([SHAPE], device=GPU, dtype=torch.float16)
    found = [(outcome.before, outcome.backend, outcome.decided, outcome.wrong) for outcome in done.outcomes]
    assert found == [("sdpa", "triton", True, {})] * 2
    assert {launch.kernel.__name__ for launch in compiled} >= {"_attention_fwd_kernel", "_attention_bwd_kernel"}
    assert any("attention_fwd_kernel" in name for name in gpu)
    assert any("attention_bwd_kernel" in name for name in gpu)
    for gradients in (False, True):
        assert (a_call(gradients).backend, a_call(gradients).decided_by[:16]) == ("triton", "your calibration")
    forward, training = calibration.read().measurements
    assert (forward.device, forward.gradients, training.gradients) == (NAME, False, True)
    assert forward.times_ms["triton"] < forward.times_ms["sdpa"]

    other = SimpleNamespace(name="NVIDIA H200 MIG 1g.18gb", multi_processor_count=16)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: other)
    devices._gpu.cache_clear()
    dispatch.read_calibration()
    assert a_call(False).backend == "sdpa"


def test_a_wrong_kernel_is_never_chosen(gpu, change_backends, clock, monkeypatch):
    attention_alone(monkeypatch, [])
    right_after(1e-3, change_backends, clock, factor=1.01)
    sleeping(4e-3, change_backends, clock)
    for outcome in calibrate([SHAPE], device=GPU, dtype=torch.float16).outcomes:
        assert outcome.backend == "sdpa"
        assert "output has max error" in outcome.wrong["triton"]
    explanation = a_call(False)
    assert explanation.backend == "sdpa"
    assert "was wrong on this machine by your calibration" in explanation.reasons["triton"][0]


def test_a_kernel_that_breaks_the_hold_of_the_gpu(gpu, change_backends, clock, monkeypatch):
    """Nothing after it can run in this process; what was decided before it is kept."""
    attention_alone(monkeypatch, [])

    def illegal(inputs):
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: 1 / 0)
        raise RuntimeError("an illegal memory access was encountered")

    change_backends("triton", op="attention", forward=illegal)
    monkeypatch.setattr(run, "compile_ahead", lambda calls, device: None)
    monkeypatch.setattr(contests, "lost", lambda device: True)
    with pytest.raises(RuntimeError, match=r"triton broke the process's hold of the GPU on attention .*illegal"):
        calibrate([SHAPE], device=GPU, dtype=torch.float16)
    assert a_call(False).backend == "sdpa"


def test_the_choice_by_gpu_can_be_traced(gpu, monkeypatch):
    """What the compiler sees of a GPU's call: its name is a constant, and its graph has the calibrated backend."""
    torch.compiler.reset()
    one = calibration.Measurement(
        "attention", NAME, "float16", 16, 54, 4, False, "separate", (), "triton", {}, {"triton": 1.0}, {}, "2026-11-30"
    )
    calibration.record([one])
    dispatch.read_calibration()
    devices._gpu.cache_clear()
    backends = OPS["attention"].backends
    triton = dispatch.find(backends, "triton")

    def chosen(x):
        request = dispatch.Request("attention", "cuda", 90, x.dtype, 16)
        workload = preferences.workload(request, GPU, x.shape[0], x.shape[1], (x,))
        if workload is not None:
            request = request._replace(workload=workload._replace(variant="separate"))
        return x + 1 if dispatch.select(backends, request, None) is triton else x - 1

    compiled = torch.compile(chosen, backend="eager", fullgraph=True)
    assert compiled(torch.zeros(54, 4, dtype=torch.float16))[0, 0] == 1
    assert compiled(torch.zeros(1374, 4, dtype=torch.float16))[0, 0] == -1
    torch.compiler.reset()
