"""The one picture of a run: the attention race as bars by length, and photographs with their attention maps."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from benchmarks import report
from benchmarks.features import Maps
from benchmarks.results import Row
from benchmarks.shapes import DTYPES, MODES

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

_WIDTH, _BARS_HEIGHT, _PHOTOGRAPH_HEIGHT = 11.0, 7.5, 1.75  # inches


def save(path: Path, rows: Sequence[Row], maps: Maps) -> None:
    """Writes the picture of a whole run's ``rows`` and of the attention maps as a PNG."""
    draw(rows, maps).savefig(path, dpi=150)


def draw(rows: Sequence[Row], maps: Maps) -> Figure:
    """The picture, above the race and below the maps."""
    # Made without pyplot: it needs no display and leaves no global state behind.
    from matplotlib.figure import Figure

    maps_height = 0.9 + _PHOTOGRAPH_HEIGHT * len(maps.names)
    figure = Figure(figsize=(_WIDTH, _BARS_HEIGHT + maps_height), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(_BARS_HEIGHT, maps_height), hspace=0.03)
    _draw_race(above, rows)
    _draw_maps(below, maps)
    return figure


def _draw_race(figure: SubFigure, rows: Sequence[Row]) -> None:
    machine = rows[0]["machine"]
    figure.suptitle(
        "Attention on ViT shapes: higher is faster\n"
        f"{machine['device']} ({machine['capability']}), {machine['threads']} threads",
        fontsize="large",
        fontweight="bold",
    )
    axes = figure.subplots(len(DTYPES), len(MODES))
    for panels, dtype in zip(axes, DTYPES, strict=True):
        for panel, mode in zip(panels, MODES, strict=True):
            report.draw_bars(panel, rows, dtype, mode)
    # One legend for all panels: a contender may be missing from some of them.
    legends = [panel.get_legend_handles_labels() for panel in axes.flat]
    handles = {label: handle for legend in legends for handle, label in zip(*legend, strict=True)}
    bars_first = sorted(handles, key=lambda label: label == "measured peak")
    figure.legend([handles[x] for x in bars_first], bars_first, loc="outside lower center", ncols=5, frameon=False)


def _draw_maps(figure: SubFigure, maps: Maps) -> None:
    """A photograph a row: itself, then one map a prefix token, all on one scale."""
    figure.suptitle(
        f"Attention of CLS and registers in the last block, mean over heads\n{maps.model}",
        fontsize="large",
        fontweight="bold",
    )
    prefix_tokens = maps.attention.shape[1]
    axes = figure.subplots(len(maps.names), 1 + prefix_tokens, squeeze=False)
    titles = ("CLS", *(f"register {i}" for i in range(1, prefix_tokens)))
    # A few patches take far more than the rest; the scale ends where 1% of all patches lie beyond it.
    limit = torch.quantile(maps.attention.flatten(), 0.99).item()
    panels = zip(maps.names, maps.images, maps.attention, strict=True)
    for row, (name, photograph, attention) in enumerate(panels):
        axes[row, 0].imshow(photograph.permute(1, 2, 0).numpy())
        axes[row, 0].set_ylabel(name)
        for column, grid in enumerate(attention, 1):
            image = axes[row, column].imshow(grid.numpy(), cmap="viridis", vmin=0, vmax=limit, interpolation="nearest")
        for panel in axes[row]:
            panel.set(xticks=[], yticks=[])
    for panel, title in zip(axes[0, 1:], titles, strict=True):
        panel.set_title(title)
    bar = figure.colorbar(image, ax=axes, extend="max", shrink=0.8, aspect=30)
    bar.set_label("attention to a patch (uniform: 1)")
