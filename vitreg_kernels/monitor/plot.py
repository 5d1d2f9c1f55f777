"""A report as a picture: norms by layer, and, from a CSV file's rows, outliers over the steps of training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..ops.token_norms.bins import BINS_PER_OCTAVE, bin_edges
from .report import NormReport, NormRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_HEIGHT, _WIDTH_OF_NORMS, _WIDTH_OF_HISTORY = 5.0, 7.0, 5.5  # inches
_LABELS_FIT = 14  # layers' names below the axis; of more, every other, third, ...

# Joined bins are 9 percent wide: a layer's cloud of norms is smooth and a single outlier still to be seen.
_BINS_JOINED = 8


def draw(report: NormReport, history: Sequence[tuple[int, NormRow]] = (), **rule: float) -> Figure:
    """Norms by layer and, beside it if there is a history, the share of outliers over the steps.

    Patches are shown as shares of their layer, by norm; a CLS token's and registers' median stands on their range.

    Args:
        report: of one model.
        history: as ``read_csv`` gives it; its outliers are those that were counted when it was written.
        rule: what an outlier is in the report, as in ``NormReport``.

    Returns:
        A figure, made without pyplot: ``figure.savefig(path)``.

    Raises:
        ValueError: if no patches have been counted, or the rule is not one that ``TokenNormStats.outliers`` takes.
    """
    # Made without pyplot: it needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    if not report.stats.patches.count.any():
        raise ValueError("there is nothing to draw: the report has no patches of finite norm")
    widths = [_WIDTH_OF_NORMS, _WIDTH_OF_HISTORY] if history else [_WIDTH_OF_NORMS]
    figure = Figure(figsize=(sum(widths), _HEIGHT), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)[0]
    _draw_norms(axes[0], report, report.rows(**rule))
    if history:
        _draw_history(axes[1], history)
    return figure


def _draw_norms(axes: Axes, report: NormReport, rows: Sequence[NormRow]) -> None:
    from matplotlib import colormaps
    from matplotlib.colors import ListedColormap, LogNorm

    counts = report.stats.patches.histogram.unflatten(-1, (-1, _BINS_JOINED)).sum(-1)
    occupied = counts.sum(0).nonzero()
    shown = slice(occupied[0].item(), occupied[-1].item() + 1)
    edges = bin_edges("cpu")[::_BINS_JOINED].numpy()
    # The outermost bins end at 0 and infinity; on a logarithmic axis they are drawn as wide as the others.
    width = 2.0 ** (_BINS_JOINED / BINS_PER_OCTAVE)
    edges[0], edges[-1] = edges[1] / width, edges[-2] * width
    shares = (100.0 * counts[:, shown] / counts.sum(-1, keepdim=True)).numpy()
    layers = np.arange(len(report.layers))
    image = axes.pcolormesh(
        np.arange(len(layers) + 1) - 0.5,
        edges[shown.start : shown.stop + 1],
        np.where(shares > 0, shares, np.nan).T,
        norm=LogNorm(vmax=100.0),
        # Not from white: a single outlier has to show.
        cmap=ListedColormap(colormaps["Blues"](np.linspace(0.3, 1.0, 256))),
    )
    axes.figure.colorbar(image, ax=axes, label="patches of the layer, %", pad=0.02)
    _mark(axes, [row for row in rows if row.group == "cls"], "CLS", "o", "tab:red", -0.15)
    _mark(axes, [row for row in rows if row.group == "registers"], "registers", "^", "tab:orange", 0.15)
    thresholds = [row.threshold or np.nan for row in rows if row.group == "patches"]
    axes.hlines(thresholds, layers - 0.45, layers + 0.45, color="black", label="outliers from here on")
    axes.set(yscale="log", xlabel="layer", ylabel="L2 norm of a token")
    axes.set_title("Token norms by layer", pad=28)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, frameon=False)
    stride = _stride(report.layers)
    slanted = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
    axes.set_xticks(range(0, len(layers), stride), report.layers[::stride], **slanted)


def _mark(axes: Axes, rows: Sequence[NormRow], label: str, marker: str, color: str, shift: float) -> None:
    """A group's median in each layer, on a line from its smallest norm to its largest."""
    if not any(row.count for row in rows):
        return
    low, median, high = np.array([(row.min, row.median, row.max) for row in rows], dtype=float).T  # None is NaN
    places, ranges = np.arange(len(rows)) + shift, (median - low, high - median)
    axes.errorbar(places, median, yerr=ranges, fmt=marker, color=color, markersize=4, linewidth=1, label=label)


def _draw_history(axes: Axes, history: Sequence[tuple[int, NormRow]]) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm

    lines: dict[str, list[tuple[int, float]]] = {}
    for step, row in history:
        if row.group == "patches" and row.count:
            lines.setdefault(row.layer, []).append((step, 100.0 * row.outlier_share))
    colors = ScalarMappable(BoundaryNorm(np.arange(len(lines) + 1) - 0.5, 256), "viridis")
    for i, line in enumerate(lines.values()):
        axes.plot(*zip(*line, strict=True), color=colors.to_rgba(i), marker=".", linewidth=1.2)
    names, stride = list(lines), _stride(list(lines))
    bar = axes.figure.colorbar(colors, ax=axes, pad=0.02)
    bar.minorticks_off()
    bar.set_ticks(range(0, len(names), stride), labels=names[::stride])
    axes.set(xlabel="training step", ylabel="patches that are outliers, %", title="Outliers while training")
    # With none at all there is still an axis to read that from.
    axes.set_ylim(bottom=0.0, top=None if any(share for line in lines.values() for _, share in line) else 1.0)


def _stride(names: Sequence[str]) -> int:
    return -(-len(names) // _LABELS_FIT)
