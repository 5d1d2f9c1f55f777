"""Every adapter hands its library the layout that it takes, and gives back what the formula does, gradients included.

In place of libraries that need a GPU stand functions of their signatures that check what they get and compute eagerly.
"""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from benchmarks import contest, machine, peers
from benchmarks.peers import (
    EAGER,
    Peer,
    attempt,
    everyone,
    flash_attention,
    onnxruntime,
    pack_of,
    pytorch,
    xformers,
)
from benchmarks.shapes import Case
from vitreg_kernels._triton import mode
from vitreg_kernels.measure.race import Stopped

CPU = torch.device("cpu")
CROPS = ((2, 9), (3, 6))
CASES = {
    "packed": Case(2, 3, 11, "fp32", "forward+backward", 16),
    "separate": Case(2, 3, 11, "fp32", "forward+backward", 16, layout="separate"),
    "multicrop": Case(2, 3, 36, "fp32", "forward+backward", 16, layout="multicrop", crops=CROPS),
}
PACK = pack_of(contest.runs_of(CASES["multicrop"]), CPU)
PACKS = {"packed": None, "separate": None, "multicrop": PACK}
QKV_PACKED, VARLEN_QKV_PACKED = "flash_attn_qkvpacked_func", "flash_attn_varlen_qkvpacked_func"
FUNC, VARLEN = "flash_attn_func", "flash_attn_varlen_func"


def agrees(attend, layout) -> None:
    tensors = contest.inputs_of(CASES[layout], CPU)()
    torch.testing.assert_close(
        contest.job(attend, *tensors), contest.job(EAGER.attend(layout, PACKS[layout]), *tensors)
    )


def formula(query, key, value):
    """On token-major ``[B, N, H, D]``; grouped or transposed heads would come out wrong."""
    assert query.stride(-1) == key.stride(-1) == value.stride(-1) == 1
    assert query.shape == key.shape == value.shape == (*query.shape[:2], 3, 16)
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)


def varlen_formula(query, key, value, bounds, longest):
    assert bounds.dtype == torch.int32
    assert bounds.tolist() == [0, 9, 18, 27, 36, *range(42, 73, 6)]
    assert longest == 9
    starts_and_ends = zip(bounds.tolist(), bounds.tolist()[1:], strict=False)
    images = [formula(*(x[None, a:b] for x in (query, key, value)))[0] for a, b in starts_and_ends]
    return torch.cat(images)


def test_the_formula_on_crops_is_that_of_each_image():
    qkv, _ = contest.inputs_of(CASES["multicrop"], CPU)()
    wanted = varlen_formula(*qkv[0].unbind(1), PACK.cu_seqlens, PACK.max_seqlen)
    torch.testing.assert_close(EAGER.multicrop(qkv, PACK), wanted.flatten(1)[None])


def test_crops_lie_by_size_and_not_by_sample():
    assert PACK.runs == ((4, 9), (6, 6))
    assert PACK.lengths == [9] * 4 + [6] * 6
    assert [batch.shape for batch in PACK.batches(torch.zeros(1, 72, 5))] == [(4, 9, 5), (6, 6, 5)]


@pytest.mark.parametrize("layout", CASES)
def test_what_runs_here_agrees_in_every_layout(layout):
    tensors = contest.inputs_of(CASES[layout], CPU)()
    wanted = contest.job(EAGER.attend(layout, PACKS[layout]), *tensors)
    raced = set()
    for peer in everyone(layout, PACKS[layout]):
        if peer.name != "torch:flex" and not isinstance(answer := attempt(peer, contest.job, *tensors), Stopped):
            raced.add(peer.name)
            torch.testing.assert_close(answer, wanted)
    assert {"vitreg:sdpa", "vitreg:reference", "torch:math", "torch:flash"} <= raced


def test_flex_attention_serves_packed_and_separate_inputs(monkeypatch):
    monkeypatch.setattr(pytorch, "_compiled_flex", lambda: F.scaled_dot_product_attention)  # of the same layout
    for layout in CASES:
        agrees(pytorch.flex(layout, PACKS[layout]).attend, layout)


class FlashAttention:
    """A release's functions, in their order of arguments; ``called`` names those that were."""

    def __init__(self, *, tuples: bool) -> None:
        self.tuples = tuples
        self.called: list[str] = []

    def give(self, name, output):
        self.called.append(name)
        return (output, output.new_zeros(1)) if self.tuples else output

    def flash_attn_func(self, q, k, v):
        return self.give(FUNC, formula(q, k, v))

    def flash_attn_qkvpacked_func(self, qkv):
        assert qkv.is_contiguous()
        assert qkv.shape == (2, 11, 3, 3, 16)
        return self.give(QKV_PACKED, formula(*qkv.unbind(2)))


class FlashAttention2(FlashAttention):
    def flash_attn_varlen_qkvpacked_func(self, qkv, cu_seqlens, max_seqlen):
        assert qkv.shape == (72, 3, 3, 16)
        return self.give(VARLEN_QKV_PACKED, varlen_formula(*qkv.unbind(1), cu_seqlens, max_seqlen))


class FlashAttention3(FlashAttention):
    def flash_attn_varlen_func(self, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k):
        assert cu_seqlens_k is cu_seqlens_q
        assert max_seqlen_k == max_seqlen_q
        return self.give(VARLEN, varlen_formula(q, k, v, cu_seqlens_q, max_seqlen_q))


class FlashAttention4(FlashAttention):
    flash_attn_qkvpacked_func = None  # as in the release: nothing may call it

    def flash_attn_varlen_func(
        self, q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None
    ):
        assert qv is None
        assert cu_seqlens_k is cu_seqlens_q
        assert max_seqlen_k == max_seqlen_q
        return self.give(VARLEN, varlen_formula(q, k, v, cu_seqlens_q, max_seqlen_q))


@pytest.mark.parametrize(
    ("name", "module", "release", "called"),
    [
        ("flash-attn:2", "flash_attn", FlashAttention2(tuples=False), [QKV_PACKED, FUNC, VARLEN_QKV_PACKED]),
        ("flash-attn:3", "flash_attn_interface", FlashAttention3(tuples=False), [QKV_PACKED, FUNC, VARLEN]),
        ("flash-attn:3", "flash_attn_interface", FlashAttention3(tuples=True), [QKV_PACKED, FUNC, VARLEN]),
        ("flash-attn:4", "flash_attn.cute", FlashAttention4(tuples=True), [FUNC, FUNC, VARLEN]),
    ],
    ids=["2", "3", "3 with tuples", "4"],
)
def test_flash_attention_gets_its_layout_and_its_answer_is_unpacked(monkeypatch, name, module, release, called):
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))  # the package of flash_attn.cute
    monkeypatch.setitem(sys.modules, module, release)
    for layout in CASES:
        (peer,) = (peer for peer in flash_attention.peers(layout, PACKS[layout]) if peer.name == name)
        before = len(release.called)
        agrees(peer.attend, layout)
        assert set(release.called[before:]) == {called[list(CASES).index(layout)]}


@pytest.mark.parametrize("layout", CASES)
@pytest.mark.parametrize(
    ("name", "module"),
    [("flash-attn:2", "flash_attn"), ("flash-attn:3", "flash_attn_interface"), ("flash-attn:4", "flash_attn")],
)
def test_a_library_that_is_missing_says_so_itself(layout, name, module):
    if importlib.util.find_spec(module):
        pytest.skip(f"{module} is installed here")
    (peer,) = (peer for peer in everyone(layout, PACKS[layout]) if peer.name == name)
    stopped = attempt(peer, contest.job, *contest.inputs_of(CASES[layout], CPU)())
    assert stopped == Stopped(f"ModuleNotFoundError: No module named '{module}'", failed=False)


def test_xformers_gets_and_gives_token_major_tensors(monkeypatch):
    masks = []

    class BlockDiagonalMask:
        @classmethod
        def from_seqlens(cls, seqlens, *, device):
            masks.append(cls())
            masks[-1].bounds = torch.tensor([0, *seqlens], device=device).cumsum(0).int()
            return masks[-1]

    def memory_efficient_attention(query, key, value, attn_bias=None):
        if attn_bias is None:
            return formula(query, key, value)
        assert len(query) == 1
        return varlen_formula(query[0], key[0], value[0], attn_bias.bounds, 9)[None]

    fmha = types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)
    fmha.attn_bias = fmha
    ops = types.SimpleNamespace(memory_efficient_attention=memory_efficient_attention, fmha=fmha)
    for name, module in (
        ("xformers", types.ModuleType("xformers")),
        ("xformers.ops", ops),
        ("xformers.ops.fmha", fmha),
    ):
        monkeypatch.setitem(sys.modules, name, module)
    xformers._block_diagonal.cache_clear()
    for layout in (*CASES, "multicrop"):
        agrees(xformers.peer(layout, PACKS[layout]).attend, layout)
    assert len(masks) == 1  # made once, as training loops do
    xformers._block_diagonal.cache_clear()


def test_torchs_kernel_for_several_lengths_gets_its_layout_and_takes_no_other(monkeypatch):
    def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k):
        assert cu_seq_k is cu_seq_q
        assert max_k == max_q
        return varlen_formula(query, key, value, cu_seq_q, max_q)

    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", types.SimpleNamespace(varlen_attn=varlen_attn))
    varlen = {layout: next(p for p in everyone(layout, PACKS[layout]) if p.name == "torch:varlen") for layout in CASES}
    agrees(varlen["multicrop"].attend, "multicrop")
    assert varlen["multicrop"].refuses(torch.zeros(1)) == "runs on cuda, not on cpu"
    for layout in ("packed", "separate"):
        assert "one length" in varlen[layout].refuses(torch.zeros(1))


@pytest.fixture
def onnxruntime_peer():
    (peer,) = (peer for peer in peers.peers("quick") if peer.name == "onnxruntime")
    yield peer
    onnxruntime._session.cache_clear()


def test_onnxruntime_gives_what_the_formula_does_on_as_many_threads_as_torch(onnxruntime_peer, monkeypatch):
    library = pytest.importorskip("onnxruntime")
    onnxruntime._session.cache_clear()
    threads, session = [], library.InferenceSession

    def watch(model, options, **rest):
        threads.append(options.intra_op_num_threads)
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        return session(model, options, **rest)

    monkeypatch.setattr(library, "InferenceSession", watch)
    for count in (2, 1, 2):
        for heads, tokens in ((3, 11), (3, 7), (2, 11)):
            qkv, _ = contest.inputs_of(Case(2, heads, tokens, "fp32", "forward", 16), CPU)()
            with machine.threads(count):
                torch.testing.assert_close(onnxruntime_peer.attend(qkv), peers.eager(qkv))
    assert threads == [2, 2, 1, 1]  # a session for each number of heads and threads, of any batch and length


def test_onnxruntime_refuses_in_a_few_words(onnxruntime_peer):
    qkv = torch.zeros(1, 3, 3, 1, 16)
    assert onnxruntime_peer.refuses(qkv) is None
    assert onnxruntime_peer.refuses(qkv.bfloat16()) == "has no MultiHeadAttention in bfloat16 on a CPU"
    assert onnxruntime_peer.refuses(qkv.requires_grad_()) == "has no backward"
    assert onnxruntime_peer.refuses(qkv.to("meta")) == "is raced on CPUs only"


def test_without_onnxruntime_it_says_so_itself(onnxruntime_peer, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    onnxruntime._session.cache_clear()
    stopped = attempt(onnxruntime_peer, contest.job, *contest.inputs_of(Case(1, 1, 3, "fp32", "forward", 16), CPU)())
    assert not stopped.failed
    assert "onnxruntime" in stopped.reason


def test_the_compiled_contender_is_the_formula_compiled_whole(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append((function, options)) or function)
    pytorch._compiled_formula.cache_clear()
    try:
        (peer,) = (peer for peer in peers.peers("quick") if peer.name == "torch:compile")
        agrees(peer.attend, "packed")
        assert peer.refuses(torch.zeros(1)) is None
    finally:
        pytorch._compiled_formula.cache_clear()
    assert asked == [(EAGER.packed, {"dynamic": False, "fullgraph": True})]


def test_a_refusal_from_without_comes_before_a_contenders_own():
    peer = Peer("a", EAGER.packed, refuses=lambda qkv: "own")
    assert peer.unless(lambda qkv: "from without").refuses(torch.zeros(1)) == "from without"
    assert peer.unless(lambda qkv: None).refuses(torch.zeros(1)) == "own"


def test_a_call_that_names_no_backend_gets_the_one_that_is_marked():
    for layout, case in CASES.items():
        *inputs, _ = contest.inputs_of(case, CPU)()
        assert peers.vitreg.default(PACKS[layout], *inputs) == "vitreg:sdpa"


def test_the_interpreter_is_refused_in_the_race_for_speed_only(monkeypatch):
    monkeypatch.setattr(mode, "INTERPRETING", True)
    qkv = torch.zeros(1, 6, 3, 1, 16)
    for contenders, refused in ((peers.peers("quick"), True), (everyone("packed", None), False)):
        reason = next(peer for peer in contenders if peer.name == "vitreg:triton").refuses(qkv)
        assert ("under Triton's interpreter" in (reason or "")) is refused
