"""The sweep of `make gpu`: what wins and is right is written, and nothing else."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace
from typing import get_args

import pytest
import torch

from benchmarks import results
from benchmarks.gpu import tune
from benchmarks.gpu.stage import Setup
from benchmarks.machine import ROOT
from benchmarks.results import Writer
from vitreg_kernels._triton import mode
from vitreg_kernels._triton.launch import Launch
from vitreg_kernels.dispatch import tables
from vitreg_kernels.measure import timing
from vitreg_kernels.ops._shared import capability
from vitreg_kernels.ops.attention.backends.triton import tiles as tuning
from vitreg_kernels.ops.attention.backends.triton.tiles import Tiles

DRY = Setup(torch.device("cpu"), dry=True, deadline=math.inf)
GPU = DRY._replace(dry=False)  # where no kernel runs
KERNELS = get_args(tuning.AttentionKernel)
PIECE = tune.Piece("forward", 64, (261, 201), "bf16")
ARCH = 90
SHAPE = Tiles(128, 128, 8, 2, whole_head=True)
FAST = replace(SHAPE, num_stages=3)


class Inline:
    """A pool of this very process."""

    map = staticmethod(map)


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU on which each kernel takes ``seconds(tiles, tokens)`` and nothing is compiled; what was asked of it."""
    asked = SimpleNamespace(seconds=lambda tiles, tokens: 1e-3, misfit=lambda job: None, broken=lambda *_: [], races=[])
    monkeypatch.setattr(capability, "capability", lambda device: ARCH)
    monkeypatch.setattr(tune, "explain", lambda *_, **__: SimpleNamespace(reasons={}))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(shared_memory_per_block_optin=1))
    monkeypatch.setattr(tune, "misfit", lambda job: asked.misfit(job))
    monkeypatch.setattr(tune.warm, "processes", lambda: nullcontext(Inline))
    monkeypatch.setattr(tune, "_broken", lambda piece, tiles, setup: asked.broken(piece, tiles))
    monkeypatch.setattr(tune, "_inputs", lambda piece, shape, device: (torch.empty(shape[1], 0),))
    monkeypatch.setattr(timing, "copies_past_cache", lambda make, device: [make(), make()])
    monkeypatch.setattr(tune, "_launches", lambda piece, tiles, copy: [(tiles, copy[0].shape[0])])
    monkeypatch.setattr(tables, "CONFIGS", tmp_path / "configs")

    def interleave(variants, inputs, *, device, budget_s):
        asked.races.append(len(variants))
        times = {}
        for name, variant in variants.items():
            ((tiles, tokens),) = variant.call.args[0][inputs[-1]]
            ms = 1e3 * asked.seconds(tiles, tokens)
            times[name] = timing.Timing(ms, ms, ms, ms, 3)
        return times

    monkeypatch.setattr(timing, "interleave", interleave)
    return asked


def rule(tokens=261):
    return tuning.attention_tiles("forward", ARCH, torch.bfloat16, 64, tokens)


def table(tmp_path):
    return json.loads((tmp_path / "configs" / "sm_90.json").read_text())


def only_first_piece(monkeypatch):
    monkeypatch.setattr(tune, "_pieces", lambda setup: [PIECE])


def test_the_fastest_tiles_are_written_beside_what_was_there(gpu, writer, tmp_path, monkeypatch, capsys):
    only_first_piece(monkeypatch)
    key = {"device": "sm_90", "kernel": "forward", "bits": 16, "width": 64, "tokens": 272}
    others = [key | {"width": 128} | asdict(FAST), key | {"kernel": "statistics"} | asdict(FAST)]
    tables.merge(tmp_path / "configs", "sm_90", "defaults", [{"op": "attention", "backend": "triton"}], ["op"])
    for section in (key | asdict(SHAPE), *others):
        tables.merge(tmp_path / "configs", "sm_90", tuning.SECTION, [section], tuning.Key._fields)
    gpu.seconds = lambda tiles, tokens: {FAST: 0.5e-3, SHAPE: 0.6e-3}.get(tiles, 1e-3)
    (row,) = tune.run(GPU, writer)
    assert row["best"] == asdict(FAST)
    assert row["rule"] == [asdict(rule(261)), asdict(rule(201))]
    assert (row["rule_ms"], row["best_ms"], row["speedup"]) == ([1.0, 1.0], [0.5, 0.5], 2.0)
    # 24 shapes beside the rule, 9 of other stages, and the winner once more, at two lengths each.
    assert gpu.races == [25, 25, 10, 10, 2, 2]
    assert (row["timed"], row["left_out"], row["size"]) == (33, 0, "16-bit, head dim 64, up to 272 tokens")
    found = table(tmp_path)
    assert found["defaults"] == [{"op": "attention", "backend": "triton"}]
    assert sorted(found[tuning.SECTION], key=str) == sorted([key | asdict(FAST), *others], key=str)
    monkeypatch.setattr(tuning, "_MEASURED", tuning.measured_tiles(tmp_path / "configs"))
    tuning.attention_tiles.cache_clear()
    try:
        assert rule() == FAST
    finally:
        monkeypatch.undo()
        tuning.attention_tiles.cache_clear()
    assert "2.00x" in capsys.readouterr().out
    results.validate(row)


@pytest.mark.parametrize(
    "seconds",
    [
        lambda tiles, tokens: 0.985e-3 if tiles == SHAPE else 1e-3,
        lambda tiles, tokens: 0.5e-3 if tiles == SHAPE and tokens == 201 else 1e-3,
    ],
    ids=["by 1.5%", "at one length only"],
)
def test_a_small_win_is_none(gpu, writer, tmp_path, monkeypatch, seconds):
    only_first_piece(monkeypatch)
    gpu.seconds = seconds
    (row,) = tune.run(GPU, writer)
    assert (row["best"], row["speedup"], row["failed"]) == (None, None, False)
    assert not (tmp_path / "configs").exists()


def test_luck_is_not_repeated(gpu, writer, tmp_path, monkeypatch):
    only_first_piece(monkeypatch)
    gpu.seconds = lambda tiles, tokens: 0.5e-3 if tiles == SHAPE and gpu.races[-1] > 2 else 1e-3
    (row,) = tune.run(GPU, writer)
    assert row["best"] is None
    assert gpu.races[-2:] == [2, 2]


def test_wrong_tiles_are_named_and_the_next_best_is_taken(gpu, writer, tmp_path, monkeypatch):
    only_first_piece(monkeypatch)
    right = replace(SHAPE, block_n=32)
    gpu.seconds = lambda tiles, tokens: {SHAPE: 0.4e-3, right: 0.5e-3}.get(tiles, 1e-3)
    gpu.broken = lambda piece, tiles: ["output at 261 tokens"] if tiles == SHAPE else []
    (row,) = tune.run(GPU, writer)
    assert row["best"] == asdict(right)
    assert len(row["wrong"]) == 1
    assert "block_n=128" in row["wrong"][0]
    assert "output at 261 tokens" in row["wrong"][0]
    assert tune.failures(writer.rows) == []
    (entry,) = table(tmp_path)[tuning.SECTION]
    assert asdict(right).items() <= entry.items()


def test_only_the_forward_of_short_images_may_hold_heads():
    holding = {piece for piece in tune._pieces(GPU) if any(t.whole_head for t in tune._shapes(piece, GPU))}
    assert {(piece.kernel, piece.tokens) for piece in holding} == {("forward", (261, 201))}


def test_what_does_not_fit_never_runs(gpu, writer, monkeypatch):
    only_first_piece(monkeypatch)
    gpu.misfit = lambda job: "spills" if job.tiles.whole_head and job.shape[1] == 201 else None
    ran = []
    gpu.seconds = lambda tiles, tokens: ran.append(tiles) or 1e-3
    (row,) = tune.run(GPU, writer)
    assert ran
    assert not any(tiles.whole_head for tiles in ran if tiles != rule())
    assert row["left_out"] == 12


def test_what_the_gpu_refuses_is_left_out(gpu, writer, monkeypatch):
    only_first_piece(monkeypatch)
    launches = tune._launches

    def refuse(piece, tiles, copy):
        if tiles.num_warps == 8 and tiles != rule():
            raise RuntimeError("out of resource: shared memory")
        return launches(piece, tiles, copy)

    monkeypatch.setattr(tune, "_launches", refuse)
    (row,) = tune.run(GPU, writer)
    refused = [t for t in tune._shapes(PIECE, GPU) if t.num_warps == 8 and t != rule()]
    assert row["left_out"] == len(refused) > 0
    assert not row["failed"]


def test_a_broken_rule_fails_the_command(gpu, writer, monkeypatch):
    only_first_piece(monkeypatch)

    def crash(piece, tiles, copy):
        raise IndexError("out of\nits bounds")

    monkeypatch.setattr(tune, "_launches", crash)
    (row,) = tune.run(GPU, writer)
    assert tune.failures([row]) == [
        "the sweep of forward at 16-bit, head dim 64, up to 272 tokens broke: IndexError: out of its bounds"
    ]


def test_a_kernel_that_is_not_launched_says_so(gpu, writer, monkeypatch):
    only_first_piece(monkeypatch)
    monkeypatch.setattr(tune.triton, "launches", lambda inputs, arch: [])
    (row,) = tune.run(GPU, writer)
    assert row["reason"] == "no call of this size launches it"
    assert not row["failed"]


def test_every_kernel_and_size_is_swept_once_whatever_is_cut(gpu, writer, monkeypatch):
    pieces = tune._pieces(GPU)
    assert {piece.kernel for piece in pieces} == set(KERNELS)
    assert len({(piece.kernel, piece.size) for piece in pieces}) == len(pieces) == tune.unfinished(GPU, writer)
    for piece in pieces:
        assert len({tables.token_bucket(tokens) for tokens in piece.tokens}) == 1
    assert list(tune.run(GPU._replace(deadline=time.monotonic()), writer)) == []
    rows = tune.run(GPU, writer)
    first = [next(rows), next(rows)]
    rows.close()
    assert tune.unfinished(GPU, writer) == len(pieces) - 2
    assert len(list(tune.run(GPU, writer))) == len(pieces) - 2
    assert writer.rows[:2] == first
    assert tune.unfinished(GPU, writer) == 0


def test_without_a_gpu_the_reason_is_told(writer):
    if mode.INTERPRETING:
        pytest.skip("the interpreter runs the kernels")
    rows = list(tune.run(DRY, writer))
    assert [row["kernel"] for row in rows] == list(KERNELS)
    assert {row["reason"] for row in rows} == {"runs on cuda, not on cpu"}
    assert tune.failures(rows) == []
    assert tune.unfinished(DRY, writer) == 0


@pytest.mark.skipif(mode.INTERPRETING, reason="the interpreter compiles nothing")
def test_what_spills_or_is_too_large_is_known_before_it_runs():
    pytest.importorskip("triton")
    small = tune.Compilation(
        tune.Piece("forward", 64, (54,), "bf16"), Tiles(64, 32, 4, 1), (1, 54, 3, 2, 64), 80, 2**17
    )
    assert tune.misfit(small) is None
    assert tune.misfit(small._replace(shared_limit=0)) == "shared memory"
    # 128 x 256 fp32 logits and as many probabilities in the registers of one warp.
    assert tune.misfit(small._replace(tiles=Tiles(128, 64, 1, 1))) == "spills"
    assert "does not compile" in tune.misfit(small._replace(tiles=Tiles(64, 24, 4, 1)))


def test_choosing_marks_one_kernel_alone():
    with tune.choosing("forward", FAST):
        chosen, other = (tuning.attention_tiles(k, 90, torch.bfloat16, 64, 261) for k in ("forward", "grad_query"))
    assert chosen == FAST != tuning.attention_tiles("forward", 90, torch.bfloat16, 64, 261)
    launches = [Launch(None, (1,), {}, {}, tiles.num_warps, tiles.num_stages) for tiles in (chosen, other)]
    (launch,) = tune.timed(launches)
    assert launch == launches[0]
    assert type(launch.num_stages) is int


REHEARSAL = """
import math, sys, torch
from pathlib import Path
from benchmarks import machine
from vitreg_kernels.measure import timing
from benchmarks.gpu import tune
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer
from vitreg_kernels.dispatch import tables

interleave = timing.interleave
def favour(variants, inputs, **options):  # the first tiles are made out to be the fastest
    times = interleave(variants, inputs, **options)
    return {n: t._replace(median_ms=0.1 if "block_m=16" in n else 1.0) for n, t in times.items()}

timing.interleave = favour
tune.tempfile.mkdtemp = lambda prefix: sys.argv[2]
setup = Setup(torch.device("cpu"), dry=True, deadline=math.inf)
tune._pieces = lambda setup, all=tune._pieces: [p for p in all(setup) if p.kernel in ("forward", "statistics")]
rows = list(tune.run(setup, Writer(Path(sys.argv[1]), {"command": "gpu"}, machine.describe(setup.device))))
assert not tables.CONFIGS.exists() or not any('"width": 16' in f.read_text() for f in tables.CONFIGS.glob("*.json"))
"""


@pytest.mark.slow
def test_a_rehearsal_in_the_interpreter_measures_real_launches(tmp_path):
    """Real kernels, real launches, the real accuracy rule; only the times are made up."""
    pytest.importorskip("triton")
    subprocess.run(
        [sys.executable, "-c", REHEARSAL, tmp_path / "run.json", tmp_path / "configs"],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    rows = results.load(tmp_path / "run.json")
    assert [row["kernel"] for row in rows] == ["forward", "statistics"]
    for row in rows:
        assert (row["reason"], row["wrong"], row["timed"]) == (None, [], 2)
        assert row["best"]["block_m"] == 16
    (file,) = (tmp_path / "configs").glob("*.json")
    assert {row["kernel"] for row in json.loads(file.read_text())[tuning.SECTION]} == {"forward", "statistics"}
