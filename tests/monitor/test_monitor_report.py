"""The numbers of a report, and that none is lost on the way into a row, a dict or a table."""

from __future__ import annotations

import json

import pytest
import torch
from monitor_cases import LAYOUT, Doublings, monitored, tokens

from vitreg_kernels import TokenLayout
from vitreg_kernels.monitor import NormReport
from vitreg_kernels.ops.token_norms.api import accumulate
from vitreg_kernels.ops.token_norms.types import NormDistribution, TokenNormStats


def report_of(*norms, layout=LAYOUT):
    """A report with a layer for each ``[B, N]`` norms."""
    counted = NormDistribution.zeros((len(norms), 3), "cpu")
    for i, of_layer in enumerate(norms):
        accumulate(of_layer, layout, NormDistribution(*(x[i] for x in counted)))
    return NormReport(tuple(f"blocks.{i}" for i in range(len(norms))), TokenNormStats.of_stacked(counted))


@pytest.fixture
def norms():
    """CLS 64, registers 32, patches 1 to 1.5, of which one is 40 and one NaN."""
    norms = torch.linspace(1.0, 1.5, 42).view(2, 21)
    norms[:, LAYOUT.cls], norms[:, LAYOUT.registers] = 64.0, 32.0
    norms[0, 9], norms[1, 20] = 40.0, torch.nan
    return norms


def test_rows_have_the_numbers(norms):
    rows = report_of(norms, 2 * norms).rows()
    assert [(row.layer, row.group) for row in rows] == [
        (f"blocks.{i}", group) for i in (0, 1) for group in ("cls", "registers", "patches")
    ]
    cls, registers, patches = rows[:3]
    finite = norms[:, LAYOUT.patches].flatten()
    finite = finite[finite.isfinite()].double()
    assert (cls.count, cls.mean, cls.std, cls.min, cls.max, cls.outliers) == (2, 64.0, 0.0, 64.0, 64.0, 2)
    assert (registers.count, registers.median, registers.outliers, registers.outlier_share) == (8, 32.0, 8, 1.0)
    assert (patches.count, patches.nan, patches.inf, patches.outliers) == (31, 1, 0, 1)
    assert patches.outlier_share == 1 / 31
    assert patches.mean == pytest.approx(finite.mean().item(), rel=1e-12)
    assert patches.std == pytest.approx(finite.std(correction=0).item(), rel=1e-9)
    assert patches.median == pytest.approx(finite.median().item(), rel=1 / 64)
    assert (patches.min, patches.max) == (finite.min().item(), 40.0)
    assert patches.max_over_median == 40.0 / patches.median
    assert 3 * patches.median <= patches.threshold <= 3 * patches.median * (1 + 1 / 64)
    assert rows[5].threshold == 2 * patches.threshold, "thresholds are each layer's own"


def test_the_rule_for_outliers_can_be_given(norms):
    report = report_of(norms)
    assert [row.outliers for row in report.rows(norm=50.0)] == [2, 0, 0]
    assert [row.threshold for row in report.rows(norm=50.0)] == [50.0] * 3
    assert report.as_dict(norm=50.0)["blocks.0"]["registers"]["outliers"] == 0
    assert report.as_dict(median=10.0)["blocks.0"]["registers"]["outliers"] == 8
    assert report.table(norm=50.0) != report.table()
    with pytest.raises(ValueError, match="one threshold"):
        report.rows(norm=50.0, mad=3.0)


def test_the_dict_is_json_without_nan():
    """A layer without registers, and one where every patch is infinite."""
    layout = TokenLayout(num_registers=0)
    infinite = torch.full((2, 9), torch.inf)
    infinite[:, 0] = 3.0
    found = report_of(torch.ones(2, 9), infinite, layout=layout).as_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    plain, broken = found["blocks.0"], found["blocks.1"]
    assert list(plain) == ["cls", "registers", "patches"]
    assert plain["registers"]["count"] == 0
    assert plain["registers"]["mean"] is plain["registers"]["outlier_share"] is None
    assert (broken["patches"]["inf"], broken["patches"]["median"], broken["patches"]["threshold"]) == (16, None, None)
    assert broken["cls"]["mean"] == 3.0


def test_the_table_has_a_line_a_layer(norms):
    clean = norms.nan_to_num(1.0)
    table = report_of(clean, 1000 * clean).table()
    heading, first, second = table.splitlines()
    assert heading.split("  ")[0] == "layer"
    assert len({len(line) for line in (heading, first, second)}) == 1, "columns are aligned"
    cells = first.split()
    patches = report_of(clean).rows()[2]
    assert cells[0] == "blocks.0"
    for i, number in enumerate((patches.median, patches.max, patches.max_over_median), 1):
        assert float(cells[i]) == pytest.approx(number, rel=1e-3)
    assert cells[4] == "3.12%"
    assert float(cells[5]) == pytest.approx(patches.threshold, rel=1e-3)
    assert cells[6:] == ["64", "32"]
    assert "NaN" not in table
    assert "inf" not in table


def test_the_table_shows_what_is_not_finite_and_leaves_out_groups_without_tokens(norms):
    heading, line = report_of(norms).table().splitlines()
    assert heading.endswith("  NaN tokens")
    assert line.endswith(" 1")
    norms[:, :3] = torch.inf
    heading, line = report_of(norms).table().splitlines()
    assert heading.split("  ")[-2:] == ["NaN tokens", "inf tokens"]
    assert line.split()[-2:] == ["1", "6"]
    assert "CLS" not in heading
    no_registers = report_of(torch.ones(1, 5), layout=TokenLayout(num_registers=0)).table()
    assert "registers" not in no_registers
    assert "CLS" in no_registers


def test_one_outlier_in_many_is_not_rounded_away():
    norms = torch.ones(1, 200_001)
    norms[0, -1] = 50.0
    assert "0.0005%" in report_of(norms, layout=TokenLayout(num_registers=0)).table()


def test_the_table_says_so_if_nothing_was_counted():
    monitor = monitored(model := Doublings())
    assert "no tokens counted" in monitor.compute().table()
    model(tokens())
    assert "no tokens counted" not in monitor.compute().table()
