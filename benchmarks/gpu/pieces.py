"""A piece of a stage's work: named as it begins, so that whoever watches knows what hangs; what broke is a row.

No later process begins a piece that has such a row, so it cannot break on the same piece again.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, TypedDict

from benchmarks import results
from benchmarks.gpu.stage import Setup, sentence
from benchmarks.machine import Machine
from benchmarks.results import Row, Writer
from vitreg_kernels.measure.race import lost


class BrokenRow(TypedDict):
    """A piece of work that raised, hung, or took its process along. Whatever else it had is lost."""

    kind: Literal["broken"]
    stage: str
    piece: str
    reason: str
    machine: Machine


results.ROW_TYPES["broken"] = BrokenRow


@contextmanager
def begun(setup: Setup, writer: Writer, stage: str, piece: object) -> Iterator[None]:
    """Around a piece of work. What it raises is written, and the stage goes on with the next piece.

    Raises:
        RuntimeError: if no other piece can run, because a kernel broke the process's hold of the GPU.
    """
    setup.mark(str(piece))
    try:
        yield
    except Exception as error:  # the others are still to be done
        writer.extend([row(stage, str(piece), sentence(error))])
        print(f"      FAIL {piece}: {sentence(error)}", flush=True)
    except BaseException:  # a cut is nobody's fault
        setup.mark(None)
        raise
    is_lost = lost(setup.device)  # which waits for the GPU, and so is part of the piece
    setup.mark(None)
    if is_lost:
        raise RuntimeError(f"the GPU cannot be used any more by this process, after {piece}")


def broken(writer: Writer, stage: str, piece: object) -> bool:
    """Whether it is not to be begun again."""
    return bool(writer.find(kind="broken", stage=stage, piece=str(piece)))


def row(stage: str, piece: str, reason: str) -> Row:
    """That it broke, without its ``machine``."""
    return {"kind": "broken", "stage": stage, "piece": piece, "reason": reason}


def failures(rows: list[Row]) -> list[str]:
    """A sentence for each that broke."""
    return [f"{row['stage']}, {row['piece']}: {row['reason']}" for row in rows if row["kind"] == "broken"]
