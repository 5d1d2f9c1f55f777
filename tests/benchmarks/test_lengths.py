"""Odd lengths beside even ones: the cost is that of a useful operation, and who cannot run says why."""

from __future__ import annotations

import pytest
import torch

from benchmarks import lengths, results
from benchmarks.peers import Peer, eager
from benchmarks.results import Writer
from vitreg_kernels import UnsupportedError
from vitreg_kernels.measure import timing

RUN = {"command": "bench", "size": "quick", "model": "a model"}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**12)
    monkeypatch.setattr(lengths, "PAIRS", ((7, 14),))


@pytest.fixture
def sleeps(clock):
    return lambda seconds_of: Peer("vitreg:ours", lambda qkv: clock.sleep(seconds_of[qkv.shape[1]]) or qkv, ours=True)


@pytest.mark.parametrize(("seconds", "excess"), [({7: 0.01, 14: 0.04}, 0.0), ({7: 0.02, 14: 0.04}, 1.0)])
def test_the_excess_is_in_time_a_useful_operation(seconds, excess, machine, sleeps):
    """Twice the tokens are four times the work."""
    (row,) = lengths.measure((7, 14), "fp32", [sleeps(seconds)], batch=1, rounds=3)
    results.validate(row | {"machine": machine})
    assert row["excess"] == pytest.approx(excess, abs=0.01)
    assert row["excess_p20"] <= row["excess"] <= row["excess_p80"]
    assert row["median_ms"] >= 1e3 * seconds[7]
    assert row["next_median_ms"] >= 1e3 * seconds[14]
    assert row["gflops"] == pytest.approx(4 * 49 * 64 * 6 / row["median_ms"] / 1e6)
    assert row["next_gflops"] == pytest.approx(4 * 196 * 64 * 6 / row["next_median_ms"] / 1e6)


def test_who_cannot_run_says_why_and_breaks_if_it_is_ours(machine):
    def declines(qkv):
        raise UnsupportedError("not here")

    def breaks_at_the_second(qkv):
        if qkv.shape[1] == 14:
            raise IndexError("out of its bounds")
        return qkv

    those = [Peer("a", declines, ours=True), Peer("b", breaks_at_the_second, ours=True), Peer("other", eager)]
    rows = lengths.measure((7, 14), "bf16", those, batch=1, rounds=1)
    assert [(row["reason"], row["failed"]) for row in rows] == [
        ("not here", False),
        ("IndexError: out of its bounds", True),
        (None, False),
    ]
    assert all((row[name] is None) is (row["reason"] is not None) for row in rows for name in lengths._MEASURED)
    for row in rows:
        results.validate(row | {"machine": machine})


def test_our_kernels_and_sdpa_are_measured_at_the_lengths_of_the_goal(monkeypatch):
    monkeypatch.undo()
    assert lengths.PAIRS == ((207, 208), (261, 264), (271, 272))
    peers = {peer.name: peer for peer in lengths.contenders()}
    assert list(peers)[-1] == "torch:sdpa"
    assert all(peer.ours and name.startswith("vitreg:") for name, peer in list(peers.items())[:-1])
    assert not {"vitreg:sdpa", "vitreg:reference"} & set(peers)
    qkv = torch.randn(1, 7, 3, 2, 16)
    torch.testing.assert_close(peers["torch:sdpa"].attend(qkv), eager(qkv))


def test_a_cut_run_goes_on_where_it_stopped(tmp_path, machine, monkeypatch):
    monkeypatch.setattr(lengths, "_ROUNDS", {"quick": 1})
    path, progress = tmp_path / "run.json", []

    def rows_of_run():
        return lengths.run("quick", Writer(path, RUN, machine), lambda *p: progress.append(p))

    first = next(rows_of_run())
    progress.clear()
    measured = []
    measure = lengths.measure
    monkeypatch.setattr(lengths, "measure", lambda *about: measured.append(about[:2]) or measure(*about))
    rows = list(rows_of_run())
    assert rows[0] == first
    assert {row["dtype"] for row in rows} == {"fp32", "bf16"}
    assert measured == [((7, 14), "bf16")]
    assert progress == [(0, 2, "N=7 beside 14 fp32"), (1, 2, "N=7 beside 14 bf16"), (2, 2, "")]


def test_the_table_marks_what_costs_too_much(sleeps, clock):
    those = [sleeps({7: 0.02, 14: 0.04}), Peer("other", lambda qkv: clock.sleep(0.02)), Peer("no", eager, refuses=str)]
    rows = lengths.measure((7, 14), "fp32", those, batch=1, rounds=1)
    rows[0] |= {"gflops": 1234.5, "next_gflops": 98.76}
    rows[1] |= {"gflops": 1.0, "next_gflops": 2.0}
    lines = lengths.table(rows).splitlines()
    assert "goal for ours: 6% more" in lines[1]
    ours, other = lines[2:]
    assert "N = 7/14 fp32  vitreg:ours     1234/98.8 GFLOP/s" in ours
    assert ours.endswith("ABOVE THE GOAL")
    assert not other.endswith("ABOVE THE GOAL")
    assert max(map(len, lines)) <= 100
    assert lengths.table([{"kind": "from another module"}]) == ""
