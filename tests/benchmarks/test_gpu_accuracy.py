"""The accuracy stage: poison shows what a kernel leaves out or reads beyond; what fails is named."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from benchmarks.gpu import accuracy, pieces
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer
from benchmarks.shapes import LENGTHS
from vitreg_kernels.measure.cases import attention
from vitreg_kernels.measure.oracle import Call
from vitreg_kernels.ops.attention.backends import sdpa
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

CPU = torch.device("cpu")
SETUP = Setup(CPU, dry=True, deadline=math.inf)


@pytest.fixture
def writer(tmp_path, machine):
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


@pytest.fixture
def one_case(monkeypatch):
    """A single case in fp32, and of torch's kernels its own choice, so that a broken backend has one row."""

    def calls(dtype, setup):
        if dtype == torch.float32:
            qkv = torch.randn(2, 21, 3, 1, 16, generator=torch.Generator().manual_seed(0))
            yield attention.call(qkv, name="21 tokens", num_prefix_tokens=5, outputs=OUTPUT_NAMES)

    monkeypatch.setattr(accuracy, "_calls", calls)
    monkeypatch.setattr(accuracy, "_DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(accuracy, "get_args", lambda _: ("fp32",))
    monkeypatch.setattr(accuracy, "BACKENDS", [b for b in accuracy.BACKENDS if b not in sdpa.KERNELS])


def broken(change_backends, change):
    right = sdpa.forward
    change_backends("sdpa", forward=lambda inputs: change(inputs, right))


def only_row(writer):
    (row,) = list(accuracy.run(SETUP, writer))
    assert writer.rows == [row]
    return row


def test_a_right_backend_passes_in_every_way(writer):
    rows = list(accuracy.run(SETUP, writer))
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32", "tf32"}
    assert accuracy.failures(rows) == []
    its = [row for row in rows if row["backend"] == "sdpa"]
    plain = {"training output", "inference output", *(f"training {name}" for name in attention.GRADIENTS)}
    for row in its:
        assert row["errors"].keys() == {"output", *attention.GRADIENTS, *OUTPUT_NAMES, *plain}
        assert row["deterministic"] is True
        assert (row["reasons"], row["crash"]) == ([], None)


def leaves_one_out(inputs, right):
    result = right(inputs)
    written = torch.ones_like(result.output, dtype=torch.bool)
    written[-1, -1, -1, -1] = False
    return result._replace(output=result.output.where(written, torch.empty_like(result.output)))


def reads_beyond(inputs, right):
    """The token after the last one, with the weight of a millionth."""
    value = inputs.value
    beyond = value.as_strided(value.shape, value.stride(), value.storage_offset() + value.stride(2))
    return right(inputs._replace(value=value + 1e-6 * (beyond - value)))


@pytest.mark.usefixtures("one_case")
@pytest.mark.parametrize("change", [leaves_one_out, reads_beyond])
def test_poison_catches(change, writer, change_backends, monkeypatch):
    monkeypatch.setattr(accuracy, "_opaque", lambda: {"sdpa"})  # whose memory is poisoned: our own kernels'
    broken(change_backends, change)
    row = only_row(writer)
    for tensor in ("output", "training output", "inference output"):
        assert row["errors"][tensor]["max"] == sys.float_info.max  # NaN
    told = accuracy.failures([row])
    assert any(sentence.startswith("sdpa on 21 tokens in fp32: inference output is") for sentence in told)


@pytest.mark.usefixtures("one_case")
def test_a_wrong_gradient_of_the_packed_call_alone_is_named(writer, monkeypatch):
    right = accuracy.functional.register_attention_qkv

    def wrong(qkv, **options):
        output = right(qkv, **options)
        return output + 1e-3 * (output - output.detach())

    monkeypatch.setattr(accuracy.functional, "register_attention_qkv", wrong)
    told = accuracy.failures([only_row(writer)])
    assert told
    assert all("fp32: training grad_" in sentence for sentence in told)


def raises(inputs, right):
    raise IndexError("out of its bounds\nand more")


@pytest.mark.usefixtures("one_case")
def test_a_crash_is_recorded_and_named(writer, change_backends):
    broken(change_backends, raises)
    row = only_row(writer)
    assert (row["errors"], row["deterministic"]) == (None, None)
    assert accuracy.failures([row]) == ["sdpa on 21 tokens in fp32: IndexError: out of its bounds"]


@pytest.mark.usefixtures("one_case")
def test_a_crash_that_takes_the_gpu_along_is_recorded_before_the_stage_stops(writer, monkeypatch, change_backends):
    broken(change_backends, raises)
    for module in (accuracy, pieces):
        monkeypatch.setattr(module, "lost", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be used any more by this process, after 21 tokens in fp32"):
        list(accuracy.run(SETUP, writer))
    assert [row["crash"] for row in writer.rows] == ["IndexError: out of its bounds\nand more"]
    assert list(accuracy.run(SETUP, writer)) == []


@pytest.mark.usefixtures("one_case")
def test_bits_that_change_fail_an_opaque_backend_only(writer, change_backends):
    calls = []

    def drifts(inputs, right):
        calls.append(inputs)
        result = right(inputs)
        return result._replace(output=result.output * (1 + 2e-7 * len(calls)))

    broken(change_backends, drifts)
    row = only_row(writer)
    assert row["deterministic"] is False
    assert "two runs differ in bits" not in " ".join(accuracy.failures([row]))
    change_backends("sdpa", opaque=True)
    assert "sdpa on 21 tokens in fp32: two runs differ in bits" in accuracy.failures([row])


@pytest.mark.usefixtures("one_case")
def test_an_opaque_backend_that_serves_nothing_fails(writer, monkeypatch, change_backends):
    monkeypatch.setattr(Call, "reasons_against", lambda self, backend: ["needs a moon"])
    row = only_row(writer)
    assert accuracy.failures([row]) == []
    change_backends("sdpa", opaque=True)
    assert accuracy.failures([row]) == ["sdpa served no case: needs a moon"]


def test_what_is_done_is_not_done_again_and_nothing_is_begun_after_the_deadline(writer):
    everything = accuracy.unfinished(SETUP, writer)
    expired = SETUP._replace(deadline=0.0)
    assert list(accuracy.run(expired, writer)) == []
    work = accuracy.run(SETUP, writer)
    for _ in range(2):
        next(work)
    work.close()
    left = accuracy.unfinished(SETUP, writer)
    assert 0 < left < everything
    before = list(writer.rows)
    assert len(list(accuracy.run(SETUP, writer))) == everything * len(accuracy._backends(SETUP)) - len(before)
    assert accuracy.unfinished(SETUP, writer) == 0
    assert list(accuracy.run(SETUP, writer)) == []


def test_tf32_is_allowed_for_its_own_cases_only(writer, monkeypatch):
    seen = {}
    judged = accuracy._judged

    def watch(piece, *rest):
        seen[piece.dtype] = torch.backends.cuda.matmul.fp32_precision
        return judged(piece, *rest)

    before = torch.backends.cuda.matmul.fp32_precision
    monkeypatch.setattr(accuracy, "_judged", watch)
    list(accuracy.run(SETUP, writer))
    assert seen == {"bf16": "ieee", "fp16": "ieee", "fp32": "ieee", "tf32": "tf32"}
    assert torch.backends.cuda.matmul.fp32_precision == before


def is_pack(call):
    return "cu_seqlens" in call.arguments


def test_the_named_shapes_are_there_the_goals_first(monkeypatch):
    calls = list(accuracy._calls(torch.float16, SETUP._replace(dry=False)))
    qkvs = {call.name: call.arguments["qkv"] for call in calls}
    assert len(qkvs) == len(calls)  # a row is found by its name
    shapes = {(qkvs[call.name].shape[1], qkvs[call.name].shape[-1]) for call in calls if not is_pack(call)}
    assert {(n, 64) for n in (1, *LENGTHS)} | {(n, 128) for n in (201, 261, 1029)} <= shapes
    many = {qkv.shape[1] for qkv in qkvs.values() if qkv.shape[0] * qkv.shape[3] >= 300}
    assert many == {54, 201, 261}
    packs = [call.arguments["cu_seqlens"].diff().tolist() for call in calls if is_pack(call)]
    assert [261] * 2 + [54] * 8 in packs
    assert any("rope" in call.arguments for call in calls)
    assert any("attn_mask" in call.arguments for call in calls)
    assert all(qkv.dtype == torch.float16 for qkv in qkvs.values())

    monkeypatch.setattr(accuracy, "_calls", lambda dtype, setup: calls)
    ordered = accuracy._pieces(SETUP)
    assert list(dict.fromkeys(piece.dtype for piece in ordered)) == ["bf16", "fp16", "fp32", "tf32"]
    goals = len(LENGTHS) + len(many)
    for start in range(0, len(ordered), len(calls)):
        names = [piece.call.name for piece in ordered[start : start + len(calls)]]
        assert len({piece.dtype for piece in ordered[start : start + len(calls)]}) == 1
        assert set(names[:goals]) == accuracy._GOALS
        assert not accuracy._GOALS & set(names[goals:])
