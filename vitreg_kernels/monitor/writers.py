"""Reports written down step by step: as lines of a CSV file, or for TensorBoard. Both have ``write(step, report)``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..ops.token_norms.bins import bin_edges
from ..ops.token_norms.types import GROUPS, NormDistribution
from .report import NormReport, NormRow

_HEADER = ("step", *NormRow._fields)
_TEXTS, _COUNTS = ("layer", "group"), ("count", "outliers", "nan", "inf")

# Eight bins of 9 percent to an octave instead of 64: more than TensorBoard shows, at an eighth of the bytes.
_BINS_JOINED = 8


class CsvWriter:
    """Appends reports to a CSV file, a line for each step, layer and group that has tokens.

    A file that is there already is continued. Training that was cut and starts again from an earlier step writes
    some steps twice: a step that does not come after the file's last one replaces it and all that follow it. Only one
    process may write a file: rank 0.

    Args:
        path: of the file.
        rule: which tokens are outliers, as in ``NormReport``.

    Raises:
        ValueError: if the file is of another kind; it is left as it is.
    """

    def __init__(self, path: str | Path, **rule: float) -> None:
        self.path: Path = Path(path)
        self._rule = rule
        self._last_step: int | None = None  # unknown until the first step, which also drops a line that was cut
        if self.path.exists():
            _lines(self.path)

    def write(self, step: int, report: NormReport) -> None:
        """Appends a report; what is in the file of this step and later ones goes.

        Raises:
            ValueError: if the rule is not one that ``TokenNormStats.outliers`` takes, or the file is of another kind.
        """
        lines = [(step, *row) for row in report.rows(**self._rule) if row.count + row.nan + row.inf]
        if self._last_step is None or step <= self._last_step:
            self._keep_before(step)
        with self.path.open("a", newline="") as file:
            file.write(_text(lines))
        self._last_step = step

    def _keep_before(self, step: int) -> None:
        """The file anew, with its header and the lines of earlier steps."""
        kept = [line for line in _lines(self.path) if int(line[0]) < step] if self.path.exists() else []
        beside = self.path.with_name(self.path.name + ".new")
        beside.write_text(_text([_HEADER, *kept]), newline="")
        os.replace(beside, self.path)


def read_csv(path: str | Path) -> list[tuple[int, NormRow]]:
    """The steps and rows that a ``CsvWriter`` wrote, in order. A last line that was cut is left out.

    Raises:
        ValueError: if the file is of another kind.
    """

    def value(field: str, text: str) -> str | int | float | None:
        if field in _TEXTS:
            return text
        return int(text) if field in _COUNTS else float(text) if text else None

    return [(int(step), NormRow(*map(value, NormRow._fields, cells))) for step, *cells in _lines(Path(path))]


class TensorBoardWriter:
    """Writes reports for TensorBoard: a histogram of norms and some numbers, for each layer and group that has tokens.

    Tags are ``token_norms/<layer>/<group>/<number>``; the numbers are mean, median, max, outlier_share and nonfinite
    (NaN and infinite tokens).

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or anything with its ``add_scalar`` and
            ``add_histogram_raw``. Closing it is up to its owner.
        rule: which tokens are outliers, as in ``NormReport``.
    """

    def __init__(self, writer: Any, **rule: float) -> None:
        self._writer = writer
        self._rule = rule

    def write(self, step: int, report: NormReport) -> None:
        """Writes a report.

        Raises:
            ValueError: if the rule is not one that ``TokenNormStats.outliers`` takes.
        """
        rows = iter(report.rows(**self._rule))
        for layer in range(len(report.layers)):
            for group in range(len(GROUPS)):
                row = next(rows)
                if row.count + row.nan + row.inf:
                    norms = NormDistribution(*(x[layer] for x in report.stats[group]))
                    self._write_group(step, f"token_norms/{row.layer}/{row.group}", row, norms)

    def _write_group(self, step: int, tag: str, row: NormRow, norms: NormDistribution) -> None:
        self._writer.add_scalar(f"{tag}/nonfinite", row.nan + row.inf, step)
        if not row.count:
            return
        for name in ("mean", "median", "max", "outlier_share"):
            self._writer.add_scalar(f"{tag}/{name}", getattr(row, name), step)
        counts = norms.histogram.unflatten(0, (-1, _BINS_JOINED)).sum(-1)
        occupied = counts.nonzero()
        shown = slice(occupied[0].item(), occupied[-1].item() + 1)
        limits = bin_edges("cpu")[_BINS_JOINED::_BINS_JOINED]
        total, total_of_squares = norms.sums.tolist()
        self._writer.add_histogram_raw(
            f"{tag}/norm",
            min=row.min,
            max=row.max,
            num=row.count,
            sum=total,
            sum_squares=total_of_squares,
            # The last bin ends at infinity, which no viewer can draw.
            bucket_limits=[*limits[shown][:-1].tolist(), row.max],
            bucket_counts=counts[shown].tolist(),
            global_step=step,
        )


def _lines(path: Path) -> list[list[str]]:
    """The cells of a file's complete lines below the header.

    Raises:
        ValueError: if the header is another's.
    """
    complete = path.read_text().rpartition("\n")[0]
    header, *lines = csv.reader(complete.split("\n")) if complete else [[]]
    if tuple(header) != _HEADER:
        raise ValueError(
            f"{path} must begin with the columns {','.join(_HEADER)}, got {','.join(header)!r}; give the path of a new "
            f"file, or of one that a CsvWriter wrote"
        )
    return lines


def _text(lines: Iterable[Iterable[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()
