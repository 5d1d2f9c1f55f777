"""The process that runs the stages. ``benchmarks.gpu.__main__`` starts it, watches it, and starts another after it."""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks import machine, results
from benchmarks.gpu import archive, watch
from benchmarks.gpu.stage import DEFAULT, Loaded, Setup, Stage, load, sentence
from benchmarks.gpu.watch import Mark
from benchmarks.machine import Machine
from benchmarks.results import Writer
from vitreg_kernels.measure.race import lost
from vitreg_kernels.ops._shared.capability import capability

# Statuses that it ends with, beside 0.
CANNOT, AGAIN, CUT = 2, 75, 130  # AGAIN: the GPU is lost to this process, and another can go on
_JUDGING = ("environment", "smoke", "accuracy")
# A stage that is asked for alone has all the time it needs, and so has each piece of its work.
_ALONE_S = 900.0
DRY = "DRY RUN: tiny shapes on a CPU, whose times and speeds mean nothing"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs stages as told and returns the exit status."""
    asked = _parser().parse_args(arguments)
    if asked.mark is not None:
        watch.end_with_watcher()
    loaded = load()  # the schema of result files is in the stages
    device = torch.device("cpu" if asked.dry_run else "cuda")
    try:
        if asked.cache is not None:
            _take(asked.cache, capability(device))
        writer = _writer(machine.describe(device), asked)
    except ValueError as error:
        print(error, file=sys.stderr)
        return CANNOT
    mark = Mark(str(writer.path))
    _leave(mark, asked.mark)
    setup = Setup(device, asked.dry_run)
    try:
        names = asked.stages.split(",")
        _run(names, loaded, setup, writer, mark, asked)
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


def _take(file: Path, arch: int) -> None:
    """Has triton find the kernels of an archive.

    Raises:
        ValueError: if it does not fit.
    """
    manifest = archive.read(file)
    if reasons := archive.misfits(manifest, arch):
        raise ValueError(f"{file} does not fit: {'; '.join(reasons)}. Pack another, or go on without CACHE")
    folder = Path(os.environ["TRITON_CACHE_DIR"])
    start = time.monotonic()
    archive.unpack(file, folder)
    held = f"{manifest['kernels']} kernels and {manifest['launchers']} launchers of {file}"
    print(f"Triton's cache in {folder} holds {held} ({time.monotonic() - start:.0f} s)", flush=True)
    if manifest["missing"]:
        print(f"    it is not complete: {manifest['missing']} kernels are compiled here", flush=True)
    if manifest["sources"] != machine.sources():
        print("    it was made from other sources: kernels that have changed since are compiled here", flush=True)


def _writer(here: Machine, asked: argparse.Namespace) -> Writer:
    path, run = asked.file or results.default_path(here, folder=asked.results), {"command": "gpu"}
    if asked.dry_run:
        run |= {"dry": "yes"}
        if asked.file is None:
            path = path.with_name(f"dry-run-{path.name}")
        print(DRY)
    writer = Writer(path, run, here, fresh=asked.fresh)
    print(f"vitreg_kernels on {here['device']} ({here['capability']})")
    resumed = f", from row {writer.resumed + 1} of a cut run" if writer.resumed else ""
    print(f"Results go to {os.path.relpath(writer.path)}{resumed}")
    return writer


def _run(
    names: Sequence[str], loaded: Loaded, setup: Setup, writer: Writer, mark: Mark, asked: argparse.Namespace
) -> None:
    """Runs the stages in order, until the GPU is lost; where the smoke test fails, only what judges follows."""
    for number, name in enumerate(names, 1):
        if name not in _JUDGING and "smoke" in loaded.stages and loaded.stages["smoke"].forbids_timing(writer.rows):
            print(f"\n{number}/{len(names)} {name}: left out, as the smoke test is wrong", flush=True)
            continue
        if name in loaded.broken:
            print(f"\n{number}/{len(names)} {loaded.broken[name]}")
            continue
        stage = loaded.stages[name]
        print(f"\n{number}/{len(names)} {name}: {stage.__doc__.partition(chr(10))[0]}", flush=True)
        start = time.monotonic()
        deadline = math.inf if math.isinf(asked.end) else min(start + stage.SECONDS, asked.end)
        longest = _ALONE_S if math.isinf(deadline) else stage.LONGEST
        here = mark._replace(stage=name, limit=deadline + longest)
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
