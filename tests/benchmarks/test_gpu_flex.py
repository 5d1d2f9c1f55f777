"""FlexAttention's own stage: its rows join those of the race, whose fastest it is held against."""

from __future__ import annotations

import math

import pytest
import torch

from benchmarks.gpu import flex, pieces, race
from benchmarks.gpu.stage import Setup
from benchmarks.results import Writer

DRY = Setup(torch.device("cpu"), dry=True, deadline=math.inf)
GPU = DRY._replace(dry=False)


@pytest.fixture
def writer(tmp_path, machine) -> Writer:
    return Writer(tmp_path / "run.json", {"command": "gpu"}, machine)


def test_only_its_own_rows_are_written(writer):
    assert flex.unfinished(DRY, writer) == 2
    (case, *_) = flex._cases(DRY)
    writer.extend(race.race(case, race._contenders(case, DRY), DRY, None))  # whose fastest take part again
    rows = list(flex.run(DRY, writer))
    assert [row["variant"] for row in rows] == ["torch:flex"] * 2
    assert all("too slow for a dry run" in row["reason"] for row in rows)
    assert flex.unfinished(DRY, writer) == 0
    assert race.unfinished(DRY, writer) == 8
    assert flex.failures(rows) == []


def test_it_meets_the_fastest_of_ours_and_of_the_peers(writer):
    case = race._cases(DRY)[0]
    rows = race.race(case, race._contenders(case, DRY), DRY, None)
    for row, ms in zip([row for row in rows if row["median_ms"] is not None], range(9, 0, -1), strict=False):
        row["median_ms"] = float(ms)
    writer.extend(rows)
    fastest = {
        ours: min(its, key=lambda row: row["median_ms"])["variant"]
        for ours in (True, False)
        if (its := [row for row in rows if row["ours"] is ours and row["median_ms"] is not None])
    }
    assert len(fastest) == 2
    met = [peer.name for peer in flex._contenders(case, DRY, writer)]
    assert sorted(met) == sorted([*fastest.values(), "torch:flex"])


def test_its_cases_are_of_the_race_and_few():
    cases = flex._cases(GPU)
    assert set(cases) <= set(race._cases(GPU))
    assert [(case.tokens, case.mode) for case in cases] == [
        (n, mode) for n in (261, 1029) for mode in ("forward", "forward+backward")
    ]


def test_a_case_that_broke_is_done(writer):
    first = flex._cases(DRY)[0]
    writer.extend([pieces.row("flex", str(first), "hung")])
    assert flex.unfinished(DRY, writer) == 1
