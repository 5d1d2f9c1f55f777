"""What a monitor has counted, as numbers on the host: rows, a dict, a table."""

from __future__ import annotations

import math
from typing import NamedTuple

from ..ops.token_norms.types import GROUPS, NormDistribution, TokenNormStats


class NormRow(NamedTuple):
    """The norms of one group's tokens in one layer; ``None`` for a number that is not finite or that no token gives.

    Attributes:
        layer: the layer's name.
        group: ``"cls"``, ``"registers"`` or ``"patches"``.
        count: tokens of finite norm, which all but the last two numbers are about.
        mean, std, min, max: of their norms.
        median: of their norms, to within half a bin.
        threshold: norm from which on a token of this layer is an outlier.
        outliers: how many are.
        nan, inf: tokens whose norm is NaN, and infinite.
    """

    layer: str
    group: str
    count: int
    mean: float | None
    std: float | None
    min: float | None
    median: float | None
    max: float | None
    threshold: float | None
    outliers: int
    nan: int
    inf: int

    @property
    def outlier_share(self) -> float | None:
        """Outliers among the tokens of finite norm, 0 to 1."""
        return self.outliers / self.count if self.count else None

    @property
    def max_over_median(self) -> float | None:
        """Largest norm by typical norm."""
        return self.max / self.median if self.median else None


class NormReport(NamedTuple):
    """Statistics of token norms by layer.

    ``rule`` in its methods is what ``TokenNormStats.outliers`` takes: ``norm=``, ``median=``, ``mad=`` or
    ``percentile=``, and three times the median of the layer's patches if nothing is given.

    Attributes:
        layers: L names.
        stats: of those layers, with ``[L]`` for leading dimension, on the CPU.
    """

    layers: tuple[str, ...]
    stats: TokenNormStats

    def rows(self, **rule: float) -> list[NormRow]:
        """A row for each layer and group, groups inside layers.

        Raises:
            ValueError: if the rule is not one that ``TokenNormStats.outliers`` takes.
        """
        outliers = self.stats.outliers(**rule)
        columns = [
            _columns(norms, outliers.threshold.tolist(), getattr(outliers, group).tolist())
            for group, norms in zip(GROUPS, self.stats, strict=True)
        ]
        return [
            NormRow(layer, group, *(column[i] for column in columns_of_group))
            for i, layer in enumerate(self.layers)
            for group, columns_of_group in zip(GROUPS, columns, strict=True)
        ]

    def as_dict(self, **rule: float) -> dict[str, dict[str, dict[str, int | float | None]]]:
        """The numbers of ``NormRow``, and the outliers' share, by layer and group; ready for JSON.

        Raises:
            ValueError: as ``rows`` does.
        """
        found = {layer: {} for layer in self.layers}
        for row in self.rows(**rule):
            numbers = row._asdict() | {"outlier_share": row.outlier_share}
            found[numbers.pop("layer")][numbers.pop("group")] = numbers
        return found

    def table(self, **rule: float) -> str:
        """A line a layer: norms and outliers of the patches, and mean norms of CLS and registers where there are any.

        Tokens of any group that are NaN or infinite get a column each as soon as there is one.

        Raises:
            ValueError: as ``rows`` does.
        """
        rows = self.rows(**rule)
        if not any(row.count + row.nan + row.inf for row in rows):
            return "no tokens counted: the model has not run, or was compiled before the monitor was attached"
        by_group = {group: [row for row in rows if row.group == group] for group in GROUPS}
        patches = by_group["patches"]
        columns = {
            "layer": list(self.layers),
            "patches: median": [_number(row.median) for row in patches],
            "max": [_number(row.max) for row in patches],
            "max/median": [_number(row.max_over_median) for row in patches],
            "outliers": [_percent(row.outlier_share) for row in patches],
            "threshold": [_number(row.threshold) for row in patches],
        }
        for group, heading in (("cls", "CLS: mean"), ("registers", "registers: mean")):
            if any(row.count for row in by_group[group]):
                columns[heading] = [_number(row.mean) for row in by_group[group]]
        for heading in ("NaN", "inf"):
            counts = [
                sum(getattr(row, heading.lower()) for row in of_layer)
                for of_layer in zip(*by_group.values(), strict=True)
            ]
            if any(counts):
                columns[f"{heading} tokens"] = [str(count) for count in counts]
        return _aligned(columns)


def _columns(norms: NormDistribution, thresholds: list[float], outliers: list[int]) -> tuple[list, ...]:
    """The numbers of ``NormRow`` from ``count`` on, each by layer."""

    def finite(numbers: list[float]) -> list[float | None]:
        return [x if math.isfinite(x) else None for x in numbers]

    numbers = (norms.mean, norms.std, norms.min, norms.median, norms.max)
    return (
        norms.count.tolist(),
        *(finite(x.tolist()) for x in numbers),
        finite(thresholds),
        outliers,
        norms.num_nan.tolist(),
        norms.num_inf.tolist(),
    )


def _number(x: float | None) -> str:
    return "-" if x is None else f"{x:.4g}"


def _percent(share: float | None) -> str:
    # Significant digits, not decimals: one outlier in a million is not 0.00%.
    return "-" if share is None else f"{100 * share:.3g}%"


def _aligned(columns: dict[str, list[str]]) -> str:
    """Columns with their headings; the first to the left, numbers to the right."""
    widths = [max(map(len, (heading, *cells))) for heading, cells in columns.items()]
    lines = zip(*([heading, *cells] for heading, cells in columns.items()), strict=True)
    return "\n".join(
        "  ".join([first.ljust(widths[0]), *(c.rjust(w) for c, w in zip(others, widths[1:], strict=True))])
        for first, *others in lines
    )
