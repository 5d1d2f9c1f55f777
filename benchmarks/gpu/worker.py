"""The process that runs the stages. ``benchmarks.gpu.__main__`` starts it, watches it, and starts another after it."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import machine, results
from benchmarks.gpu import watch
from benchmarks.gpu.stage import DEFAULT, Loaded, Setup, Stage, load, sentence
from benchmarks.gpu.watch import Mark
from benchmarks.machine import Machine
from benchmarks.results import Writer
from vitreg_kernels.measure.race import lost

# Statuses that it ends with, beside 0.
CANNOT, AGAIN, CUT = 2, 75, 130  # AGAIN: the GPU is lost to this process, and another can go on
# A stage that is asked for alone has all the time it needs, and so has each piece of its work.
_ALONE_S = 900.0
DRY = "DRY RUN: tiny shapes on a CPU, whose times and speeds mean nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs stages as told and returns the exit status."""
    asked = _parser().parse_args(arguments)
    if asked.mark is not None:
        watch.end_with_watcher()
    loaded = load()  # the schema of result files is in the stages
    known = asked.file and str(asked.file)
    _leave(Mark(known, None, "taking hold of the GPU", time.monotonic() + watch.BEGIN_S), asked.mark)
    if not asked.dry_run and not torch.cuda.is_available():
        told = f"torch {torch.__version__} sees no CUDA GPU: `make gpu DRY=1` (--dry-run) rehearses without one"
        print(told, file=sys.stderr)
        return CANNOT
    device = torch.device("cpu" if asked.dry_run else "cuda")
    try:
        writer = _writer(machine.describe(device), asked)
    except ValueError as error:
        print(error, file=sys.stderr)
        return CANNOT
    setup = Setup(device, asked.dry_run, cache=asked.cache)
    try:
        _run(asked.stages.split(","), loaded, setup, writer, asked)
        if lost(device):
            return AGAIN
        if _complete(loaded, setup, writer):
            writer.finish()
    except KeyboardInterrupt:
        return CUT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.worker", description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", required=True)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--results", type=Path, help="the folder of the result file")
    parser.add_argument("--file", type=Path, help="the result file that another process has begun")
    parser.add_argument("--cache", type=Path, help="of `python -m benchmarks.gpu.pack`")
    parser.add_argument("--end", type=float, default=math.inf, help="time.monotonic() after which no work is begun")
    parser.add_argument("--mark", type=Path, help="where to leave what it is doing, for who watches")
    return parser


def _writer(here: Machine, asked: argparse.Namespace) -> Writer:
    run = {"command": "gpu"}
    if asked.dry_run:
        run |= {"dry": "yes"}
        print(DRY)
    if asked.file is not None:
        writer = Writer(asked.file, run, here)
    else:
        path = results.default_path(here, folder=asked.results)
        path = path.with_name(f"dry-run-{path.name}") if asked.dry_run else path
        left = None if asked.fresh else _left_by_a_cut_run(path.parent, run, here)
        writer = left or Writer(path, run, here, fresh=asked.fresh)
    print(f"vitreg_kernels on {here['device']} ({here['capability']})")
    resumed = f", from row {writer.resumed + 1} of a cut run" if writer.resumed else ""
    print(f"Results go to {os.path.relpath(writer.path)}{resumed}")
    return writer


def _left_by_a_cut_run(folder: Path, run: dict[str, str], here: Machine) -> Writer | None:
    """Of a file there to go on with, whatever its name: it may be of the day before, or brought along."""
    for path in sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError):  # another kind of file, or of another version
            writer = Writer(path, run, here)
            if writer.resumed:
                return writer
    return None


def _run(names: Sequence[str], loaded: Loaded, setup: Setup, writer: Writer, asked: argparse.Namespace) -> None:
    """Runs the stages in order, until the GPU is lost."""
    for number, name in enumerate(names, 1):
        if name in loaded.broken:
            print(f"\n{number}/{len(names)} {loaded.broken[name]}")
            continue
        stage = loaded.stages[name]
        print(f"\n{number}/{len(names)} {name}: {stage.__doc__.partition(chr(10))[0]}", flush=True)
        start = time.monotonic()
        # Counted back from the end: what a stage does not need is the next ones', and one that hung and goes on in a
        # new process has the deadline that it had.
        later = [other for other in names[number:] if other in DEFAULT and other in loaded.stages]
        deadline = asked.end - sum(loaded.stages[other].SECONDS for other in later)
        longest = _ALONE_S if math.isinf(deadline) else stage.LONGEST
        here = Mark(str(writer.path), name, limit=max(start, deadline) + longest)
        writer.extend([_row(name, None, None, None)])  # where the process is killed, the file says so
        _leave(here, asked.mark)
        unfinished, error = _attempt(
            stage, setup._replace(deadline=deadline, mark=_marker(here, longest, asked.mark)), writer
        )
        writer.extend([_row(name, time.monotonic() - start, unfinished, error)])
        left = f"; {unfinished} pieces of work are unfinished" if unfinished else ""
        print(f"    {time.monotonic() - start:.0f} s{left}", flush=True)
        if lost(setup.device):
            return


def _attempt(stage: Stage, setup: Setup, writer: Writer) -> tuple[int | None, str | None]:
    """Runs a stage. How much it leaves undone, and what stopped it: no stage takes the later ones along."""
    try:
        for _ in stage.run(setup, writer):
            pass
        return stage.unfinished(setup, writer), None
    except Exception as error:
        traceback.print_exc()
        return None, sentence(error)


def _row(stage: str, seconds: float | None, unfinished: int | None, error: str | None) -> results.Row:
    return {"kind": "stage", "stage": stage, "seconds": seconds, "unfinished": unfinished, "error": error}


def _marker(here: Mark, longest: float, path: Path | None) -> Callable[[str | None], None]:
    """Tells who watches of each piece of a stage's work."""

    def mark(piece: str | None) -> None:
        _leave(here if piece is None else here._replace(piece=piece, limit=time.monotonic() + longest), path)

    return mark


def _leave(mark: Mark, path: Path | None) -> None:
    if path is not None:
        mark.write(path)


def _complete(loaded: Loaded, setup: Setup, writer: Writer) -> bool:
    """Whether nothing is left of a default run, whichever stages this one was asked for, and nothing stopped one."""
    stopped = {row["stage"]: row["error"] for row in writer.find(kind="stage")}  # the last counts
    return not any(stopped.values()) and all(
        name in loaded.stages and not loaded.stages[name].unfinished(setup, writer) for name in DEFAULT
    )


if __name__ == "__main__":
    status = main()
    if status == AGAIN:  # torch may abort while it is taken down with a GPU that is lost
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)
