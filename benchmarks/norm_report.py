"""Rows of the race of residual norms as a table on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from benchmarks import memory
from benchmarks.report import WIDTH, number, refusals, worst
from benchmarks.results import Row

_LINE = "  {:<18} {:>10} {:>13} {:>7} {:>7} {:>7} {:>10} {:>10}  {}"
_HEADINGS = _LINE.format(
    "", "median ms", "p20-p80 ms", "GB/s", "% copy", "x peer", "max error", "formula's", ""
).rstrip()
_LEGEND = (
    "GB/s count useful traffic only: each [B, N, C] tensor once, 4 forward and 6 backward. % copy: of the speed of "
    "copying x and the branch, measured beside the race, into memory that is there. x peer: time of the fastest "
    "contender that is not ours / this time. Errors: of the output or gradient furthest from the formula's error in "
    "the same dtype, against fp64 on the first and the last image; FAIL breaks the accuracy rule."
)


def table(rows: Sequence[Row]) -> str:
    """The residual norms' rows as text of at most 100 columns, grouped by width; rows of other kinds are left out."""
    raced = [row for row in rows if row["kind"] == "residual_norm"]
    if not raced:
        return ""
    first = raced[0]
    head = (
        f"Residual, LayerScale, norm and token norms of {first['batch']} x {first['tokens']} tokens\n"
        f"{textwrap.fill(_LEGEND, WIDTH)}"
    )
    groups = dict.fromkeys((row["norm"], row["memory"], row["channels"]) for row in raced)
    parts = [_group([r for r in raced if (r["norm"], r["memory"], r["channels"]) == group]) for group in groups]
    return "\n\n".join(filter(None, (head, *parts, refusals(raced))))


def _group(rows: Sequence[Row]) -> str:
    """All races of one norm at one width, their results in one kind of memory."""
    first = rows[0]
    lines = [f"{first['norm']}, C = {first['channels']}, {memory.IN_WORDS[first['memory']]}", _HEADINGS]
    for dtype, mode in dict.fromkeys((row["dtype"], row["mode"]) for row in rows):
        its = [row for row in rows if (row["dtype"], row["mode"], row["reason"]) == (dtype, mode, None)]
        if its:
            copied = f"copy {number(its[0]['copy_gbps'])} GB/s"
            lines.append(f" {dtype} {mode}, {number(its[0]['bytes'] / 1e6)} MB; {copied}")
            lines += [_figures(row) for row in its]
    return "\n".join(lines)


def _figures(row: Row) -> str:
    error = worst(row["errors"])
    return _LINE.format(
        row["variant"],
        number(row["median_ms"]),
        f"{number(row['p20_ms'])}-{number(row['p80_ms'])}",
        number(row["gbps"]),
        f"{row['copy_fraction']:.1%}",
        "" if row["speedup"] is None else f"{row['speedup']:.2f}",
        f"{error['max']:.1e}",
        f"{error['eager_max']:.1e}",
        "" if all(e["passed"] for e in row["errors"].values()) else "FAIL",
    ).rstrip()
