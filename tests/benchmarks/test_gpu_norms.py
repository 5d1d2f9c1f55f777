"""The GPU run's stage of norms, rehearsed on a CPU: every op is checked in poisoned memory, and the race goes on."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import norms as race
from benchmarks.gpu import calls, norms, pieces, stage
from benchmarks.gpu.stage import Setup
from benchmarks.norms import Case
from benchmarks.results import Writer
from vitreg_kernels import dispatch
from vitreg_kernels.ops.assemble.backends import composite as assemble
from vitreg_kernels.ops.catalogue import OPS
from vitreg_kernels.ops.token_norms.backends import composite as token_norms

CPU = torch.device("cpu")
DRY = Setup(CPU, dry=True, deadline=math.inf)


@pytest.fixture
def writer(tmp_path, machine, ceilings) -> Writer:
    writer = Writer(tmp_path / "run.json", {"command": "gpu"}, machine)
    writer.extend([{"kind": "roofline", **ceilings._asdict()}])
    return writer


def test_every_op_is_checked_and_the_norms_are_raced(writer):
    left = norms.unfinished(DRY, writer)
    rows = list(norms.run(DRY, writer))
    assert norms.unfinished(DRY, writer) == 0
    assert norms.failures(writer.rows) == []
    checked = [row for row in rows if row["kind"] == "norm_accuracy" and row["errors"]]
    assert {f"{op.name}:composite" for op in calls.OPS} <= {row["backend"] for row in checked}
    assert all(row["deterministic"] for row in checked)
    assert {row["mode"] for row in rows if row["kind"] == "residual_norm"} == {"forward", "backward"}
    assert left == len({(row["backend"].partition(":")[0], row["case"], row["dtype"]) for row in checked}) + 2
    assert list(norms.run(DRY, writer)) == []


@pytest.mark.parametrize(
    ("op", "tensor"), [("residual_norm", "normalized"), ("token_norms", "token_norms"), ("assemble", "tokens")]
)
def test_what_is_wrong_is_named(op, tensor, writer, change_backends):
    right = dispatch.find(OPS[op].backends, "composite").forward

    def wrong(inputs):
        result = right(inputs)
        if isinstance(result, tuple):
            return result._replace(normalized=1.01 * result.normalized)
        return 1.01 * result

    change_backends("composite", op=op, forward=wrong)
    list(norms.run(DRY, writer))
    told = norms.failures(writer.rows)
    assert any(s.startswith(f"{op}:composite on 2 x 9 x 48") and f": {tensor} is" in s for s in told)


def test_a_count_that_is_off_by_one_is_named(writer, change_backends):
    count = token_norms.accumulate

    def wrong(norms, layout, into):
        count(norms, layout, into)
        into.histogram[2, 7] += 1

    change_backends("composite", op="token_norms", accumulate=wrong)
    list(norms.run(DRY, writer))
    told = norms.failures(writer.rows)
    assert told
    assert all(
        s.startswith("token_norms:composite on 2 x 9 norms, statistics in") and "patches histogram" in s for s in told
    )


def test_a_token_that_is_never_written_shows(writer, change_backends):
    right = assemble.forward

    poison = []

    def leaves_one_out(inputs):
        poison.append(torch.are_deterministic_algorithms_enabled())
        tokens = right(inputs)
        written = torch.ones_like(tokens, dtype=torch.bool)
        written[-1, -1] = False
        return tokens.where(written, torch.empty_like(tokens))

    change_backends("composite", op="assemble", forward=leaves_one_out)
    list(norms.run(DRY, writer))
    assert poison
    assert all(poison)
    assert any("tokens is 1.8e+308 off" in sentence for sentence in norms.failures(writer.rows))


def test_a_crash_is_named_and_the_others_go_on(writer, change_backends):
    def crash(inputs):
        raise IndexError("out of\nits bounds")

    change_backends("composite", op="residual_norm", forward=crash)
    rows = list(norms.run(DRY, writer))
    told = norms.failures(writer.rows)
    assert "residual_norm:composite on 2 x 9 x 48 in fp32: IndexError: out of" in told
    assert "vitreg:composite, LayerNorm of C = 48 in fp32, forward: IndexError: out of its bounds" in told
    assert any(row["errors"] for row in rows if row.get("backend") == "assemble:composite")


def test_a_lost_gpu_ends_the_stage_after_its_row_is_written(writer, monkeypatch):
    monkeypatch.setattr(pieces, "lost", lambda device: True)
    with pytest.raises(RuntimeError, match="cannot be used any more by this process, after residual_norm of 2 x 9"):
        list(norms.run(DRY, writer))
    assert writer.find(kind="norm_accuracy")


def test_nothing_is_begun_after_the_deadline_and_the_next_run_goes_on(writer, monkeypatch):
    everything = norms.unfinished(DRY, writer)
    clock = itertools.count()
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(clock))
    list(norms.run(DRY._replace(deadline=9), writer))
    assert 2 < norms.unfinished(DRY, writer) < everything  # the races, and some of the checks
    list(norms.run(DRY, writer))
    assert norms.unfinished(DRY, writer) == 0


@pytest.mark.slow
def test_torchs_compiler_is_raced_at_one_width(monkeypatch):
    """It takes most of a race's time."""
    raced = {}
    monkeypatch.setattr(norms.norms, "race", lambda case, those, *_: raced.update({case: those}))
    monkeypatch.setattr(norms.timing, "copies_past_cache", lambda make, device: [])
    whole = DRY._replace(dry=False)
    for case in norms._cases(whole):
        norms._race(case, whole)
    refusing = {
        case.channels
        for case, those in raced.items()
        for peer in those
        if peer.name == "torch:compile" and peer.refuses()
    }
    assert refusing == {384, 768, 1536}


def test_the_full_size_has_every_kind_of_call_and_every_width():
    whole = DRY._replace(dry=False)
    cases = norms._cases(whole)
    assert cases[:8] == [Case(c, "bf16", mode) for c in (1024, 384, 768, 1536) for mode in ("forward", "backward")]
    assert {(case.norm, case.mode) for case in cases[8:]} == {("RMSNorm", "forward")}
    with FakeTensorMode():
        found = list(calls.calls(torch.bfloat16, CPU, dry=False))
    assert {call.request.op for call in found} == {op.name for op in calls.OPS}
    names = [(call.request.op, call.name) for call in found]
    assert len(set(names)) == len(names)  # a row is found by them
    widths = {call.arguments["x"].shape[2] for call in found if "x" in call.arguments}
    assert {*race.CHANNELS, 4096, 100} <= widths
    two = [call.arguments for call in found if "branch" in call.arguments]
    assert any(arguments["x"].dtype != arguments["branch"].dtype for arguments in two)
