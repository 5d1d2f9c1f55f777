"""FlashAttention as a backend: which release runs, what it is handed, and what is said where there is none.

In place of the packages, which need a GPU, stand functions of their signatures that check what they get and compute the
formula.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from cases import Spec, make_options, make_qkv, views

from vitreg_kernels import UnsupportedError, explain
from vitreg_kernels.dispatch import Request
from vitreg_kernels.dispatch.rules import select_cached
from vitreg_kernels.functional import register_attention, register_attention_qkv
from vitreg_kernels.ops.attention import features
from vitreg_kernels.ops.attention.backends import flash_attn
from vitreg_kernels.ops.attention.backends.flash_attn import BACKEND, RELEASES

CALL = Request("attention", "cuda", 90, torch.float16, 64)
KINDS = [
    Spec(rope="halves"),
    Spec(rope="pairs", rope_batch=True, scale=-0.3, outputs=("lse",)),
    Spec(outputs=(), layout="strided_channels"),
    Spec(batch=1, tokens=33, lengths=(9, 12, 12)),
]


class Fake:
    """A release: its functions keep what they were called with in ``calls``."""

    def __init__(self):
        self.calls = []

    def attend(self, q, k, v, scale, deterministic):
        assert q.shape == k.shape == v.shape
        assert q.ndim == 4
        assert scale is None or isinstance(scale, float)
        self.calls.append(("flash_attn_func", q.shape, deterministic))
        return self.formula(q, k, v, scale)

    def attend_packed(self, q, k, v, bounds, longest, scale, deterministic):
        (bounds, of_keys), (longest, of_longest_key) = bounds, longest
        assert q.shape == k.shape == v.shape
        assert q.ndim == 3
        assert bounds.dtype == torch.int32
        assert of_keys is bounds
        assert longest == of_longest_key == bounds.diff().max()
        self.calls.append(("flash_attn_varlen_func", q.shape, deterministic))
        images = zip(*(x.tensor_split(bounds[1:-1].tolist()) for x in (q, k, v)), strict=True)
        return torch.cat([self.formula(*(x[None] for x in image), scale)[0] for image in images])

    @staticmethod
    def formula(q, k, v, scale):
        """On ``[B, N, H, D]``."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return torch.einsum("bhnm,bmhd->bnhd", (torch.einsum("bnhd,bmhd->bhnm", q, k) * scale).softmax(-1), v)


class FlashAttention2(Fake):
    def flash_attn_func(
        self,
        q,
        k,
        v,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ):
        assert not dropout_p
        assert not causal
        return self.attend(q, k, v, softmax_scale, deterministic)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
        block_table=None,
    ):
        assert not dropout_p
        assert not causal
        bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return self.attend_packed(q, k, v, bounds, longest, softmax_scale, deterministic)


class FlashAttention3(Fake):
    def flash_attn_func(
        self, q, k, v, softmax_scale=None, causal=False, qv=None, *, deterministic=False, sm_margin=0
    ):  # and more, by name
        assert not causal
        return self.attend(q, k, v, softmax_scale, deterministic)

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        *,
        deterministic=False,
    ):
        assert seqused_q is None
        bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return self.attend_packed(q, k, v, bounds, longest, softmax_scale, deterministic)


class FlashAttention4(Fake):
    """Gives the log-sum-exp too, if only ``None``."""

    def flash_attn_func(
        self, q, k, v, qv=None, gather_kv_indices=None, softmax_scale=None, causal=False, *, deterministic=False
    ):
        assert qv is None
        return self.attend(q, k, v, softmax_scale, deterministic), None

    def flash_attn_varlen_func(
        self,
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        softmax_scale=None,
        causal=False,
        *,
        deterministic=False,
    ):
        assert qv is None
        bounds, longest = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k)
        return self.attend_packed(q, k, v, bounds, longest, softmax_scale, deterministic), None


MADE = dict(zip(RELEASES, (FlashAttention3, FlashAttention4, FlashAttention2), strict=True))


@pytest.fixture
def install(monkeypatch, change_backends):
    """Called with releases, installs them and nothing else, as if they ran in fp32 on a CPU."""
    ask = flash_attn.probe.refusal
    monkeypatch.setattr(flash_attn.probe, "refusal", lambda call, device: ask(call, "cpu"))
    requirements = BACKEND.requirements._replace(devices=("cpu",), dtypes=(torch.float32,))
    change_backends("flash_attn", requirements=requirements)
    monkeypatch.setattr(flash_attn, "_REQUIREMENTS", requirements)

    def install(*releases):
        flash_attn._find.cache_clear()
        monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # the package of flash_attn.cute
        for release in RELEASES[:2]:
            monkeypatch.setitem(sys.modules, release, None)  # as if it could not be found
        made = [MADE[release]() for release in releases]
        for release, module in zip(releases, made, strict=True):
            monkeypatch.setitem(sys.modules, release, module)
        return made

    yield install
    flash_attn._find.cache_clear()


@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("spec", KINDS, ids=str)
def test_every_release_gets_its_layout_and_gives_the_formula(release, spec, install):
    (fake,) = install(release)
    results = []
    for backend in ("flash_attn", "reference"):
        qkv = make_qkv(spec).requires_grad_()
        result = register_attention(*views(qkv), **make_options(spec), backend=backend)
        output, statistics = result if spec.outputs else (result, ())
        results.append((output, *statistics, *torch.autograd.grad(output.sin().sum(), qkv)))
    torch.testing.assert_close(*results)
    assert results[0][0].transpose(1, 2).is_contiguous()
    shape = (33, 2, 16) if spec.lengths else (2, 21, 2, 16)
    _, (function, given, deterministic) = fake.calls  # the first is the probe's
    assert function == ("flash_attn_varlen_func" if spec.lengths else "flash_attn_func")
    assert (given, deterministic) == (shape, False)


def test_the_first_release_that_runs_is_taken(install):
    query = torch.randn(1, 2, 9, 16)
    three, four, two = install(*RELEASES)
    register_attention(query, query, query, backend="flash_attn")
    assert [len(fake.calls) for fake in (three, four, two)] == [2, 0, 0]
    four, two = install(*RELEASES[1:])
    four.flash_attn_func = refuse
    register_attention(query, query, query, backend="flash_attn")
    assert [len(fake.calls) for fake in (four, two)] == [0, 2]


def refuse(*arguments, **options):
    raise AssertionError("Unsupported compute capability.\nSupported: 9.x")


def test_where_none_runs_each_says_why(install):
    (four,) = install("flash_attn.cute")
    four.flash_attn_func = refuse
    query = torch.randn(1, 2, 9, 16)
    words = (
        "no release of FlashAttention runs here (flash_attn_interface: import of flash_attn_interface halted; "
        "None in sys.modules; flash_attn.cute: Unsupported compute capability; "
        "flash_attn: module 'flash_attn' has no attribute 'flash_attn_func')"
    )
    assert explain(query).reasons["flash_attn"] == [words]
    select_cached.cache_clear()
    with pytest.raises(UnsupportedError) as raised:
        register_attention(query, query, query, backend="flash_attn")
    assert words in str(raised.value)


@pytest.mark.skipif(any(map(importlib.util.find_spec, ("flash_attn", "flash_attn_interface"))), reason="is installed")
def test_nothing_installed():
    flash_attn._find.cache_clear()
    try:
        (reason,) = flash_attn._refuses(CALL)
    finally:
        flash_attn._find.cache_clear()
    assert reason.startswith("no release of FlashAttention runs here (flash_attn_interface: ")


def test_torchs_switch_for_deterministic_gradients_is_heeded(install):
    (fake,) = install("flash_attn")
    query = torch.randn(1, 2, 9, 16)
    torch.use_deterministic_algorithms(True)
    try:
        register_attention(query, query, query, backend="flash_attn")
    finally:
        torch.use_deterministic_algorithms(False)
    assert fake.calls[-1][-1] is True


def test_an_empty_batch_needs_no_call(install):
    (fake,) = install("flash_attn")
    qkv = torch.randn(0, 7, 3, 2, 16, requires_grad=True)
    output = register_attention_qkv(qkv, backend="flash_attn")
    assert output.shape == (0, 7, 32)
    assert torch.autograd.grad(output.sum(), qkv)[0].shape == qkv.shape
    assert len(fake.calls) == 1  # the probe's


@pytest.mark.usefixtures("dynamo")
def test_a_graph_takes_another_and_a_named_one_says_so(install):
    (fake,) = install("flash_attn")
    query = torch.randn(1, 2, 9, 16)
    compiled = torch.compile(register_attention, backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match=r"cannot be traced by torch\.compile"):
        compiled(query, query, query, backend="flash_attn")
    compiled(query, query, query)
    assert not fake.calls


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"device": "cpu", "capability": 0}, "runs on cuda, not on cpu"),
        ({"capability": 75}, "runs on sm_80 and newer, not on sm_75"),
        ({"dtype": torch.float32}, "takes float16 or bfloat16, not float32"),
        ({"head_dim": 60}, "takes head dims divisible by 8, not 60"),
        ({"head_dim": 256}, "takes head dims 8 to 128, not 256"),
        ({"features": (features.KEY_PADDING_MASK,)}, "does not support key-padding masks"),
        ({"features": (features.DROPOUT,)}, "does not support dropout"),
    ],
)
def test_what_is_declared(changes, reason, monkeypatch):
    asked = []
    monkeypatch.setattr(flash_attn, "_find", lambda dtype: asked.append(dtype) or flash_attn._Found("flash_attn", []))
    assert BACKEND.reasons_against(CALL) == []
    assert BACKEND.reasons_against(CALL._replace(**changes)) == [reason]
    assert len(asked) == 1, "what is declared needs no call"
    assert BACKEND.default == "if measured"
