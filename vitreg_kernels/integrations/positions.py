"""What position rows belong to: their number alone does not tell a grid, nor whether prefix tokens have rows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple


class Reading(NamedTuple):
    """Position rows understood.

    Attributes:
        position_rows: which tokens have a row, as ``ViTConfig`` says it.
        grid: rows and columns of patches that they were learnt on.
        assumed: whether a square grid was taken for want of another word.
    """

    position_rows: str
    grid: tuple[int, int]
    assumed: bool


def read_rows(
    count: int,
    prefixes: Mapping[str, int],
    *,
    grid: tuple[int, int] | None = None,
    image_grid: tuple[int, int] | None = None,
    square: bool = False,
) -> Reading:
    """The one reading that fits.

    Args:
        count: position rows, those of prefix tokens among them.
        prefixes: the choices of ``position_rows`` that there are, and the rows of prefix tokens of each.
        grid: that of the patches, if it is known.
        image_grid: that of the images the model is wanted for, on which the rows may have been learnt.
        square: whether the grid is known to be a square.

    Raises:
        ValueError: if no reading fits, or several do.
    """
    readings: dict[tuple[int, tuple[int, int]], str] = {}  # one of those that come to the same
    for position_rows, prefix in prefixes.items():
        patches = count - prefix
        side = math.isqrt(max(patches, 0))
        grids = [grid] if grid else [(side, side)] + ([image_grid] if image_grid and not square else [])
        for rows, columns in grids:
            if patches > 0 and rows * columns == patches:
                readings.setdefault((prefix, (rows, columns)), position_rows)
    if not readings:
        shape = f"grid of {grid[0]} x {grid[1]}" if grid else "square grid of"
        extra = " or ".join(str(prefix) for prefix in sorted(set(prefixes.values())))
        advice = "" if grid else ": give grid, the rows and columns of patches that they were learnt on"
        raise ValueError(f"the {count} position rows are no {shape} patches with {extra} rows of prefix tokens{advice}")
    if len(readings) > 1:
        words = [f"{rows} x {columns} (position_rows={kind!r})" for (_, (rows, columns)), kind in readings.items()]
        decides = "grid or position_rows" if len(set(readings.values())) == len(readings) else "grid"
        raise ValueError(
            f"the {count} position rows may be those of {' or of '.join(words)} patches, and no weight tells which: "
            f"give {decides}"
        )
    ((_, found), position_rows), *_ = readings.items()
    return Reading(position_rows, found, assumed=found not in (grid, image_grid) and not square)
