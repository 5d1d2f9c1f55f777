"""Rows of the real model as tables on the terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from benchmarks.results import Errors, Row

_FEATURES = "  {:<10} {:>13} {:>16} {:>9} {:>23} {:>22}"
_REGISTERS = "  {:<21} {:>22} {:>13} {:>21}"
_NORMS = "  {:<11} {:>14} {:>13} {:>13} {:>9} {:>15}"


def table(rows: Sequence[Row]) -> str:
    """The features, registers and norms rows as text of at most 100 columns, by image size."""
    rows = [row for row in rows if row["kind"] in ("features", "registers", "norms")]
    parts = []
    for size in dict.fromkeys(row["image_size"] for row in rows):
        for kind, lines in (("features", _features), ("registers", _registers), ("norms", _norms)):
            chosen = [row for row in rows if row["image_size"] == size and row["kind"] == kind]
            if chosen:
                parts.append("\n".join(lines(chosen)))
    return "\n\n".join(parts)


def _features(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    lines = [
        f"Features of {first['images']} photographs of {first['image_size']} px, N = {first['tokens']}, timed "
        f"{first['batch']} at a time (* taken by default).",
        "Largest error against fp64, and the same-dtype eager formula's; FAIL breaks the accuracy rule.",
        _FEATURES.format("", "ms an image", "p20-p80 ms", "speed-up", "features", "prefix attention"),
    ]
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        lines += [f" {dtype}", *(_backend(row) for row in rows if row["dtype"] == dtype)]
    return lines


def _backend(row: Row) -> str:
    if row["reason"] is not None:
        text = f"  {row['backend']:<12}{'FAIL ' if row['failed'] else 'not run: '}{row['reason']}"
        return textwrap.fill(text, 100, subsequent_indent=" " * 14, break_on_hyphens=False)
    return _FEATURES.format(
        row["backend"] + ("*" if row["default"] else ""),
        f"{row['median_ms']:.1f}",
        f"{row['p20_ms']:.1f}-{row['p80_ms']:.1f}",
        f"{row['speedup']:.2f}",
        _error(row["errors"]["features"]),
        _error(row["errors"]["prefix_attention"]),
    )


def _error(errors: Errors) -> str:
    return f"{'' if errors['passed'] else 'FAIL '}{errors['max']:.1e} ({errors['eager_max']:.1e})"


def _registers(rows: Sequence[Row]) -> list[str]:
    lines = [
        "What registers do to features of a model trained without them, by initial value (* used here).",
        _REGISTERS.format("", "patch cosine mean/min", "CLS cosine", "CLS attends to them"),
    ]
    for row in rows:
        lines.append(
            _REGISTERS.format(
                row["initial"] + ("*" if row["used"] else ""),
                f"{row['patch_cosine_mean']:.4f}/{row['patch_cosine_min']:.4f}",
                f"{row['cls_cosine_mean']:.4f}",
                f"{row['attention_to_registers']:.1%}",
            )
        )
    return lines


def _norms(rows: Sequence[Row]) -> list[str]:
    lines = [
        "Token norms after the last block, before the final LayerNorm; artifacts reach several medians.",
        _NORMS.format("", "patch median", "patch max", "max/median", "CLS", "register mean"),
    ]
    for row in rows:
        norms = (row["patch_median"], row["patch_max"], row["patch_max"] / row["patch_median"])
        figures = (f"{x:.2f}" for x in (*norms, row["cls"], row["register_mean"]))
        lines.append(_NORMS.format(row["photograph"], *figures))
    return lines
