"""torch's kernels one by one: the named one runs, exactly, or says why not, and no other ever does.

A measurement can make one the default. The user's switches are read and never set.
"""

from __future__ import annotations

import sys
import threading
import warnings
from contextlib import nullcontext

import pytest
import torch
from calibration_cases import ONE, X
from cases import TORCHS_KERNELS, Spec, assert_parity, make_mask, make_options, make_qkv, views
from contract import transforms
from contract.attention import Attention
from contract.transforms_table import read
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from vitreg_kernels import UnsupportedError, dispatch, explain
from vitreg_kernels.dispatch import Request, calibration, find
from vitreg_kernels.dispatch.rules import select_cached
from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops._shared import probe
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import BACKENDS, sdpa
from vitreg_kernels.ops.attention.backends.sdpa import kernels, one_kernel
from vitreg_kernels.ops.attention.types import AttentionInputs

FLASH, CUDNN, EFFICIENT, MATH = sdpa.KERNELS
# Those that run on a CPU, each with what only it calls there.
MARKS = {"sdpa_flash": "_scaled_dot_product_flash_attention_for_cpu", "sdpa_math": "_safe_softmax"}
SWITCHES = {"sdpa_flash": SDPBackend.FLASH_ATTENTION, "sdpa_math": SDPBackend.MATH}

here = pytest.mark.parametrize("name", MARKS)


class Recorded(TorchDispatchMode):
    """The names of the ops that are called, and how torch's switches are then."""

    def __init__(self):
        super().__init__()
        self.names, self.switches = set(), set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        self.switches.add(switches())
        return function(*arguments, **(options or {}))


def switches():
    return tuple(is_on() for is_on in one_kernel._SWITCHES.values())


class Arguments(TorchDispatchMode):
    """The arguments of the calls of an op, as a list."""

    def __init__(self, name):
        super().__init__()
        self.name, self.given = name, []

    def __enter__(self):
        super().__enter__()
        return self.given

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function.overloadpacket.__name__ == self.name:
            self.given.append(arguments)
        return function(*arguments, **(options or {}))


def its_own(names):
    """The backends whose marks are among the names of ops, or in the text of a graph."""
    return [name for name, mark in MARKS.items() if mark in names]


def served(name):
    """A call of every kind that a kernel serves."""
    specs = [
        Spec(rope="halves"),
        Spec(rope="pairs", rope_batch=True, scale=-0.3, heads=1, outputs=("lse",)),
        Spec(batch=1, tokens=33, lengths=(9, 12, 12)),
        Spec(layout="strided_channels"),
        Spec(batch=1, tokens=201, head_dim=64, outputs=()),
    ]
    masks = [Spec(mask="key_padding"), Spec(mask="bool"), Spec(mask="additive")]
    return specs + (masks if name == "sdpa_math" else [])


@pytest.mark.parametrize(("name", "spec"), [pytest.param(n, s, id=f"{n}-{s}") for n in MARKS for s in served(n)])
def test_a_named_kernel_is_the_one_that_runs_and_is_exact(name, spec):
    with Recorded() as recorded:
        register_attention(*views(make_qkv(spec)), **make_options(spec), backend=name)
    assert its_own(recorded.names) == [name]
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert_parity(spec._replace(dtype=dtype), name, draws=16)


@here
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "autocast"])
@pytest.mark.parametrize("mask", [None, "key_padding", "bool", "additive"])
def test_the_bits_are_those_of_torch_with_the_other_kernels_switched_off(name, mask, precision):
    if name == "sdpa_flash" and mask:
        pytest.skip("serves no masks")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    spec = Spec(dtype=dtype, mask=mask, head_dim=18)
    mask = None if mask is None else make_mask(spec)
    if mask is not None:  # torch has another answer for a query without a key
        mask = mask | ~mask.any(-1, keepdim=True) if mask.dtype == torch.bool else mask.clamp(min=-9.0)
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        for ours in (True, False):
            query, key, value = (x.detach().requires_grad_() for x in views(make_qkv(spec)))
            if ours:
                output = register_attention(query, key, value, attn_mask=mask, scale=0.3, backend=name)
            else:
                with sdpa_kernel(SWITCHES[name]):
                    output = scaled_dot_product_attention(query, key, value, mask, scale=0.3)
            results.append((output, *torch.autograd.grad(output.float().sin().sum(), (query, key, value))))
    for x, y in zip(*results, strict=True):
        assert torch.equal(x, y)


@here
def test_in_double(name):
    spec = Spec(dtype=torch.float64, rope="halves")
    actual, expected = (
        register_attention(*views(make_qkv(spec)), **make_options(spec), backend=by) for by in (name, "reference")
    )
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)


@here
def test_empty_batch_and_one_token(name):
    qkv = torch.randn(0, 7, 3, 2, 16, requires_grad=True)
    output = register_attention_qkv(qkv, backend=name)
    assert output.shape == (0, 7, 32)
    assert torch.autograd.grad(output.sum(), qkv)[0].shape == qkv.shape
    qkv = torch.randn(2, 1, 3, 2, 16)
    torch.testing.assert_close(register_attention_qkv(qkv, backend=name), qkv[:, :, 2].flatten(2))


@here
@pytest.mark.usefixtures("dynamo")
def test_the_compiler_sees_the_choice(name):
    """In one graph, forward and backward, of any size; what torch says of the kernel is asked while tracing."""
    graphs = []

    def keep(module, example):
        graphs.append(str(module.graph))
        return make_boxed_func(module)

    def attend(qkv, by):
        return register_attention_qkv(qkv, num_prefix_tokens=5, outputs=("lse",), backend=by)

    one_kernel._probed.cache_clear()
    compiled = torch.compile(attend, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
    for shape in ((2, 21, 3, 2, 16), (3, 30, 3, 2, 16), (3, 30, 3, 2, 24)):
        results = []
        for function, by in ((compiled, name), (attend, "reference")):
            qkv = torch.randn(shape, generator=torch.Generator().manual_seed(0), requires_grad=True)
            output, statistics = function(qkv, by)
            results.append((output, statistics.lse, *torch.autograd.grad(output.sin().sum(), qkv)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    assert [its_own(graph) for graph in graphs[::2]] == [[name]] * 3  # every other one is a backward


class Unmasked(Attention):
    """A call that all of torch's kernels serve."""

    KINDS = (Spec(rope="halves", seed=1),)


TRIALS = [trial for trial in transforms.TRIALS if "onnx" not in trial.name]
# Those that tell a fused kernel from the formula; all others are of code that both share.
TOLD_APART = ("`torch.func.vmap`", "second derivative, `create_graph=True`", "`FlopCounterMode`")
TRIED = [
    *(("sdpa_flash", "sdpa", trial) for trial in TRIALS),
    *(("sdpa_math", "reference", trial) for trial in TRIALS if trial.name in TOLD_APART),
]


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(
    ("name", "like", "trial"),
    [
        pytest.param(*t, id=f"{t[0]}-{t[2].name}", marks=[pytest.mark.slow] if "torch.compile" in t[2].name else [])
        for t in TRIED
    ],
)
def test_transforms_do_what_the_table_says_of_their_like(name, like, trial, tmp_path):
    assert transforms.outcome(trial, Unmasked(), name, tmp_path) == read()[trial.name, "Attention", like]


@here
@pytest.mark.parametrize("trial", [t for t in transforms.TRIALS if t not in TRIALS], ids=lambda trial: trial.name)
def test_an_onnx_file_would_not_keep_the_choice_and_is_refused(name, trial, tmp_path):
    said = transforms.outcome(trial, Unmasked(), name, tmp_path)
    assert said.startswith(f"backend '{name}' cannot serve this call: does not support ONNX export. ")


@here
@pytest.mark.parametrize("program", ["export", "trace"])
def test_a_program_keeps_the_choice(name, program):
    class Attend(torch.nn.Module):
        def forward(self, qkv):
            return register_attention_qkv(qkv, backend=name)

    module, qkv = Attend(), make_qkv(Spec())
    made = torch.export.export(module, (qkv,)).module() if program == "export" else torch.jit.trace(module, qkv)
    others = [SDPBackend.EFFICIENT_ATTENTION, *(switch for other, switch in SWITCHES.items() if other != name)]
    with sdpa_kernel(others), Recorded() as recorded:
        assert torch.equal(made(qkv), module(qkv))
    assert its_own(recorded.names) == [name]


def test_torchs_switches_are_nobodys_but_the_users(monkeypatch):
    """Neither a call nor what it asks torch beforehand sets one, so threads do not disturb each other."""
    query = torch.randn(1, 2, 9, 16)
    expected = register_attention(query, query, query, backend="sdpa_flash")
    monkeypatch.setattr(one_kernel, "_refusal", one_kernel._probed.__wrapped__)  # asked by every call
    failed = []

    def of_sdpa(x):
        return register_attention(x, x, x, backend="sdpa").sum()

    def others():
        try:
            for _ in range(10):
                select_cached.cache_clear()
                assert torch.equal(register_attention(query, query, query, backend="sdpa_flash"), expected)
                torch.func.jvp(torch.func.grad(of_sdpa), (query,), (query,))  # by the formula
        except Exception as error:
            failed.append(error)

    before, interval = switches(), sys.getswitchinterval()
    thread = threading.Thread(target=others)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        with Recorded() as recorded:
            register_attention(query, query, query, backend="sdpa_flash")
        seen = recorded.switches
        sys.setswitchinterval(1e-5)  # so that threads meet everywhere
        try:
            thread.start()
            while thread.is_alive():
                scaled_dot_product_attention(query, query, query)
                seen.add(switches())
        finally:
            sys.setswitchinterval(interval)
    assert not failed
    assert seen == {(False, False, True, True)}
    assert switches() == before


def test_what_is_no_refusal_is_told_as_it_is(monkeypatch):
    def full(*arguments):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    monkeypatch.setitem(one_kernel._ATTEND, "flash", full)
    query = torch.randn(1, 2, 9, 16)
    with pytest.raises(torch.OutOfMemoryError, match=r"^tried to allocate 80 GiB$"):
        FLASH.forward(AttentionInputs(query, query, query))


@pytest.mark.parametrize("backend", sdpa.KERNELS, ids=TORCHS_KERNELS)
def test_only_a_measurement_makes_one_a_default(backend):
    assert backend.default == "if measured"
    assert find(BACKENDS, backend.name) is backend


@pytest.mark.parametrize(
    ("backend", "changes", "reason"),
    [
        (FLASH, {"head_dim": 264}, "takes head dims 1 to 256, not 264"),
        (FLASH, {"features": (features.DROPOUT,)}, "does not support dropout"),
        (FLASH, {"capability": 75}, "runs on sm_80 and newer, not on sm_75"),
        (CUDNN, {"head_dim": 136}, "takes head dims 8 to 128, not 136"),
        (CUDNN, {"head_dim": 60}, "takes head dims divisible by 8, not 60"),
        (CUDNN, {"dtype": torch.float32}, "takes float16 or bfloat16, not float32"),
        (CUDNN, {"features": (features.KEY_PADDING_MASK,)}, "does not support key-padding masks"),
        (CUDNN, {"features": (features.PACKING,)}, "does not support cu_seqlens"),
        (EFFICIENT, {"head_dim": 60}, "takes head dims divisible by 8, not 60"),
        (EFFICIENT, {"head_dim": 62, "dtype": torch.float32}, "takes head dims divisible by 4, not 62"),
        (EFFICIENT, {"dtype": torch.float64}, "takes float32, float16 or bfloat16, not float64"),
        (MATH, {"device": "hpu"}, "runs on cpu, cuda, mps, xpu or meta, not on hpu"),
    ],
    ids=lambda x: getattr(x, "name", None) or str(x),
)
def test_what_is_declared(backend, changes, reason, monkeypatch):
    asked = []
    monkeypatch.setattr(one_kernel, "_probed", lambda *call: asked.append(call) or "")
    call = Request("attention", "cuda", 90, torch.float16, 64)
    assert backend.reasons_against(call) == []
    assert asked == [(backend.name.removeprefix("sdpa_"), "cuda", torch.float16)]
    assert backend.reasons_against(call._replace(**changes)) == [reason]
    assert len(asked) == 1, "what is declared needs no call"


def test_what_torch_refuses_beforehand_is_told_in_its_words(monkeypatch):
    monkeypatch.setattr(one_kernel, "_probed", lambda *call: "the GPU is too new")
    select_cached.cache_clear()
    query = torch.randn(1, 2, 9, 16)
    with pytest.raises(
        UnsupportedError, match=r"'sdpa_flash' cannot serve this call: torch refuses: the GPU is too new"
    ):
        register_attention(query, query, query, backend="sdpa_flash")
    assert explain(query).reasons["sdpa_flash"] == ["torch refuses: the GPU is too new"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="of a machine without a GPU")
@pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
def test_a_probe_finds_what_has_no_kernel(kernel):
    said = one_kernel._probed(kernel, "cuda", torch.float16)
    assert "CUDA" in said or "NVIDIA driver" in said  # of torch's build for CPUs, or for CUDA
    assert one_kernel._probed(kernel, "cpu", torch.float32).startswith(
        f"Could not run 'aten::_scaled_dot_product_{kernel}_attention' with arguments from the 'CPU' backend"
    )


def test_what_only_the_tensors_tell_is_refused_and_by_nobody_else(change_backends):
    """As cuDNN finds no plan for some: the request is like any other's."""
    served = (*FLASH.requirements.features, features.DROPOUT)
    change_backends("sdpa_flash", requirements=FLASH.requirements._replace(features=served))
    query = torch.randn(1, 2, 9, 16)
    with Recorded() as recorded, pytest.raises(UnsupportedError) as raised:
        register_attention(query, query, query, dropout_p=0.5, backend="sdpa_flash")
    assert str(raised.value) == (
        "backend 'sdpa_flash' cannot serve this call: scaled_dot_product_attention_flash_attention: Currently do not "
        "support dropout > 0. Name another backend, such as 'sdpa'"
    )
    assert recorded.names <= {"_scaled_dot_product_flash_attention_for_cpu"}


def on_meta(*shape, **options):
    """Three tensors of no memory: torch tells of its GPU kernels what they give and take."""
    return tuple(torch.empty(shape, device="meta", dtype=torch.float16, **options) for _ in range(3))


class TestOnAGPU:
    """As far as it can be told without one."""

    FUSED = pytest.mark.parametrize("kernel", ["flash", "cudnn", "efficient"])

    @FUSED
    @pytest.mark.parametrize("head_dim", [64, 24])
    def test_a_first_derivative_and_no_second(self, kernel, head_dim):
        inputs = on_meta(2, 3, 21, head_dim, requires_grad=True)
        output = one_kernel._ATTEND[kernel](*inputs, None, 0.0, 0.3)
        assert output.shape == (2, 3, 21, head_dim)
        first = torch.autograd.grad(output.sum(), inputs, create_graph=True)
        assert [x.shape for x in first] == [x.shape for x in inputs]
        with pytest.raises(RuntimeError, match="attention_backward is not implemented"):
            torch.autograd.grad(first[0].sum(), inputs)

    def test_flash_is_given_heads_of_eights(self):
        inputs = on_meta(2, 3, 21, 18, requires_grad=True)
        with Arguments("_scaled_dot_product_flash_attention") as given:
            output = kernels.flash(*inputs, None, 0.0, 0.3)
        assert [x.shape[-1] for x in given[0][:3]] == [24] * 3
        assert output.shape[-1] == 18
        assert torch.autograd.grad(output.sum(), inputs[0])[0].shape[-1] == 18

    @pytest.mark.parametrize("kernel", ["cudnn", "efficient"])
    def test_the_log_sum_exp_is_kept_where_a_backward_may_follow(self, kernel):
        def kept(*inputs, mask=None):
            with Arguments(f"_scaled_dot_product_{kernel}_attention") as given:
                one_kernel._ATTEND[kernel](*inputs, mask, 0.0, 0.3)
            return given[0][4]

        inputs = on_meta(2, 3, 21, 64)
        query, key, value = on_meta(2, 3, 21, 64, requires_grad=True)
        assert not kept(*inputs)
        assert kept(query, *inputs[:2])
        assert kept(*inputs[:2], value)
        with torch.no_grad():
            assert not kept(query, key, value)
        torch.func.grad(lambda x: kept(x, *inputs[:2]) and x.sum())(inputs[0])
        if kernel == "efficient":
            assert kept(*inputs, mask=torch.empty(21, 21, device="meta", dtype=torch.float16, requires_grad=True))

    @pytest.mark.parametrize("tokens", [21, 32])
    @pytest.mark.parametrize("shape", ["b11n", "bhnn", "1hn1", "bhnn transposed"])
    @pytest.mark.parametrize("dtype", [torch.bool, torch.float16])
    def test_the_efficient_kernel_is_given_aligned_rows_of_its_mask(self, tokens, shape, dtype):
        sizes = {"b": 2, "h": 3, "n": tokens, "1": 1}
        mask = torch.ones([sizes[letter] for letter in shape[:4]], dtype=dtype)
        mask = mask.mT.contiguous().mT if "transposed" in shape else mask
        query = torch.empty(2, 3, tokens, 64, dtype=torch.float16)
        given = kernels._in_aligned_rows(kernels._added(mask, query.dtype), query)
        assert given.shape == (2, 3, tokens, tokens)
        assert given.stride(-1) == 1
        assert all(stride % 16 == 0 for stride in given.stride()[:3])
        expected = torch.zeros_like(mask, dtype=query.dtype) if dtype == torch.bool else mask
        assert torch.equal(given, expected.expand_as(given))
        assert given.untyped_storage().nbytes() <= 2 * max(mask.numel(), mask[..., :1].numel() * 48) * 48 / tokens

    @pytest.mark.parametrize(
        ("kernel", "shape", "reason"),
        [
            ("cudnn", (2, 3, 1, 64), "takes more than one token"),
            ("cudnn", (65_536, 1, 2, 64), "takes at most 65535 images and heads, not 65536 and 1"),
            ("flash", (65_536, 1, 2, 64), "takes at most 65535 images and heads, not 65536 and 1"),
            ("efficient", (1, 65_536, 2, 64), "takes at most 65535 images and heads, not 1 and 65536"),
            ("flash", (2, 3, 1, 64), ""),
        ],
    )
    def test_what_a_kernel_would_not_notice_itself(self, kernel, shape, reason):
        inputs = AttentionInputs(*on_meta(*shape))
        if not reason:
            assert one_kernel.forward(inputs, kernel=kernel).output.shape == shape
            return
        with pytest.raises(UnsupportedError, match=f"'sdpa_{kernel}' cannot serve this call: {reason}. Name another"):
            one_kernel.forward(inputs, kernel=kernel)

    @FUSED
    def test_an_empty_batch_is_the_formulas(self, kernel):
        with Recorded() as recorded:
            output = one_kernel.forward(AttentionInputs(*on_meta(0, 3, 7, 64)), kernel=kernel).output
        assert output.shape == (0, 3, 7, 64)
        assert not any(kernel in name for name in recorded.names)


CALIBRATED = ONE._replace(backend="sdpa_flash", times_ms={}, errors={})


@pytest.fixture
def calibrated(tmp_path, monkeypatch, dynamo):
    """A user's file in which a kernel is the fastest for calls like one of ``X``, with gradients and without."""
    monkeypatch.delenv("VITREG_CALIBRATION")
    monkeypatch.setenv("VITREG_CACHE_DIR", str(tmp_path))

    def calibrated(name, **changes):
        found = CALIBRATED._replace(backend=name, **changes)
        calibration.record([found, found._replace(gradients=True)])
        dispatch.read_calibration()

    yield calibrated
    monkeypatch.undo()
    dispatch.read_calibration()


def attend(x, backend=None):
    return register_attention(x, x, x, backend=backend)


def ran(call, *arguments):
    """Which of torch's kernels a call runs."""
    with Recorded() as recorded:
        call(*arguments)
    return its_own(recorded.names)


class TestAsTheDefault:
    @here
    def test_a_call_gets_what_was_measured(self, calibrated, name):
        calibrated(name)
        assert str(explain(X)).startswith(f"backend: {name}, by your calibration, measured 2026-11-30\n")
        results = []
        for backend in (None, name):
            x = X.clone().requires_grad_()
            output = attend(x, backend)
            results.append((output, *torch.autograd.grad(output.sin().sum(), x)))
            assert ran(attend, x, backend) == [name]
        assert all(map(torch.equal, *results))

    @here
    def test_in_one_graph(self, calibrated, name):
        calibrated(name)
        graphs = []

        def keep(module, example):
            graphs.append(str(module.graph))
            return make_boxed_func(module)

        compiled = torch.compile(attend, backend=aot_autograd(fw_compiler=keep), fullgraph=True)
        x = X.clone().requires_grad_()
        found = compiled(x)
        torch.testing.assert_close(found, attend(X), rtol=1e-5, atol=1e-6)
        torch.autograd.grad(found.sum(), x)
        assert len(graphs) == 2, "a forward and a backward"
        assert its_own(graphs[0]) == [name]

    def test_not_while_the_user_has_it_switched_off(self, calibrated):
        calibrated("sdpa_flash")
        assert ran(attend, X) == ["sdpa_flash"]
        with sdpa_kernel([SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION]):
            assert "sdpa_flash" not in ran(attend, X)
            said = explain(X)
            assert said.backend in ("cpu", "sdpa")
            assert said.decided_by == "the declared order"
            assert said.reasons["sdpa_flash"] == ["is switched off in torch; name it to use it all the same"]
            assert ran(attend, X, "sdpa_flash") == ["sdpa_flash"], "whoever names it gets it"
        assert ran(attend, X) == ["sdpa_flash"]

    @pytest.mark.parametrize("inside", [False, True])
    @pytest.mark.parametrize("on", [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])
    def test_nor_in_a_graph_that_is_made_meanwhile(self, calibrated, inside, on):
        calibrated("sdpa_flash")
        graphs = []

        def keep(module, example):
            graphs.append(str(module.graph))
            return module

        def with_one_switched_on(x):
            with sdpa_kernel([on]):
                return attend(x)

        compiled = torch.compile(with_one_switched_on if inside else attend, backend=keep, fullgraph=True)
        with nullcontext() if inside else sdpa_kernel([on]):
            torch.testing.assert_close(compiled(X), attend(X, "reference"), rtol=1e-4, atol=1e-5)
        assert [its_own(graph) for graph in graphs] == [["sdpa_flash"] if on == SDPBackend.FLASH_ATTENTION else []]

    def test_the_next_takes_what_it_finds_that_it_does_not_serve(self, calibrated, monkeypatch):
        """One that was wrong here is not the next."""
        calibrated("sdpa_flash", wrong={"cpu": "of no use"})
        expected = attend(X, "sdpa")
        one_kernel._probed("flash", "cpu", torch.float32)

        def plan(*arguments):
            raise RuntimeError("No execution plans support the graph.\nAborting.")

        monkeypatch.setitem(one_kernel._ATTEND, "flash", plan)
        with pytest.warns(
            UserWarning, match="gives way to the next: backend 'sdpa_flash' .* No execution plans"
        ) as said:
            assert torch.equal(attend(X), expected)
        assert said[0].filename == __file__
        with pytest.warns(UserWarning, match="gives way"):
            register_attention(X, X, X, outputs=())
        with pytest.raises(UnsupportedError, match="'sdpa_flash' cannot serve this call: No execution plans support"):
            attend(X, "sdpa_flash")

    def test_of_a_packed_projection_too(self, calibrated, monkeypatch):
        calibrated("sdpa_flash", variant="packed projection")
        qkv = torch.randn(2, 21, 3, 3, 16)
        assert ran(register_attention_qkv, qkv) == ["sdpa_flash"]
        monkeypatch.setattr(one_kernel, "_beyond", lambda *call: "takes no Mondays")
        with pytest.warns(UserWarning, match="takes no Mondays"):
            found = register_attention_qkv(qkv)
        torch.testing.assert_close(found, register_attention_qkv(qkv, backend="reference"), rtol=1e-4, atol=1e-5)

    def test_in_a_graph_the_next_takes_what_is_too_large(self, calibrated, monkeypatch):
        calibrated("sdpa_flash")
        monkeypatch.setattr(one_kernel, "_beyond", lambda *call: "takes no Mondays")
        compiled = torch.compile(attend, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), attend(X, "reference"), rtol=1e-4, atol=1e-5)

    def test_warnings_that_are_errors_change_nothing(self, calibrated, monkeypatch, recwarn):
        calibrated("sdpa_flash")
        monkeypatch.setattr(one_kernel, "_beyond", lambda *call: "takes no Mondays")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attend(X)


def test_a_probe_is_no_part_of_what_the_caller_is_in():
    """Gradients, autocast, inference, transforms and modes: the same answer in all, and nothing of it to be seen."""
    seen = []

    def call(device):
        x = torch.zeros(2, device=device, requires_grad=True)
        seen.append((x.sum().requires_grad, x.is_inference(), torch.is_autocast_enabled("cpu")))
        x.sum().backward()

    def ask(x):
        assert probe.refusal(call, "cpu") == ""
        return x.sum()

    with Recorded() as recorded, torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        ask(torch.ones(2))
    torch.func.grad(ask)(torch.ones(2))
    torch.func.vmap(ask)(torch.ones(2, 2))
    assert seen == [(True, False, False)] * 3
    assert recorded.names == {"ones", "sum"}
