"""Reports as CSV and for TensorBoard: complete, readable back, and continued after a cut."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path

import pytest
import torch
from test_monitor_report import report_of

from vitreg_kernels import TokenLayout
from vitreg_kernels.monitor import CsvWriter, TensorBoardWriter, read_csv

LAYOUT = TokenLayout(num_registers=0)


def report(step=0):
    """Two layers of a CLS token and eight patches, which grow with the step; one of the second layer is infinite."""
    norms = torch.linspace(1.0, 2.0, 9)[None] + step / 7.0
    broken = norms.clone()
    broken[0, 3] = torch.inf
    return report_of(norms, broken, layout=LAYOUT)


def rows(*steps):
    return [(step, row) for step in steps for row in report(step).rows() if row.group != "registers"]


def test_csv_is_read_back_as_written(tmp_path):
    writer = CsvWriter(tmp_path / "norms.csv")
    for step in (10, 20):
        writer.write(step, report(step))
    assert read_csv(tmp_path / "norms.csv") == rows(10, 20)
    header, *lines = (tmp_path / "norms.csv").read_text().splitlines()
    assert header == "step,layer,group,count,mean,std,min,median,max,threshold,outliers,nan,inf"
    assert len(lines) == 2 * 2 * 2, "a line a step, layer and group that has tokens"


def test_csv_takes_the_rule_for_outliers(tmp_path):
    CsvWriter(tmp_path / "norms.csv", norm=1.5).write(0, report())
    assert [row.threshold for _, row in read_csv(tmp_path / "norms.csv")] == [1.5] * 4


@pytest.mark.parametrize("cut", [0, 1, 40])
def test_csv_goes_on_after_a_cut_without_a_step_twice(tmp_path, cut):
    """Training ended after step 30, perhaps in the midst of a line, and starts again from what it saved after 15."""
    path = tmp_path / "norms.csv"
    first = CsvWriter(path)
    for step in (10, 20, 30):
        first.write(step, report(step))
    text = path.read_text()
    path.write_text(text[: len(text) - cut])
    again = CsvWriter(path)
    assert read_csv(path) == rows(10, 20, 30)[: -1 if cut else None]
    for step in (20, 30, 40):
        again.write(step, report(step))
    assert read_csv(path) == rows(10, 20, 30, 40)
    assert [entry.name for entry in tmp_path.iterdir()] == ["norms.csv"]


def test_csv_of_another_kind_is_refused_and_left_alone(tmp_path):
    path = tmp_path / "results.csv"
    for text in ("step,loss\n1,0.5\n", "step,loss", ""):
        path.write_text(text)
        for function in (CsvWriter, read_csv):
            with pytest.raises(ValueError, match=r"must begin with the columns step,layer") as raised:
                function(path)
            assert "\n" not in str(raised.value)
        assert path.read_text() == text


def test_a_wrong_rule_leaves_the_file_alone(tmp_path):
    path = tmp_path / "norms.csv"
    CsvWriter(path).write(0, report())
    with pytest.raises(ValueError, match="one threshold"):
        CsvWriter(path, norm=1.0, mad=1.0).write(0, report())
    assert read_csv(path) == rows(0)


class Recorder:
    """Takes the calls of a ``SummaryWriter`` and keeps them."""

    def __init__(self):
        self.scalars, self.histograms = {}, {}

    def add_scalar(self, tag, scalar_value, global_step=None, walltime=None, new_style=False, double_precision=False):
        self.scalars[tag, global_step] = scalar_value

    def add_histogram_raw(
        self, tag, min, max, num, sum, sum_squares, bucket_limits, bucket_counts, global_step=None, walltime=None
    ):
        assert len(bucket_limits) == len(bucket_counts)
        self.histograms[tag, global_step] = (min, max, num, sum, sum_squares, bucket_limits, bucket_counts)


def test_the_recorder_takes_what_tensorboards_writer_takes():
    """Read from torch's source, because importing it needs tensorboard."""
    source = Path(torch.__file__).parent / "utils" / "tensorboard" / "writer.py"
    functions = {f.name: f for f in ast.walk(ast.parse(source.read_text())) if isinstance(f, ast.FunctionDef)}
    for name in ("add_scalar", "add_histogram_raw"):
        theirs = [argument.arg for argument in functions[name].args.args]
        assert list(inspect.signature(getattr(Recorder, name)).parameters) == theirs


def test_tensorboard_gets_numbers_and_histograms_of_every_group():
    recorder = Recorder()
    writer = TensorBoardWriter(recorder, norm=1.5)
    writer.write(7, report())
    writer.write(8, report(8))
    tags = {f"token_norms/blocks.{i}/{group}" for i in (0, 1) for group in ("cls", "patches")}
    assert {tag.rpartition("/")[0] for tag, _ in recorder.scalars} == tags
    assert recorder.histograms.keys() == {(f"{tag}/norm", step) for tag in tags for step in (7, 8)}
    for row in report().rows(norm=1.5):
        if row.group == "registers":
            continue
        tag = f"token_norms/{row.layer}/{row.group}"
        for name in ("mean", "median", "max", "outlier_share"):
            assert recorder.scalars[f"{tag}/{name}", 7] == getattr(row, name)
        assert recorder.scalars[f"{tag}/nonfinite", 7] == row.nan + row.inf
        low, high, num, total, squares, limits, counts = recorder.histograms[f"{tag}/norm", 7]
        assert (low, high, num, total) == (row.min, row.max, row.count, pytest.approx(row.mean * row.count))
        assert squares == pytest.approx((row.std**2 + row.mean**2) * row.count)
        assert sum(counts) == row.count
        assert counts[0] > 0
        assert counts[-1] > 0
        assert limits == sorted(limits)
        assert limits[-1] == row.max


def test_tensorboard_histograms_count_each_bin():
    """Norms in the first, the second and the last bin, both open-ended, and some between."""
    recorder = Recorder()
    norms = torch.tensor([[1.0, 0.0, 2.0**-11.9, 2.0**-11.8, 3.0, 3.0, 2.0**21]])
    TensorBoardWriter(recorder).write(0, report_of(norms, layout=LAYOUT))
    *_, limits, counts = recorder.histograms["token_norms/blocks.0/patches/norm", 0]
    at = {limit: count for limit, count in zip(limits, counts, strict=True) if count}
    assert list(at.values()) == [2, 1, 2, 1]
    # An octave, 2 to 4, is in eight bins a quarter wide.
    assert list(at) == [2.0**-12 * 1.125, 2.0**-12 * 1.25, 3.25, 2.0**21]


def test_a_group_of_nan_alone_is_still_reported(tmp_path):
    nothing = report_of(torch.full((1, 9), torch.nan), layout=LAYOUT)
    recorder = Recorder()
    TensorBoardWriter(recorder).write(0, nothing)
    assert recorder.scalars["token_norms/blocks.0/patches/nonfinite", 0] == 8
    assert not recorder.histograms
    CsvWriter(tmp_path / "norms.csv").write(0, nothing)
    assert [(row.count, row.nan, row.mean) for _, row in read_csv(tmp_path / "norms.csv")] == [
        (0, 1, None),
        (0, 8, None),
    ]
