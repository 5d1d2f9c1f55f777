"""FlexAttention against the fastest of the race, at two lengths: torch.compile takes most of the time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

from benchmarks import roofline
from benchmarks.gpu import pieces
from benchmarks.gpu.race import FLEX, race, rows_of
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.peers import Peer, everyone
from benchmarks.results import Row, Writer
from benchmarks.shapes import Case, Mode

NAME = "flex"
SECONDS = 45.0
LONGEST = 45.0

_SHAPES = {261: (64, 16), 1029: (64, 16)}  # (batch, heads) by tokens


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """The cases that ``writer`` has no row of. What it is raced with has rows of the stage race, and gets no others."""
    for case in _cases(setup):
        if _done(writer, case):
            continue
        if setup.expired:
            return
        print(f"    {case}", end="", flush=True)
        with pieces.begun(setup, writer, NAME, case):
            raced = race(case, _contenders(case, setup, writer), setup, roofline.highest(writer.rows))
            print(_summary(raced), flush=True)
            yield from writer.extend(row for row in raced if row["variant"] == FLEX)


def rehearsals(setup: Setup) -> tuple[Rehearsal, ...]:
    """None but those of the race."""
    return ()


def failures(rows: list[Row]) -> list[str]:
    """None: it is a peer."""
    return []


def unfinished(setup: Setup, writer: Writer) -> int:
    """Cases without a row."""
    return sum(not _done(writer, case) for case in _cases(setup))


def _cases(setup: Setup) -> list[Case]:
    modes = [mode for mode in get_args(Mode) if mode != "backward"]  # compiled for training as a whole
    if setup.dry:
        return [Case(2, 1, 22, "fp32", mode, 16) for mode in modes]
    return [Case(*shape, tokens, "bf16", mode) for tokens, shape in _SHAPES.items() for mode in modes]


def _contenders(case: Case, setup: Setup, writer: Writer) -> list[Peer]:
    """FlexAttention, and the fastest of ours and of the peers where the race was run."""
    raced = [row for row in rows_of(writer, case) if row["median_ms"] is not None]
    by_ours = {row["ours"]: row["variant"] for row in sorted(raced, key=lambda row: -row["median_ms"])}
    those = [peer for peer in everyone(case.layout, None) if peer.name in (FLEX, *by_ours.values())]
    if setup.dry:
        reason = "compiles anew for every shape, too slow for a dry run"
        return [peer.unless(lambda *_: reason) if peer.name == FLEX else peer for peer in those]
    return those


def _done(writer: Writer, case: Case) -> bool:
    its = [row for row in rows_of(writer, case) if row["variant"] == FLEX]
    return bool(its) or pieces.broken(writer, NAME, case)


def _summary(rows: list[Row]) -> str:
    """Behind the case's name."""
    timed = [f"{row['variant']} {row['ns_per_head']:.4g} ns a head" for row in rows if row["ns_per_head"] is not None]
    return ": " + (", ".join(timed) or "nobody could be raced")
