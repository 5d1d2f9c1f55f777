"""The GPU run: accuracy, races, outputs and models, in stages; then a table and a picture.

Every row is written as it comes, and the same command goes on with a run that was cut or ran out of time. Ends with
status 1 if anything is wrong or broke, naming each; and with 2 if it cannot begin.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import machine, results
from benchmarks.gpu import report
from benchmarks.gpu.stage import DEFAULT, NAMES, Loaded, Setup, Stage, load, sentence
from benchmarks.machine import Machine
from benchmarks.results import Writer
from vitreg_kernels._triton import mode
from vitreg_kernels.measure.race import lost

SECONDS = 480.0  # of a default run
_AGAIN = "run `make gpu` again to go on"
_DRY = "DRY RUN: tiny shapes on a CPU, whose times and speeds mean nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs what the command line asks for and returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    asked = _parser().parse_args(arguments)
    loaded = load()  # the schema of result files is in the stages
    if asked.report is not None:
        return _report(asked.report)
    named = tuple(asked.stages.split(","))
    if problem := _problem(named, asked.dry_run):
        print(problem, file=sys.stderr)
        return 2
    device = torch.device("cpu" if asked.dry_run else "cuda")
    try:
        writer = _writer(machine.describe(device), dry=asked.dry_run, fresh=asked.fresh)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    setup = Setup(device, asked.dry_run, deadline=math.inf)
    try:
        errors = _run(named, loaded, setup, writer)
    except KeyboardInterrupt:
        print(f"\nCut. What is done is written: {_AGAIN}.", file=sys.stderr)
        return 130
    if lost(device):
        if _may_start_over(writer):
            print("\nA kernel broke the hold of the GPU; going on in a new process.", flush=True)
            rest = [argument for argument in arguments if argument != "--fresh"]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *rest])
        errors.append(f"a kernel broke the hold of the GPU and the stages after it did not run: {_AGAIN}")
    elif not errors and _complete(loaded, setup, writer):
        writer.finish()
    print()
    _report(writer.path)
    failures = errors + [s for stage in loaded.stages.values() for s in stage.failures(writer.rows)]
    return _verdict(failures, writer, dry=asked.dry_run)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--stages",
        default=",".join(DEFAULT),
        help=f"any of {','.join(NAMES)}; all but the last by default, within eight minutes; one alone takes all the "
        "time it needs",
    )
    parser.add_argument("--fresh", action="store_true", help="begin a new file, do not go on from a cut run")
    parser.add_argument("--dry-run", action="store_true", help="rehearse every step on the CPU, on tiny shapes")
    parser.add_argument("--report", type=Path, metavar="FILE", help="only draw the table and picture of a result file")
    return parser


def _problem(named: Sequence[str], dry: bool) -> str | None:
    """Why the command cannot begin."""
    unknown = [name for name in named if name not in NAMES]
    if unknown:
        return f"unknown stage {unknown[0]!r}: expected any of {','.join(NAMES)}"
    if dry:
        return None
    if mode.INTERPRETING:
        return "TRITON_INTERPRET is set, so no kernel would run on the GPU: unset it, or ask for --dry-run"
    if not torch.cuda.is_available():
        return f"torch {torch.__version__} sees no CUDA GPU: `make gpu DRY=1` (--dry-run) rehearses without one"
    return None


def _writer(here: Machine, *, dry: bool, fresh: bool) -> Writer:
    path, run = results.default_path(here), {"command": "gpu"}
    if dry:
        path, run = path.with_name(f"dry-run-{path.name}"), run | {"dry": "yes"}
        print(_DRY)
    writer = Writer(path, run, here, fresh=fresh)
    print(f"vitreg_kernels on {here['device']} ({here['capability']})")
    resumed = f", from row {writer.resumed + 1} of a cut run" if writer.resumed else ""
    print(f"Results go to {os.path.relpath(writer.path)}{resumed}")
    return writer


def _run(named: Sequence[str], loaded: Loaded, setup: Setup, writer: Writer) -> list[str]:
    """Runs the stages in order, until the GPU is lost; what stopped those that did not end well."""
    names = [name for name in NAMES if name in named or name == NAMES[0]]  # every share is of the ceilings there
    end = time.monotonic() + SECONDS
    errors = []
    for number, name in enumerate(names, 1):
        if name in loaded.broken:
            print(f"\n{number}/{len(names)} {loaded.broken[name]}")
            errors.append(loaded.broken[name])
            continue
        stage = loaded.stages[name]
        print(f"\n{number}/{len(names)} {name}: {stage.__doc__.partition(chr(10))[0]}", flush=True)
        start = time.monotonic()
        deadline = math.inf if len(named) == 1 else min(start + stage.SECONDS, end)
        unfinished, error = _attempt(stage, setup._replace(deadline=deadline), writer)
        seconds = time.monotonic() - start
        row = {"kind": "stage", "stage": name, "seconds": seconds, "unfinished": unfinished, "error": error}
        writer.extend([row])
        left = f"; {unfinished} pieces of work are unfinished: {_AGAIN}" if unfinished else ""
        print(f"    {seconds:.0f} s{left}", flush=True)
        if error is not None:
            errors.append(f"{name} stopped: {error}")
        if lost(setup.device):
            break
    return errors


def _attempt(stage: Stage, setup: Setup, writer: Writer) -> tuple[int | None, str | None]:
    """Runs a stage. How much it leaves undone, and what stopped it: no stage takes the later ones along."""
    try:
        for _ in stage.run(setup, writer):
            pass
        return stage.unfinished(setup, writer), None
    except Exception as error:
        traceback.print_exc()
        return None, sentence(error)


def _complete(loaded: Loaded, setup: Setup, writer: Writer) -> bool:
    """Whether nothing is left of a default run, whichever stages this one was asked for."""
    return all(name in loaded.stages and not loaded.stages[name].unfinished(setup, writer) for name in DEFAULT)


def _may_start_over(writer: Writer) -> bool:
    """Whether a new process would go on with this one's rows, what broke among them, and so not break on it again."""
    written = {row["kind"] for row in writer.rows[writer.resumed :]} - {"environment", "roofline", "stage"}
    return bool(written) and machine.sources() == writer.rows[0]["machine"]["sources"]  # tuning changes them


def _report(path: Path) -> int:
    """Writes and prints the table of a result file, and draws it where that is possible."""
    try:
        rows = results.load(path)
        if not any(row["kind"] == "environment" for row in rows):
            raise ValueError("it is not of a GPU run")
    except (OSError, ValueError) as error:
        print(f"cannot read {path}: {error}", file=sys.stderr)
        return 2
    print(report.save(path, rows))
    return 0


def _verdict(failures: Sequence[str], writer: Writer, *, dry: bool) -> int:
    if dry:
        print(f"\n{_DRY}.")
    if failures:
        print(f"\n{len(failures)} failures:", *failures, sep="\n  ", file=sys.stderr)
        return 1
    unfinished = {row["stage"]: row["unfinished"] for row in writer.rows if row["kind"] == "stage"}  # the last counts
    left = ", ".join(f"{count} pieces of {name}" for name, count in unfinished.items() if count)
    print(f"\nNothing failed. Unfinished: {left}: {_AGAIN}." if left else "\nNothing failed.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
