"""Rows of the race of residual norms as a table on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from benchmarks import roofline
from benchmarks.report import WIDTH, number, refusals, worst
from benchmarks.results import Row

_LINE = "  {:<18} {:>10} {:>13} {:>7} {:>7} {:>7} {:>10} {:>10}  {}"
_HEADINGS = _LINE.format(
    "", "median ms", "p20-p80 ms", "GB/s", "% copy", "x peer", "max error", "formula's", ""
).rstrip()
_LEGEND = (
    "GB/s count useful traffic only: each [B, N, C] tensor once, 4 forward and 6 backward. % copy: of the copy "
    "bandwidth above. x peer: time of the fastest contender that is not ours / this time. Errors: of the output or "
    "gradient furthest from the formula's error in the same dtype, against fp64 on the first and the last image; FAIL "
    "breaks the accuracy rule."
)


def table(rows: Sequence[Row]) -> str:
    """The residual norms' rows as text of at most 100 columns, grouped by width; rows of other kinds are left out."""
    raced = [row for row in rows if row["kind"] == "residual_norm"]
    if not raced:
        return ""
    copy_gbps = roofline.highest(rows).copy_gbps
    first = raced[0]
    head = (
        f"Residual, LayerScale, norm and token norms of {first['batch']} x {first['tokens']} tokens; "
        f"copy {number(copy_gbps)} GB/s\n{textwrap.fill(_LEGEND, WIDTH)}"
    )
    widths = dict.fromkeys((row["norm"], row["channels"]) for row in raced)
    parts = [_width([row for row in raced if (row["norm"], row["channels"]) == width], copy_gbps) for width in widths]
    return "\n\n".join(filter(None, (head, *parts, refusals(raced))))


def _width(rows: Sequence[Row], copy_gbps: float) -> str:
    """All races of one norm at one width."""
    lines = [f"{rows[0]['norm']}, C = {rows[0]['channels']}", _HEADINGS]
    for dtype, mode in dict.fromkeys((row["dtype"], row["mode"]) for row in rows):
        its = [row for row in rows if (row["dtype"], row["mode"], row["reason"]) == (dtype, mode, None)]
        if its:
            lines.append(f" {dtype} {mode}, {number(its[0]['bytes'] / 1e6)} MB")
            lines += [_figures(row, copy_gbps) for row in its]
    return "\n".join(lines)


def _figures(row: Row, copy_gbps: float) -> str:
    error = worst(row["errors"])
    return _LINE.format(
        row["variant"],
        number(row["median_ms"]),
        f"{number(row['p20_ms'])}-{number(row['p80_ms'])}",
        number(row["gbps"]),
        f"{row['gbps'] / copy_gbps:.1%}",
        "" if row["speedup"] is None else f"{row['speedup']:.2f}",
        f"{error['max']:.1e}",
        f"{error['eager_max']:.1e}",
        "" if all(e["passed"] for e in row["errors"].values()) else "FAIL",
    ).rstrip()
