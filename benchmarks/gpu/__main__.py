"""The GPU run: a smoke test, accuracy, races, outputs and models, in stages; then a table and a picture.

Every row is written as it comes, and the same command goes on with a run that was cut or ran out of time, whose file is
in the folder of results. The stages run in a process that is watched: if it hangs, dies or loses the GPU, another goes
on behind the piece of work that did it; and while there is time, another does what stages had none for. Ends with
status 1 if anything is wrong or broke, naming each; and with 2 if it cannot begin.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import machine, results
from benchmarks.gpu import began, pieces, report, watch, worker
from benchmarks.gpu.stage import DEFAULT, NAMES, Loaded, load
from benchmarks.gpu.watch import Ended, Mark
from benchmarks.results import Row, Writer
from vitreg_kernels._triton import mode

SECONDS = 540.0  # of a default run, with its beginning and its end
_CLOSING_S = 15.0  # of them for the report, and for a process that is told to end
_AGAIN = "run `make gpu` again to go on"
_PROCESS = "process"  # the stage of what is broken of none, in result files
# Rows that a new process writes anew, or that are no work.
_NO_WORK = {"environment", "roofline", "stage"}


def main(arguments: Sequence[str] | None = None, *, start: float | None = None) -> int:
    """Runs what the command line asks for and returns the exit status.

    Args:
        arguments: of the command line.
        start: ``time.monotonic()`` from which on its time counts; now by default.
    """
    start = time.monotonic() if start is None else start
    asked = _parser().parse_args(arguments)
    loaded = load()  # the schema of result files is in the stages
    if asked.report is not None:
        return _report(asked.report)
    named = tuple(asked.stages.split(","))
    if problem := _problem(named, asked):
        print(problem, file=sys.stderr)
        return 2
    end = math.inf if len(named) == 1 else start + SECONDS - _CLOSING_S
    if asked.cache is not None:
        os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "vitreg_kernels"))
    with tempfile.TemporaryDirectory(prefix="vitreg-gpu-") as folder:
        try:
            ended = _stages(asked, named, end, Path(folder))
            cut = ended.why == "by itself" and ended.code == worker.CUT
        except KeyboardInterrupt:
            cut = True
    if cut:
        print(f"\nCut. What is done is written: {_AGAIN}.", file=sys.stderr)
        return worker.CUT
    if ended.mark.file is None and _told(ended):
        return ended.code
    print()
    file = Path(ended.mark.file) if ended.mark.file is not None else _of_nothing(ended, asked)
    if status := _report(file):
        return status
    unloaded = [loaded.broken[name] for name in named if name in loaded.broken]
    return _verdict(loaded, unloaded, results.load(file), lost=ended.code == worker.AGAIN, dry=asked.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--stages",
        default=",".join(DEFAULT),
        help=f"any of {','.join(NAMES)}; all but the last by default, within nine minutes; one alone takes all the "
        "time it needs",
    )
    parser.add_argument("--fresh", action="store_true", help="begin a new file, do not go on from a cut run")
    parser.add_argument(
        "--results",
        type=Path,
        metavar="DIR",
        help="the folder of the result file, table and picture; a cut run's file that is there is gone on with",
    )
    parser.add_argument("--cache", type=Path, metavar="FILE", help="kernels of `python -m benchmarks.gpu.pack`")
    parser.add_argument("--dry-run", action="store_true", help="rehearse every step on the CPU, on tiny shapes")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only draw the table and picture of a result file")
    return parser


def _problem(named: Sequence[str], asked: argparse.Namespace) -> str | None:
    """Why the command cannot begin."""
    unknown = [name for name in named if name not in NAMES]
    if unknown:
        return f"unknown stage {unknown[0]!r}: expected any of {','.join(NAMES)}"
    if asked.cache is not None and not asked.cache.is_file():
        return f"there is no file {asked.cache}: `python -m benchmarks.gpu.pack` makes it"
    if asked.dry_run:
        return _interpreter_fault() if mode.INTERPRETING else None
    if mode.INTERPRETING:
        return "TRITON_INTERPRET is set, so no kernel would run on the GPU: unset it, or ask for --dry-run"
    return None


def _interpreter_fault() -> str | None:
    """Why triton's interpreter cannot run here, where the kernels on a GPU could."""
    found = {name: importlib.metadata.version(name) for name in ("triton", "numpy")}
    triton, numpy = (tuple(map(int, version.split(".")[:2])) for version in found.values())
    if triton >= (3, 7) or numpy < (2, 5):
        return None
    return (
        f"the interpreter of triton {found['triton']} fails with numpy {found['numpy']}: rehearse with "
        "`pip install 'numpy<2.5'` or with triton 3.7; kernels on a GPU are not concerned"
    )


def _stages(asked: argparse.Namespace, named: Sequence[str], end: float, folder: Path) -> Ended:
    """Runs the stages in one process after another, until one has nothing left to do or cannot go on."""
    every = left = [name for name in NAMES if name in named or name == NAMES[0]]  # every share is of the ceilings there
    more = [*(["--fresh"] if asked.fresh else []), *(["--cache", str(asked.cache.absolute())] if asked.cache else [])]
    file, before = None, None
    while True:
        ended = _watched(asked, left, end, folder, file, more)
        if ended.mark.file is None:
            return ended
        file = Path(ended.mark.file)
        left = _rest(ended, left, file)
        rows = results.load(file)
        if ended.why == "by itself" and ended.code == 0:
            last = _last(rows)
            left = [name for name in every if name in last and last[name]["unfinished"]]
        done = _work(rows)
        no_further = ended.code in (0, worker.AGAIN) and done == before
        # Tuning changes the sources, and a new process would begin another file.
        changed = machine.sources() != rows[0]["machine"]["sources"]
        if not left or no_further or changed or time.monotonic() >= end:
            return ended
        print(f"Going on in a new process: {', '.join(left)}.", flush=True)
        before, more = done, ["--file", str(file)]


def _watched(
    asked: argparse.Namespace, stages: Sequence[str], end: float, folder: Path, file: Path | None, more: Sequence[str]
) -> Ended:
    mark = folder / "mark.json"
    Mark(file and str(file), None, "importing torch", time.monotonic() + watch.BEGIN_S).write(mark)
    given = {"--results": asked.results and asked.results.absolute(), "--mark": mark, "--end": end}
    options = [text for name, value in given.items() if value is not None for text in (name, str(value))]
    dry = ["--dry-run"] if asked.dry_run else []
    command = [sys.executable, "-m", "benchmarks.gpu.worker", "--stages", ",".join(stages), *options, *dry, *more]
    return watch.watch(command, mark, end)


def _rest(ended: Ended, stages: list[str], file: Path) -> list[str]:
    """The stages for a next process; none if it is not to be. Writes what the last one broke on."""
    _, stage, piece, _ = ended.mark
    if ended.why == "time" or _told(ended) or (ended.why == "by itself" and ended.code == 0):
        return []
    rest = stages[stages.index(stage) :] if stage is not None else []
    if ended.why == "by itself" and ended.code == worker.AGAIN:
        print("\nA kernel broke the hold of the GPU.", flush=True)
        return rest
    how = _how(ended)
    print(f"\n{stage}, {piece or 'between two pieces of work'}: {how}.", flush=True)
    if piece is not None:
        results.append(file, pieces.row(stage or _PROCESS, piece, how))
        return rest
    results.append(file, {"kind": "stage", "stage": stage, "seconds": None, "unfinished": None, "error": how})
    return rest[1:]


def _told(ended: Ended) -> bool:
    """Whether it ended as it should and has said why."""
    return ended.why == "by itself" and ended.code in (worker.CANNOT, worker.CUT)


def _how(ended: Ended) -> str:
    return f"died with status {ended.code}" if ended.why == "by itself" else "hung, and its process was ended"


def _of_nothing(ended: Ended, asked: argparse.Namespace) -> Path:
    """The file of a run whose process did not even come to write one. Which GPU it would be of, nobody could tell."""
    here = machine.describe(torch.device("cpu")) | {"device": "unknown GPU", "capability": report.UNKNOWN}
    writer = Writer(results.default_path(here, folder=asked.results), {"command": "gpu"}, here, fresh=True)
    writer.extend([pieces.row(_PROCESS, ended.mark.piece, _how(ended))])
    return writer.path


def _work(rows: Sequence[Row]) -> int:
    return sum(row["kind"] not in _NO_WORK for row in rows)


def _last(rows: Sequence[Row]) -> dict[str, Row]:
    """How each stage ended, the last time."""
    return {row["stage"]: row for row in rows if row["kind"] == "stage"}


def _report(path: Path) -> int:
    """Writes and prints the table of a result file, and draws it where that is possible."""
    try:
        rows = results.load(path)
        if not any(row["kind"] in ("environment", "broken") for row in rows):
            raise ValueError("it is not of a GPU run")
    except (OSError, ValueError) as error:
        print(f"cannot read {path}: {error}", file=sys.stderr)
        return 2
    print(report.save(path, rows))
    return 0


def _verdict(loaded: Loaded, unloaded: list[str], rows: list[Row], *, lost: bool, dry: bool) -> int:
    if dry:
        print(f"\n{worker.DRY}.")
    last = _last(rows)
    failures = [*unloaded, *(f"{n} stopped: {row['error']}" for n, row in last.items() if row["error"])]
    failures += pieces.failures(rows) + [s for stage in loaded.stages.values() for s in stage.failures(rows)]
    if lost:
        failures.append(f"a kernel broke the hold of the GPU and the stages after it did not run: {_AGAIN}")
    if failures:
        print(f"\n{len(failures)} failures:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    # None where it was cut: how much is left, nobody has counted.
    undone = {n: row["unfinished"] for n, row in last.items() if row["unfinished"] != 0}
    left = ", ".join(f"{'some' if count is None else count} pieces of {name}" for name, count in undone.items())
    print(f"\nNothing failed. Unfinished: {left}: {_AGAIN}." if left else "\nNothing failed.")
    return 0


if __name__ == "__main__":
    # A shell has what it starts in the background ignore Ctrl-C; whoever ends this leaves no process behind.
    for ending in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ending, signal.default_int_handler)
    sys.exit(main(start=began.AT))
