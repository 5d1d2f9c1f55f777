"""A piece of work that breaks is a row, the others go on, and nobody begins it again."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks import results
from benchmarks.gpu import pieces
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer

MARKS: list[str | None] = []
SETUP = Setup(torch.device("cpu"), True, math.inf, MARKS.append)


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    MARKS.clear()
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


def fault():
    raise IndexError("out of\nits bounds")


def test_what_it_raises_is_a_row_and_the_stage_goes_on(writer, capsys):
    with pieces.begun(SETUP, writer, "race", "N=261"):
        fault()
    assert MARKS == ["N=261", None]
    assert pieces.broken(writer, "race", "N=261")
    assert not pieces.broken(writer, "outputs", "N=261")
    assert not pieces.broken(writer, "race", "N=201")
    assert pieces.failures(results.load(writer.path)) == ["race, N=261: IndexError: out of its bounds"]
    assert "FAIL N=261: IndexError: out of its bounds" in capsys.readouterr().out


def test_one_that_is_right_leaves_no_row(writer):
    with pieces.begun(SETUP, writer, "race", 261):
        pass
    assert writer.rows == []
    assert MARKS == ["261", None]


@pytest.mark.parametrize("raises", [False, True])
def test_a_lost_gpu_ends_the_stage_and_the_piece_that_did_it_is_known(writer, monkeypatch, raises):
    """Also a kernel that dies only while it is timed, which has no row of its own."""
    monkeypatch.setattr(pieces, "lost", lambda device: True)
    piece = pieces.begun(SETUP, writer, "race", "N=261")
    piece.__enter__()
    error = IndexError("out of its bounds") if raises else None
    with pytest.raises(RuntimeError, match="cannot be used any more by this process, after N=261"):
        piece.__exit__(error and type(error), error, None)
    assert pieces.broken(writer, "race", "N=261") is raises


def test_a_cut_is_nobodys_fault(writer):
    with pytest.raises(KeyboardInterrupt), pieces.begun(SETUP, writer, "race", "N=261"):
        raise KeyboardInterrupt
    assert writer.rows == []
    assert MARKS[-1] is None
