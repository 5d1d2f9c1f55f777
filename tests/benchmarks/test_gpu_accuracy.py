"""The accuracy stage: poison shows what a kernel leaves out or reads beyond; what fails is named."""

from __future__ import annotations

import math
import sys

import pytest
import torch

from benchmarks.gpu import accuracy
from benchmarks.gpu.poison import BAND, guarded, poisoned
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer
from benchmarks.shapes import LENGTHS
from vitreg_kernels import check
from vitreg_kernels.ops.attention.backends import sdpa
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES, empty_output

CPU = torch.device("cpu")
SETUP = Setup(CPU, dry=True, deadline=math.inf)


@pytest.fixture
def writer(tmp_path, machine):
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


@pytest.fixture
def one_case(monkeypatch):
    """A single case in fp32, so that a broken backend has one row."""

    def cases(dtype, setup):
        if dtype == torch.float32:
            qkv = torch.randn(2, 21, 3, 1, 16, generator=torch.Generator().manual_seed(0))
            yield check.Case("21 tokens", qkv, {"num_prefix_tokens": 5})

    monkeypatch.setattr(accuracy, "_cases", cases)
    monkeypatch.setattr(accuracy, "_DTYPES", {"fp32": torch.float32})
    monkeypatch.setattr(accuracy, "get_args", lambda _: ("fp32",))


def broken(monkeypatch, change):
    right = sdpa.forward
    monkeypatch.setattr(sdpa, "forward", lambda inputs: change(inputs, right))


def only_row(writer):
    (row,) = list(accuracy.run(SETUP, writer))
    assert writer.rows == [row]
    return row


def test_guarded_values_lie_in_nan():
    values = torch.randn(3, 4, 5).transpose(0, 2)
    inside = guarded(values)
    assert torch.equal(inside, values)
    assert inside.stride() == values.stride()
    memory = inside.as_strided((60 + 2 * BAND,), (1,), 0)
    assert memory[:BAND].isnan().all()
    assert memory[-BAND:].isnan().all()
    assert torch.equal(memory[BAND:-BAND], values.transpose(0, 2).flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_uninitialised_memory_is_nan_and_only_within(dtype):
    with poisoned(CPU):
        query = torch.zeros(1, 2, 3, 4, dtype=dtype)
        buffers = (torch.empty(7, dtype=dtype), query.new_empty(7), torch.empty_like(query), empty_output(query))
        assert all(buffer.isnan().all() for buffer in buffers)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(IndexError), poisoned(CPU):
        raise IndexError
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_torch_that_does_not_fill_is_not_trusted(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(*size, device=device))
    with pytest.raises(RuntimeError, match="does not fill uninitialised memory"), poisoned(CPU):
        pass


def test_a_right_backend_passes_in_every_way(writer):
    rows = list(accuracy.run(SETUP, writer))
    assert {row["dtype"] for row in rows} == {"bf16", "fp16", "fp32", "tf32"}
    assert accuracy.failures(rows) == []
    its = [row for row in rows if row["backend"] == "sdpa"]
    plain = {"training output", "inference output", *(f"training {name}" for name in check.GRADIENTS)}
    for row in its:
        assert row["errors"].keys() == {"output", *check.GRADIENTS, *OUTPUT_NAMES, *plain}
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
def test_poison_catches(change, writer, monkeypatch):
    broken(monkeypatch, change)
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
def test_a_crash_is_recorded_and_named(writer, monkeypatch):
    broken(monkeypatch, raises)
    row = only_row(writer)
    assert (row["errors"], row["deterministic"]) == (None, None)
    assert accuracy.failures([row]) == ["sdpa on 21 tokens in fp32: IndexError: out of its bounds"]


@pytest.mark.usefixtures("one_case")
def test_a_crash_that_takes_the_gpu_along_is_recorded_before_the_stage_stops(writer, monkeypatch):
    broken(monkeypatch, raises)
    monkeypatch.setattr(accuracy, "lost", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be used any more by this process, after sdpa on 21 tokens in fp32"):
        list(accuracy.run(SETUP, writer))
    assert [row["crash"] for row in writer.rows] == ["IndexError: out of its bounds\nand more"]
    assert list(accuracy.run(SETUP, writer)) == []


@pytest.mark.usefixtures("one_case")
def test_bits_that_change_fail_an_opaque_backend_only(writer, monkeypatch):
    calls = []

    def drifts(inputs, right):
        calls.append(inputs)
        result = right(inputs)
        return result._replace(output=result.output * (1 + 2e-7 * len(calls)))

    broken(monkeypatch, drifts)
    row = only_row(writer)
    assert row["deterministic"] is False
    assert "two runs differ in bits" not in " ".join(accuracy.failures([row]))
    monkeypatch.setattr(sdpa, "OPAQUE", True)
    assert "sdpa on 21 tokens in fp32: two runs differ in bits" in accuracy.failures([row])


@pytest.mark.usefixtures("one_case")
def test_an_opaque_backend_that_serves_nothing_fails(writer, monkeypatch):
    monkeypatch.setattr(check, "not_served", lambda backend, case: ["needs a moon"])
    row = only_row(writer)
    assert accuracy.failures([row]) == []
    monkeypatch.setattr(sdpa, "OPAQUE", True)
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


def test_the_named_shapes_are_there_the_goals_first(monkeypatch):
    cases = list(accuracy._cases(torch.float16, SETUP._replace(dry=False)))
    shapes = {(case.qkv.shape[1], case.qkv.shape[-1]) for case in cases if "cu_seqlens" not in case.options}
    assert {(n, 64) for n in (1, *LENGTHS)} | {(n, 128) for n in (201, 261, 1029)} <= shapes
    many = {case.qkv.shape[1] for case in cases if case.qkv.shape[0] * case.qkv.shape[3] >= 300}
    assert many == {54, 201, 261}
    packs = [case.options["cu_seqlens"].diff().tolist() for case in cases if "cu_seqlens" in case.options]
    assert [261] * 2 + [54] * 8 in packs
    assert any("rope" in case.options for case in cases)
    assert any("attn_mask" in case.options for case in cases)
    assert all(case.qkv.dtype == torch.float16 for case in cases)
    names = [case.name for case in cases]
    assert len(set(names)) == len(names)  # a row is found by its name

    monkeypatch.setattr(accuracy, "_cases", lambda dtype, setup: cases)
    ordered = [piece.case.name for piece in accuracy._pieces(SETUP)]
    goals = 4 * (len(LENGTHS) + len(many))
    assert set(ordered[:goals]) == accuracy._GOALS
    assert not accuracy._GOALS & set(ordered[goals:])
