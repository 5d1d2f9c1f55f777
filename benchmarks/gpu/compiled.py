"""The largest model with each block by torch.compile, whose compiler takes most of the time."""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.gpu import models
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.results import Row, Writer

NAME = "compiled"
SECONDS = 70.0
LONGEST = 75.0


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """Measures piece by piece, the one with a goal first, and yields rows once written."""
    return models.measure(models.pieces_of(setup, compiled=True), NAME, setup, writer)


def rehearsals(setup: Setup) -> tuple[Rehearsal, ...]:
    """None but those of the same models uncompiled."""
    return ()


def failures(rows: list[Row]) -> list[str]:
    """Ours that broke, and ours that is wrong."""
    return models.failures_of(rows, compiled=True)


def unfinished(setup: Setup, writer: Writer) -> int:
    """Pieces of work without rows."""
    return models.undone(models.pieces_of(setup, compiled=True), NAME, writer)
