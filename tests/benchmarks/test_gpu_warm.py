"""What a stage compiles ahead is what its own calls launch."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch

from benchmarks.gpu import accuracy, calls, norms, outputs, race, warm
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer
from benchmarks.shapes import Case
from vitreg_kernels import dispatch
from vitreg_kernels._triton import mode
from vitreg_kernels.measure.warm import Compiled
from vitreg_kernels.measure.warm import launched as launches_of
from vitreg_kernels.ops._shared import capability
from vitreg_kernels.ops.catalogue import OPS

pytest.importorskip("triton", reason="triton is not installed: it exists for Linux x86-64 only")
if mode.INTERPRETING:
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from vitreg_kernels._triton import offline

ARCH = 90
CPU = torch.device("cpu")
DRY = Setup(CPU, dry=True, deadline=math.inf)
GPU = Setup(torch.device("cuda"), dry=False, deadline=math.inf)


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


@pytest.fixture
def pretending(monkeypatch, change_backends):
    """Our kernels take CPU tensors for those of a GPU; whoever launches one in earnest fails."""
    for op in OPS.values():
        requirements = dispatch.find(op.backends, "triton").requirements._replace(devices=("cpu",))
        change_backends("triton", op=op.name, requirements=requirements, faults=list)
    monkeypatch.setattr(capability, "capability", lambda device: ARCH)


def keys(call):
    return {offline.compilation(launch, ARCH).key for launch in launches_of(call)}


def rehearsed(rehearse, pieces):
    return set().union(*(keys(partial(rehearse, piece)) for piece in pieces))


@pytest.mark.usefixtures("pretending")
def test_the_accuracy_stage_launches_what_was_rehearsed(writer):
    launched = keys(lambda: list(accuracy.run(DRY, writer)))
    assert launched == rehearsed(accuracy._rehearse, accuracy._pieces(DRY))
    # Two cases in four precisions, with three forwards, the statistics and a backward or two.
    assert len(launched) >= 2 * 4 * 5
    assert all(row["crash"] is None and row["reasons"] == [] for row in writer.find(backend="triton"))


@pytest.mark.usefixtures("pretending")
@pytest.mark.slow
def test_the_race_launches_what_was_rehearsed(writer, monkeypatch):
    cases = [
        *race._uniform({22: (32, 16)}, "bf16", 16),
        *race._multicrop((32, 2), ((2, 22), (2, 9)), "bf16", 16),
    ]
    monkeypatch.setattr(race, "_cases", lambda setup: cases)
    launched = keys(lambda: list(race.run(DRY, writer)))
    assert launched == rehearsed(partial(race.rehearse, device=CPU), cases)
    assert all(row["reason"] is None for row in writer.find(variant="vitreg:triton"))
    for layout in ("packed", "separate", "multicrop"):
        its = rehearsed(partial(race.rehearse, device=CPU), [case for case in cases if case.layout == layout])
        assert len(its) >= 3  # a forward with and one without the log-sum-exp, and a backward or two


@pytest.mark.usefixtures("pretending")
def test_the_outputs_stage_launches_what_was_rehearsed(writer, monkeypatch):
    cases = [Case(32, 16, 22, "bf16", "forward", 16)]
    monkeypatch.setattr(outputs, "_cases", lambda setup: cases)
    launched = keys(lambda: list(outputs.run(DRY, writer)))
    assert launched == rehearsed(partial(outputs.rehearse, device=CPU), cases)
    assert all(row["reason"] is None for row in writer.find(backend="triton"))
    assert len(launched) >= len(outputs._ASKED)


@pytest.mark.usefixtures("pretending")
def test_the_norms_stage_launches_what_was_rehearsed(writer, monkeypatch, ceilings):
    writer.extend([{"kind": "roofline", **ceilings._asdict()}])
    launched = keys(lambda: list(norms.run(DRY, writer)))
    checked = rehearsed(norms.rehearse_check, norms._checks(DRY))
    raced = rehearsed(partial(norms.rehearse_race, device=CPU), norms._cases(DRY))
    assert launched == checked | raced
    assert min(len(checked), len(raced)) >= 3
    served = [row for row in writer.find(kind="norm_accuracy") if row["backend"].endswith(":triton")]
    assert {row["backend"].partition(":")[0] for row in served if not row["reasons"]} == {op.name for op in calls.OPS}


class Compiler:
    """Stands in for the one that compiles: pieces are names of kernels, of which triton's cache has "old"."""

    def __init__(self, device, *, deadline):
        self.began, self.waited = [], []

    def __enter__(self):
        return self

    def __exit__(self, *error):
        names = {name for kernels in self.began for name in kernels}
        self.told = Compiled(len(names & {"old"}), len(names - {"old", "wrong"}), len(names & {"wrong"}), 3.2)

    def begin(self, call):
        self.began.append(call())
        return self.began[-1]

    def wait(self, jobs):
        self.waited.append(jobs)


@pytest.mark.parametrize(
    ("pieces", "told"),
    [
        (
            [["a", "b"], ["old"], ["b", "c"]],
            "1 of 4 kernels were in triton's cache; 3 of the 3 others compiled ahead in 3 s",
        ),
        ([["a"], ["wrong"]], "0 of 2 kernels were in triton's cache; 1 of the 2 others compiled ahead in 3 s"),
        ([["old"]], "1 of 1 kernels were in triton's cache"),
    ],
)
def test_pieces_come_in_their_order_and_the_kernels_are_counted(monkeypatch, capsys, pieces, told):
    monkeypatch.setattr(warm, "Compiler", Compiler)
    assert list(warm.ahead(pieces, list, GPU)) == pieces
    assert capsys.readouterr().out == f"    {told}\n"


def test_a_stage_that_is_cut_still_says_how_far_the_compiler_came(monkeypatch, capsys):
    monkeypatch.setattr(warm, "Compiler", Compiler)
    pieces = warm.ahead([["a"], ["b"]], list, GPU)
    assert next(pieces) == ["a"]
    pieces.close()
    assert "2 of the 2 others compiled ahead" in capsys.readouterr().out


def test_without_kernels_nothing_is_said(monkeypatch, capsys):
    monkeypatch.setattr(warm, "Compiler", Compiler)
    warm.up([[]], list, GPU)
    assert capsys.readouterr().out == ""


def test_off_a_gpu_nothing_is_rehearsed():
    asked = []
    assert list(warm.ahead(["piece"], asked.append, DRY)) == ["piece"]
    assert asked == []
