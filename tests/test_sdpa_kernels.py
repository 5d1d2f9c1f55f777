"""torch's kernels one by one: the named one runs, exactly, or says in torch's words why not, and no other ever does."""

from __future__ import annotations

import warnings

import pytest
import torch
from cases import TORCHS_KERNELS, Spec, assert_parity, make_options, make_qkv, views
from contract import transforms
from contract.attention import Attention
from contract.transforms_table import read
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from vitreg_kernels import UnsupportedError, explain
from vitreg_kernels.dispatch import Request, find
from vitreg_kernels.dispatch.rules import select_cached
from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops._shared import probe
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import BACKENDS, sdpa
from vitreg_kernels.ops.attention.backends.sdpa import one_kernel

FLASH, CUDNN, EFFICIENT, MATH = sdpa.KERNELS
# Those that run on a CPU, each with what only it calls there.
MARKS = {"sdpa_flash": "_scaled_dot_product_flash_attention_for_cpu", "sdpa_math": "_safe_softmax"}

here = pytest.mark.parametrize("name", MARKS)


class Recorded(TorchDispatchMode):
    """The names of the ops that are called."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.names.add(function.overloadpacket.__name__)
        return function(*arguments, **(options or {}))


def its_own(names):
    """The backends whose marks are among ops."""
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
        assert_parity(spec._replace(dtype=dtype), name, draws=4)


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
        graphs.append({str(node.target).split(".")[1] for node in module.graph.nodes if "aten." in str(node.target)})
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


PROGRAMS = ("export", "jit")  # what they make does not keep torch's switches
TRIALS = [trial for trial in transforms.TRIALS if not any(word in trial.name for word in PROGRAMS)]
# Those that tell a fused kernel from the formula; all others are of code that both share.
TOLD_APART = ("`torch.func.vmap`", "second derivative, `create_graph=True`", "`FlopCounterMode`")
TRIED = [
    *(("sdpa_flash", "sdpa", trial) for trial in TRIALS),
    *(("sdpa_math", "reference", trial) for trial in TRIALS if trial.name in TOLD_APART),
]


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize(("name", "like", "trial"), [pytest.param(*t, id=f"{t[0]}-{t[2].name}") for t in TRIED])
def test_transforms_do_what_the_table_says_of_their_like(name, like, trial, tmp_path):
    assert transforms.outcome(trial, Unmasked(), name, tmp_path) == read()[trial.name, "Attention", like]


@pytest.mark.parametrize("trial", [t for t in transforms.TRIALS if t not in TRIALS], ids=lambda trial: trial.name)
def test_programs_that_would_not_keep_the_choice_are_refused(trial, tmp_path):
    said = transforms.outcome(trial, Unmasked(), "sdpa_flash", tmp_path)
    assert said.startswith("backend 'sdpa_flash' cannot serve this call: "), said
    assert any(word in said for word in ("torch.export", "torch.jit.trace", "ONNX"))


def broken(inputs):
    raise RuntimeError("out of memory")


def test_torchs_switches_are_as_the_user_left_them(monkeypatch):
    """After a call, and after one that failed, which is told as it is."""
    query = torch.randn(1, 2, 9, 16)
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        register_attention(query, query, query, backend="sdpa_flash")
        assert [enabled() for enabled, _ in one_kernel._SWITCHES.values()] == [False, False, True, True]
        monkeypatch.setattr(one_kernel.any_kernel, "forward", broken)
        with pytest.raises(RuntimeError, match=r"^out of memory$"):
            register_attention(query, query, query, backend="sdpa_flash")
        assert [enabled() for enabled, _ in one_kernel._SWITCHES.values()] == [False, False, True, True]


@pytest.mark.parametrize("backend", sdpa.KERNELS, ids=TORCHS_KERNELS)
def test_none_is_a_default(backend):
    """Their switches are the whole process's, so nobody gets one who has not named it."""
    assert backend.default == "never"
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
        (EFFICIENT, {"head_dim": 60}, "takes head dims divisible by 8, not 60"),
        (EFFICIENT, {"head_dim": 62, "dtype": torch.float32}, "takes head dims divisible by 4, not 62"),
        (EFFICIENT, {"dtype": torch.float64}, "takes float32, float16 or bfloat16, not float64"),
        (MATH, {"device": "meta"}, "runs on cpu, cuda, mps or xpu, not on meta"),
    ],
    ids=lambda x: getattr(x, "name", None) or str(x),
)
def test_what_is_declared(backend, changes, reason, monkeypatch):
    asked = []
    monkeypatch.setattr(one_kernel, "_probed", lambda *call: asked.append(call) or "")
    call = Request("attention", "cuda", 90, torch.float16, 64)
    assert backend.reasons_against(call) == []
    assert asked == [
        (f"{backend.name.removeprefix('sdpa_').upper()}{'_ATTENTION' * (backend is not MATH)}", "cuda", torch.float16)
    ]
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
@pytest.mark.parametrize("kernel", ["CUDNN_ATTENTION", "EFFICIENT_ATTENTION"])
def test_a_probe_finds_what_has_no_kernel(kernel):
    assert "CUDA" in one_kernel._probed(kernel, "cuda", torch.float16)
    assert one_kernel._probed(kernel, "cpu", torch.float32).startswith(
        "No viable backend for scaled_dot_product_attention"
    )


def test_what_only_the_tensors_tell_is_refused_in_torchs_words_and_by_nobody_else(change_backends):
    """As cuDNN refuses a single token: the request is like any other's."""
    served = (*FLASH.requirements.features, features.DROPOUT)
    change_backends("sdpa_flash", requirements=FLASH.requirements._replace(features=served))
    query = torch.randn(1, 2, 9, 16)
    with Recorded() as recorded, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UnsupportedError) as raised:
            register_attention(query, query, query, dropout_p=0.5, backend="sdpa_flash")
    assert str(raised.value) == (
        "torch's FLASH_ATTENTION cannot serve this call: Both fused kernels do not support non-zero dropout. "
        "Name another backend, such as 'sdpa'"
    )
    assert not its_own(recorded.names)


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
