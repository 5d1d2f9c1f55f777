"""The price of outputs, rehearsed on a CPU: every set against none, interleaved, and what breaks is named."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from benchmarks.gpu import outputs, pieces, stage
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer
from vitreg_kernels import functional
from vitreg_kernels.measure import timing
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

RUN = {"command": "gpu"}
DRY = Setup(torch.device("cpu"), dry=True, deadline=math.inf)
FOUR = {"lse", "max_logit", "token_norms", "prefix_attention"}


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    return Writer(tmp_path / "run.json", RUN, machine)


def test_every_set_is_measured_against_none_in_one_interleaved_run(writer, monkeypatch):
    runs = []
    interleave = timing.interleave
    monkeypatch.setattr(
        timing, "interleave", lambda variants, *a, **k: runs.append(variants) or interleave(variants, *a, **k)
    )
    assert outputs.unfinished(DRY, writer) == 1
    rows = list(outputs.run(DRY, writer))
    assert outputs.unfinished(DRY, writer) == 0
    assert outputs.failures(writer.rows) == []
    assert writer.rows == rows
    assert {row["backend"] for row in rows} == {"triton", "sdpa"}
    (variants,) = runs
    assert len(variants) == sum(row["reason"] is None for row in rows) >= 8
    sdpa = {frozenset(row["outputs"]): row for row in rows if row["backend"] == "sdpa"}
    singles = [frozenset([name]) for name in OUTPUT_NAMES]
    assert list(sdpa) == [frozenset(), *singles, frozenset(FOUR), frozenset(OUTPUT_NAMES)]
    for row in sdpa.values():
        assert row["ratio"] == row["median_ms"] / sdpa[frozenset()]["median_ms"]
    goals = {(row["backend"], frozenset(row["outputs"])): row["goal"] for row in rows if row["goal"] is not None}
    assert goals == {
        ("triton", frozenset(FOUR)): 1.05,
        ("triton", frozenset(["received_attention"])): 1.35,
        ("triton", frozenset(OUTPUT_NAMES)): 1.35,
    }


def test_each_call_asks_for_what_its_row_says(writer, monkeypatch):
    asked = []
    attend = functional.register_attention_qkv

    def spy(qkv, **options):
        asked.append((options["backend"], options["outputs"], qkv.requires_grad, options["num_prefix_tokens"]))
        return attend(qkv, **options)

    monkeypatch.setattr(functional, "register_attention_qkv", spy)
    rows = list(outputs.run(DRY, writer))
    assert set(asked) == {(row["backend"], tuple(row["outputs"]), False, 5) for row in rows}


def test_a_call_that_breaks_is_named_and_leaves_the_others(writer, monkeypatch):
    attend = functional.register_attention_qkv

    def broken(qkv, **options):
        if options["backend"] == "sdpa" and options["outputs"] == ("lse",):
            raise IndexError("out of\nits bounds")
        return attend(qkv, **options)

    monkeypatch.setattr(functional, "register_attention_qkv", broken)
    rows = list(outputs.run(DRY, writer))
    assert outputs.failures([{"kind": "stage"}, *rows]) == [
        "sdpa with outputs=('lse',) at N = 22 in fp32: IndexError: out of its bounds"
    ]
    assert sum(row["ratio"] is not None for row in rows if row["backend"] == "sdpa") == 7


def test_without_the_plain_call_there_is_no_ratio(writer, monkeypatch):
    attend = functional.register_attention_qkv

    def broken(qkv, **options):
        if not options["outputs"]:
            raise IndexError("out of its bounds")
        return attend(qkv, **options)

    monkeypatch.setattr(functional, "register_attention_qkv", broken)
    rows = list(outputs.run(DRY, writer))
    assert {row["ratio"] for row in rows} == {None}
    assert any(row["median_ms"] for row in rows)


def test_the_full_size_takes_the_lengths_of_the_goals_and_goes_on_after_a_cut(writer, monkeypatch):
    whole = DRY._replace(dry=False)
    cases = outputs._cases(whole)
    assert [(case.tokens, case.dtype, case.mode) for case in cases] == [
        (n, "bf16", "forward") for n in (261, 201, 1029)
    ]
    assert all(case.batch * case.heads >= 1024 for case in cases)
    costed = []
    (tiny,) = outputs._cases(DRY)
    cost = outputs.cost

    def quick(case, setup, writer):
        costed.append(case.tokens)
        return [row | {"tokens": case.tokens, "dtype": "bf16"} for row in cost(tiny, DRY, writer)]

    monkeypatch.setattr(outputs, "cost", quick)
    clock = itertools.count()
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(clock))
    list(outputs.run(whole._replace(deadline=2), writer))
    assert costed == [261, 201]
    assert outputs.unfinished(whole, writer) == 1
    list(outputs.run(whole, writer))
    assert costed == [261, 201, 1029]
    assert outputs.unfinished(whole, writer) == 0


def test_a_kernel_that_the_smoke_test_found_wrong_is_not_asked(writer, monkeypatch):
    monkeypatch.setattr(outputs.smoke, "against", lambda backend, *_, **__: f"{backend} is wrong")
    rows = list(outputs.run(DRY, writer))
    reasons = {(row["backend"], row["reason"]) for row in rows}
    assert reasons == {("sdpa", None), *((name, f"{name} is wrong") for name in outputs._KERNELS)}
    assert outputs.failures(rows) == []


def test_a_lost_gpu_ends_the_stage(writer, monkeypatch):
    monkeypatch.setattr(pieces, "lost", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be used any more"):
        list(outputs.run(DRY, writer))
    assert writer.rows
