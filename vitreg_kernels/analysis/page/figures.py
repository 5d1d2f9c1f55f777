"""Findings as figures: what the page shows, for a notebook or a paper as well.

Each function gives a ``matplotlib`` figure, made without pyplot: it needs no display and leaves no global state behind.
The last line of a notebook's cell shows it; ``figure.savefig(path)`` keeps it.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from ..findings import Findings, Norms, Similarity
from .colours import BLUE, GRID, INK, ORANGE, PALETTE, RATIO_TICKS, RATIOS, kind_colour
from .maps import labelled, norm_levels, short

_WIDTH, _HEIGHT, _FONT = 4.0, 3.0, 9  # inches, inches, points: readable on a telephone
_MAP = 1.5  # inches, of a norm map
_MAPS_IN_A_ROW = 6
_LONG_AXIS = 100.0  # from end to end
_NAME = 18  # letters of a model's name in a line
_REGISTER_LINES = ("-", "--", "-.", ":")


def norms_by_layer(found: Findings, limits: tuple[float, float] | None = None) -> Figure:
    """The largest, 99th percentile and median norm of patches behind each block, and the median of CLS and registers.

    Args:
        found: of one model.
        limits: of the axis of norms, to compare models; those of this one if not given.

    Raises:
        ValueError: if no norms were recorded.
    """
    if not found.norms:
        raise ValueError(f"there are no norms of {found.name}: analyze it with norms")
    figure, axes = _axes(labelled(found))
    patches = [row for row in found.norms if row.tokens == "patches"]
    layers = [row.layer for row in patches]
    for quantity, line, width in (("largest", "-", 2.0), ("p99", "--", 1.3), ("median", "-", 1.0)):
        label = {"largest": "patches: largest", "p99": "99th percentile", "median": "median"}[quantity]
        axes.plot(layers, [getattr(row, quantity) for row in patches], line, color=BLUE, linewidth=width, label=label)
    axes.fill_between(layers, [row.median for row in patches], [row.largest for row in patches], color=BLUE, alpha=0.1)
    for i, token in enumerate(found.prefix):
        rows = [row for row in found.norms if row.tokens == token]
        style = _REGISTER_LINES[(i - 1) % 4] if token != "cls" else "-"
        axes.plot(
            [row.layer for row in rows],
            [row.median for row in rows],
            style,
            color=kind_colour(token),
            linewidth=1.3,
            label=f"{short(token)}: median",
        )
    if all(row.threshold is not None for row in patches):
        thresholds = [row.threshold for row in patches]
        axes.step(layers, thresholds, ":", where="mid", color=INK, linewidth=1.1, label=f"rule {found.rule}")
    axes.set(yscale="log", ylim=limits, xlabel="block", ylabel="L2 norm")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _plain_log(axes.yaxis)
    _legend(axes)
    return figure


def norm_limits(every: Sequence[Findings]) -> tuple[float, float]:
    """Limits of the axis of norms that hold the norms of all these models."""
    rows = [row for found in every for row in found.norms]
    low = min((x for row in rows for x in (row.median, row.threshold) if x), default=1.0)
    return low / 1.3, max((max(row.largest, row.threshold or 0.0) for row in rows), default=1.0) * 1.3


def histogram_limits(every: Sequence[Findings]) -> tuple[float, float] | None:
    """Limits of the axis of norms that hold the histograms of all these models; None if they have none."""
    ends = [x for found in every if found.histogram for x in (*found.histogram.edges, found.histogram.threshold) if x]
    return (min(ends), max(ends) * 1.1) if ends else None


def norms_by_model(every: Sequence[Findings]) -> Figure:
    """Models or checkpoints beside each other: patch norms as multiples of their median, at the block of each verdict.

    Raises:
        ValueError: if no norms were recorded.
    """
    rows = {found.name: row for found in every if (row := _patches(found)) is not None}
    if not rows:
        raise ValueError("there are no norms of any model: analyze them with norms")
    shown = [found for found in every if found.name in rows]
    names = [_plain(textwrap.fill(labelled(found), _NAME)) for found in shown]
    figure, axes = _axes("Patch norms by model", height=1.2 + 0.26 * sum(1 + name.count("\n") / 2 for name in names))
    for place, found in enumerate(shown):
        row = rows[found.name]
        middle = row.median or 1.0
        axes.plot([1.0, row.largest / middle], [place, place], color=BLUE, linewidth=2.0, solid_capstyle="round")
        axes.plot(1.0, place, "|", color=BLUE, markersize=9, label="median" if not place else None)
        axes.plot(row.p99 / middle, place, "D", color=BLUE, markersize=4, label=None if place else "99th percentile")
        axes.plot(row.largest / middle, place, "o", color=BLUE, markersize=6, label=None if place else "largest")
        if row.threshold is not None:
            label = None if place else "rule"
            axes.plot(row.threshold / middle, place, "|", color=INK, markersize=16, label=label)
    axes.set_yticks(range(len(shown)), names)
    axes.set(xscale="log", xlabel="norm / median patch norm", ylim=(len(shown) - 0.4, -0.6))
    _plain_log(axes.xaxis)
    _legend(axes)
    return figure


def histogram(found: Findings, limits: tuple[float, float] | None = None) -> Figure:
    """How many tokens of each kind have which norm, and where the rule cuts.

    Args:
        found: of one model.
        limits: of the axis of norms, to compare models; those of this one if not given.

    Raises:
        ValueError: if it was not recorded.
    """
    if found.histogram is None:
        raise ValueError(f"there is no histogram of {found.name}: analyze it with norms")
    figure, axes = _axes(f"{labelled(found)}, block {found.layer}")
    for tokens, counts in found.histogram.counts.items():
        colour = kind_colour(tokens)
        label = "patches" if tokens == "patches" else short(tokens)
        axes.stairs(counts, found.histogram.edges, fill=tokens == "patches", color=colour, alpha=0.35)
        axes.stairs(counts, found.histogram.edges, color=colour, linewidth=1.3, label=label)
    axes.axvline(found.histogram.threshold, color=INK, linestyle=":", linewidth=1.1, label=f"rule {found.rule}")
    axes.set(xscale="log", yscale="log", xlim=limits, ylim=(0.7, None), xlabel="L2 norm", ylabel="tokens")
    _plain_log(axes.xaxis)
    _plain_log(axes.yaxis)
    _legend(axes)
    return figure


def neighbour_cosines(found: Findings) -> Figure:
    """How alike patches and their neighbours are before the first block: outliers against the others.

    Raises:
        ValueError: if it was not recorded.
    """
    return _cosines(found, found.similarity, "cosine with the neighbours, after the patch embedding")


def cls_cosines(found: Findings) -> Figure:
    """How alike patches and the CLS token are behind the last block: outliers against the others.

    Raises:
        ValueError: if it was not recorded, or there is no CLS token.
    """
    return _cosines(found, found.cls_similarity, "cosine with CLS, behind the last block")


def history(found: Findings) -> Figure:
    """How the largest patch norm of each layer grew while the model was trained.

    Raises:
        ValueError: if there is no log of a training run.
    """
    if found.history is None:
        raise ValueError(f"there is no training history of {found.name}: give its log")
    figure, axes = _axes(labelled(found))
    lines = found.history.largest_ratio
    # Neither end of viridis is seen on paper of its own brightness.
    colours = colormaps["viridis"](np.linspace(0.2, 0.8, len(lines)))
    for colour, (layer, values) in zip(colours, lines.items(), strict=True):
        values = [np.nan if value is None else value for value in values]
        axes.plot(found.history.steps, values, color=colour, linewidth=1.3, label=_plain(layer))
    axes.set(yscale="log", xlabel="training step", ylabel="largest / median patch norm")
    _plain_log(axes.yaxis)
    _legend(axes)
    return figure


def norm_maps(found: Findings, maps: Mapping[str, np.ndarray], image: int = 0) -> Figure:
    """One image and its norm map behind every block; outliers are ringed.

    The colour is the norm as a multiple of the median patch of that block over all images: the same in every map of
    every model.

    Args:
        found: of one model.
        maps: of that model, as in ``findings.Image``.
        image: its index.

    Raises:
        ValueError: if the maps do not hold its norms.
    """
    if f"{image}/norms" not in maps or not found.norms:
        raise ValueError(f"there is no norm map of image {image} of {found.name}: analyze it with norms")
    norms, outliers = maps[f"{image}/norms"], maps[f"{image}/outliers"]
    pictures = [PALETTE[tile] for tile in norm_levels(found, norms, outliers)]
    titles = [f"block {i}" for i in range(len(pictures))]
    if f"{image}/photo" in maps:
        pictures, titles = [maps[f"{image}/photo"], *pictures], ["photo", *titles]
    rows = -(-len(pictures) // _MAPS_IN_A_ROW)
    columns = min(len(pictures), _MAPS_IN_A_ROW)
    figure = Figure(
        figsize=(_MAP * columns + 0.7, _MAP * rows * norms.shape[1] / norms.shape[2] + 0.6), layout="constrained"
    )
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes, picture, title in zip(grid, pictures, titles, strict=False):  # the last row may be cut short
        axes.imshow(picture, interpolation="nearest")
        axes.set_title(title, fontsize=_FONT)
    for axes in grid:
        axes.set_axis_off()
    scale = ScalarMappable(LogNorm(*RATIOS), "viridis")
    bar = figure.colorbar(scale, ax=grid, label="norm / median patch norm", aspect=12 * rows)
    bar.set_ticks(list(RATIO_TICKS), labels=list(RATIO_TICKS.values()), minor=False)
    bar.minorticks_off()
    figure.suptitle(_plain(labelled(found)), fontsize=_FONT + 1)
    return figure


def _cosines(found: Findings, similarity: Similarity | None, label: str) -> Figure:
    if similarity is None:
        raise ValueError(f"there are no cosines of {found.name}: analyze it with similarity")
    figure, axes = _axes(labelled(found))
    for kind, colour in (("normal", BLUE), ("outlier", ORANGE)):
        if kind in similarity.densities:
            density, points = similarity.densities[kind], similarity.points
            name = f"{kind}, {similarity.counts[kind]} patches"
            axes.plot(points, density, color=colour, linewidth=1.5, label=name)
            axes.fill_between(points, density, color=colour, alpha=0.2)
            axes.axvline(similarity.means[kind], color=colour, linestyle=":", linewidth=1.1)
    axes.set(xlabel=label, ylabel="density", ylim=(0, None))
    _legend(axes)
    return figure


def _patches(found: Findings) -> Norms | None:
    return next((row for row in found.norms if (row.layer, row.tokens) == (found.layer, "patches")), None)


def _plain(text: str) -> str:
    """Text that matplotlib shows as it is: no formula, and no label that it leaves out of a legend."""
    text = text.replace("$", r"\$")
    return f"\u200b{text}" if text.startswith("_") else text


def _axes(title: str, height: float = _HEIGHT) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(_plain(title), loc="left", fontsize=_FONT + 1, color=INK, pad=8)
    axes.set_axisbelow(True)
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GRID)
    axes.tick_params(which="both", color=GRID, labelcolor=INK, labelsize=_FONT, length=3)
    axes.xaxis.label.set(color=INK, fontsize=_FONT)
    axes.yaxis.label.set(color=INK, fontsize=_FONT)
    return figure, axes


def _plain_log(axis: Axis) -> None:
    """Ticks as plain numbers: at 1, 2, 5, 10 and so on, or of a long axis at the powers of 10."""
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1.0,) if high > _LONG_AXIS * low else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_locator(NullLocator())


def _legend(axes: Axes) -> None:
    axes.figure.legend(
        loc="outside lower left",
        ncols=3,
        frameon=False,
        fontsize=_FONT - 0.5,
        labelcolor=INK,
        columnspacing=1.0,
        handlelength=1.6,
    )
