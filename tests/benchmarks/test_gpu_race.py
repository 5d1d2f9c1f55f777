"""The race of `make gpu`, rehearsed on a CPU: all layouts and modes, and nothing wrong goes unnamed."""

from __future__ import annotations

import itertools
import math
import os
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import contest, peers, shapes
from benchmarks.gpu import pieces, race, stage
from benchmarks.gpu.stage import Setup
from benchmarks.machine import ROOT
from benchmarks.peers import EAGER, Peer, pack_of
from benchmarks.results import Writer
from benchmarks.shapes import Case
from vitreg_kernels.measure import race as measured_race
from vitreg_kernels.measure import timing

RUN = {"command": "gpu"}
CPU = torch.device("cpu")
DRY = Setup(CPU, dry=True, deadline=math.inf)
GPU = DRY._replace(dry=False)  # where no kernel runs
LAYOUTS, MODES = get_args(shapes.Layout), get_args(shapes.Mode)
GRADIENTS = {"grad_query", "grad_key", "grad_value"}


def new_writer(tmp_path, machine) -> Writer:
    return Writer(tmp_path / "run.json", RUN, machine)


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    return new_writer(tmp_path, machine)


@pytest.fixture
def only(monkeypatch):
    """Lets these contenders race alone, each given as (name, what it does to the formula's ways)."""

    def only(*contenders, **fields):
        def everyone(layout, pack):
            eager = EAGER.attend(layout, pack)
            return [
                Peer(
                    name,
                    lambda *inputs, change=change: change(eager(*inputs)),
                    ours=name.startswith("vitreg"),
                    **fields,
                )
                for name, change in contenders
            ]

        monkeypatch.setattr(race, "everyone", everyone)

    return only


def crash(output):
    raise IndexError("out of\nits own bounds")


def test_a_dry_run_races_everything_it_can_in_every_layout_and_mode(writer, ceilings, capsys):
    writer.extend([{"kind": "roofline", **ceilings._asdict()}])
    assert race.unfinished(DRY, writer) == 9
    rows = list(race.run(DRY, writer))
    assert race.unfinished(DRY, writer) == 0
    assert race.failures(writer.rows) == []
    assert writer.rows[1:] == rows
    assert len(capsys.readouterr().out.splitlines()) == 9
    raced = Counter((row["layout"], row["mode"]) for row in rows if row["reason"] is None)
    assert raced.keys() == set(itertools.product(LAYOUTS, MODES))
    assert min(raced.values()) >= 4
    for layout, mode in raced:
        case = [row for row in rows if (row["layout"], row["mode"]) == (layout, mode)]
        assert [row["variant"] for row in case] == [
            peer.name for peer in peers.everyone(layout, None) if peer.name != race.FLEX
        ]
        assert [row["variant"] for row in case if row["default"]] == ["vitreg:sdpa"]
        assert all(row["reason"] for row in case if row["median_ms"] is None)
        for row in case:
            figures(row)


def figures(row) -> None:
    """They follow from the median and the ceilings, which are 100 GFLOP/s and 20 GB/s."""
    heads = row["batch"] * row["heads"]
    assert row["roofline_ns"] == pytest.approx(max(row["flops"] / 100, row["bytes"] / 20) / heads)
    if row["median_ms"] is not None:
        assert row["ns_per_head"] == pytest.approx(1e6 * row["median_ms"] / heads)
        assert row["tflops"] == pytest.approx(row["flops"] / row["median_ms"] * 1e-9)
        assert row["gbps"] == pytest.approx(row["bytes"] / row["median_ms"] * 1e-6)
        assert row["roofline_fraction"] == pytest.approx(row["roofline_ns"] / row["ns_per_head"])
        assert row["errors"].keys() == {"output"} | (GRADIENTS if row["mode"] != "forward" else set())
        assert (row["speedup"] == 1.0) is (row["variant"] == row["best_peer"])


def test_without_ceilings_nothing_is_a_share_of_them(only, writer):
    only(("vitreg:right", lambda x: x))
    for row in race.run(DRY, writer):
        assert row["median_ms"] > 0
        assert row["roofline_ns"] is row["roofline_fraction"] is row["best_peer"] is row["speedup"] is None


def test_what_is_wrong_or_breaks_fails_and_is_named(only, writer):
    half_gradient = lambda x: 0.5 * x + 0.5 * x.detach()  # noqa: E731
    only(
        ("vitreg:right", lambda x: x),
        ("vitreg:crashes", crash),
        ("vitreg:wrong", half_gradient),
        ("other:wrong", lambda x: 2 * x),
    )
    list(race.run(DRY, writer))
    failures = race.failures([{"kind": "stage", "stage": "race"}, *writer.rows])
    for layout, mode in itertools.product(LAYOUTS, MODES):
        tokens = 62 if layout == "multicrop" else 22
        case = f"at N = {tokens}, D = 16 in fp32, {layout}, {mode}: "
        assert failures.count(f"vitreg:crashes {case}IndexError: out of its own bounds") == 1
        wrong = [sentence for sentence in failures if sentence.startswith(f"vitreg:wrong {case}")]
        assert len(wrong) == (0 if mode == "forward" else 3)
        assert all(any(f": {name} is " in sentence for sentence in wrong) for name in GRADIENTS if wrong)
    assert len(failures) == 9 + 3 * 6  # nothing of vitreg:right, nor of a peer
    peer = [row for row in writer.rows if row["variant"] == "other:wrong"]
    assert not any(row["errors"]["output"]["passed"] for row in peer)


@pytest.mark.parametrize("place", [0, 21, -9, -1], ids=["first", "end of first", "start of last", "last"])
def test_the_first_and_the_last_crop_are_checked_from_end_to_end(only, writer, place):
    def change(output):
        output = output.clone()
        if output.shape[0] == 1:
            output[:, place] *= 1.01
        return output

    only(("vitreg:wrong", change))
    list(race.run(DRY, writer))
    assert race.failures(writer.rows)
    assert all("multicrop" in sentence for sentence in race.failures(writer.rows))


def test_a_gradient_that_never_comes_is_a_failure(only, writer):
    only(("vitreg:detached", lambda x: x.detach()))
    list(race.run(DRY, writer))
    assert len(race.failures(writer.rows)) == 6
    assert all("does not require grad" in sentence for sentence in race.failures(writer.rows))


def test_a_backward_is_timed_alone(only, writer, monkeypatch):
    seconds = 0.0

    def slow(output):
        nonlocal seconds
        seconds += 1.0
        return output

    def clock():
        nonlocal seconds
        seconds += 0.001
        return seconds

    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=clock))  # which forwards move, not the machine
    only(("vitreg:slow", slow))
    for row in race.run(DRY, writer):
        assert (row["median_ms"] < 500) is (row["mode"] == "backward")


def test_inputs_are_rotated_past_the_cache_except_in_a_dry_run(only, monkeypatch):
    only(("vitreg:right", lambda x: x))
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**16)
    monkeypatch.setattr(race, "_BUDGET_S", 0.0)
    given = []
    one = race.contest
    monkeypatch.setattr(
        race, "contest", lambda case, who, copies, *rest: given.append(copies) or one(case, who, copies, *rest)
    )
    case = race._cases(DRY)[0]
    for setup in (DRY, GPU):
        race.race(case, race._contenders(case, setup), setup, None)
    assert len(given[0]) == 2
    assert sum(x.nbytes for copy in given[1] for x in copy) >= 2 * 2**16


def test_a_cut_race_goes_on_where_it_stopped(only, writer, tmp_path, machine, monkeypatch):
    only(("vitreg:right", lambda x: x), ("other:right", lambda x: x))
    raced = []
    one = race.race
    monkeypatch.setattr(race, "race", lambda case, *rest: raced.append(case) or one(case, *rest))
    first = race.run(DRY, writer)
    for _ in range(3):  # into the second case, whose rows are both written by then
        next(first)
    assert race.unfinished(DRY, writer) == 7
    again = new_writer(tmp_path, machine)
    assert again.resumed == 4
    list(race.run(DRY, again))
    assert raced == race._cases(DRY)  # each once, and in this order
    assert race.unfinished(DRY, again) == 0


def test_no_case_begins_after_the_deadline(only, writer, monkeypatch):
    only(("vitreg:right", lambda x: x))
    clock = itertools.count()
    monkeypatch.setattr(stage.time, "monotonic", lambda: next(clock))
    assert len(list(race.run(DRY._replace(deadline=2), writer))) == 2
    assert race.unfinished(DRY, writer) == 7


def test_who_breaks_the_hold_of_the_gpu_is_not_hidden_behind_the_others(only, writer, monkeypatch):
    only(("vitreg:before", lambda x: x), ("other:breaks", crash), ("vitreg:after", lambda x: x))
    monkeypatch.setattr(measured_race, "lost", lambda device: True)
    monkeypatch.setattr(pieces, "lost", lambda device: True)
    with pytest.raises(RuntimeError, match="after N=22 fp32 forward"):
        list(race.run(DRY, writer))
    reasons = {row["variant"]: row["reason"] for row in writer.rows}
    assert reasons["other:breaks"].startswith("IndexError")
    assert reasons["vitreg:before"] == reasons["vitreg:after"]
    assert "because other:breaks broke" in reasons["vitreg:after"]
    assert race.failures(writer.rows) == []  # the stage itself fails, by what it raised


def test_the_cases_are_those_of_the_goals_in_order_of_importance():
    cases = race._cases(GPU)
    assert len(cases) == len(set(cases)) == 3 * (2 * 5 + 1 + 2 * 3)
    assert {case.dtype for case in cases} == {"bf16"}
    order = list(dict.fromkeys((case.tokens, case.head_dim) for case in cases))
    narrow = [(n, 64) for n in (261, 201, 1029, 1374, 54)]
    assert order == [*narrow, (2 * 261 + 8 * 54, 64), (261, 128), (201, 128), (1029, 128)]
    for key in order:
        these = [(case.layout, case.mode) for case in cases if (case.tokens, case.head_dim) == key]
        layouts = ("multicrop",) if key[0] == 954 else ("packed", "separate")
        assert these == list(itertools.product(layouts, MODES))
    assert all(case.batch * case.heads >= 1024 for case in cases)


def test_work_of_crops_is_that_of_their_products():
    (case,) = (case for case in race._cases(DRY) if case.layout == "multicrop" and case.mode == "forward")
    *inputs, _ = contest.inputs_of(case, CPU)()
    with FlopCounterMode(display=False) as counter:
        EAGER.multicrop(*inputs, pack_of(contest.runs_of(case), CPU))
    assert case.flops == counter.get_total_flops() == 4 * 2 * 1 * 16 * (2 * 22**2 + 2 * 9**2)
    assert case.bytes == 4 * sum(x.nbytes for x in inputs) / 3


def test_work_of_a_backward_is_that_of_the_whole_less_the_forward():
    forward, backward, both = (Case(3, 2, 201, "bf16", mode) for mode in MODES)
    assert forward.flops + backward.flops == both.flops
    assert forward.bytes + backward.bytes == both.bytes


def test_flex_attention_is_left_to_its_own_stage():
    for case in race._cases(GPU):
        assert "torch:flex" not in {peer.name for peer in race._contenders(case, GPU)}


def test_the_gradient_of_separate_heads_lies_as_a_projection_gives_it():
    query, key, value, grad_output = contest.inputs_of(Case(2, 3, 7, "fp32", "forward", 16, layout="separate"), CPU)()
    assert all(x.shape == (2, 3, 7, 16) and x.is_contiguous() for x in (query, key, value))
    assert grad_output.shape == query.shape
    assert grad_output.transpose(1, 2).is_contiguous()


@pytest.mark.slow
def test_in_the_interpreter_our_kernels_race_in_every_layout():
    """In a process of its own, because triton decides at its import how kernels run."""
    script = """
import math, torch
from vitreg_kernels.measure import timing
from benchmarks.gpu import race
from benchmarks.gpu.stage import Setup
setup = Setup(torch.device("cpu"), True, math.inf)
timing.MIN_SAMPLES = 1
ours = race.everyone
race.everyone = lambda layout, pack: [peer for peer in ours(layout, pack) if peer.name == "vitreg:triton"]
for case in race._cases(setup):
    if case.mode == "forward+backward":
        (row,) = race.race(case, race._contenders(case, setup), setup, None)
        print(case.layout, row["reason"], all(error["passed"] for error in row["errors"].values()), len(row["errors"]))
"""
    pytest.importorskip("triton", reason="the kernels are Triton's")
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [f"{layout} None True 4" for layout in LAYOUTS], done.stderr


@pytest.mark.parametrize("long_crop", [False, True])
def test_a_kernel_that_the_smoke_test_found_wrong_is_left_out_where_it_was(only, writer, monkeypatch, long_crop):
    only(("vitreg:triton", lambda x: x), ("vitreg:sdpa", lambda x: x), ("other:right", lambda x: x))

    def against(backend, tokens, *, backward, setup, writer):
        return "is wrong" if backward and tokens == (22 if long_crop else 9) else None

    monkeypatch.setattr(race.smoke, "against", against)
    left_out = [row for row in race.run(DRY, writer) if row["reason"] is not None]
    assert {(row["variant"], row["reason"], row["failed"]) for row in left_out} == {
        ("vitreg:triton", "is wrong", False)
    }
    layouts = LAYOUTS if long_crop else ("multicrop",)
    assert {(row["layout"], row["mode"]) for row in left_out} == set(itertools.product(layouts, MODES[1:]))
    assert race.failures(writer.rows) == []


def test_a_refusal_is_no_failure(only, writer):
    only(("vitreg:knows", crash), refuses=lambda *inputs: "runs on the moon only")
    rows = list(race.run(DRY, writer))
    assert {row["reason"] for row in rows} == {"runs on the moon only"}
    assert race.failures(rows) == []
