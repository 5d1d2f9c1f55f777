"""Compiles for a GPU that is not here what the stages launch, into an archive that `make gpu CACHE=FILE` starts from.

No GPU and no CUDA driver is needed, but the very triton of the machine that has one: its keys hash its own library,
which differs by the version of Python. Ctrl-C packs what is compiled by then; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import importlib
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.gpu import archive, stub
from benchmarks.gpu.stage import Rehearsal, Setup
from vitreg_kernels.measure.warm import Compiler

# Accuracy, which takes most kernels, comes last: a pack that is cut has what the GPU is needed for.
_STAGES = ("smoke", "race", "outputs", "models", "norms", "accuracy")
_FOLDER = machine.ROOT / "build" / "gpu"


def main(arguments: Sequence[str] | None = None) -> int:
    """Packs what the command line asks for and returns the exit status."""
    asked = _parser().parse_args(arguments)
    if problem := _problem(asked):
        print(problem, file=sys.stderr)
        return 2
    file = asked.file or _FOLDER / f"sm_{asked.arch}-triton-{asked.triton}-python-{asked.python}.tar.xz"
    try:
        manifest = pack(file, asked.arch)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 2
    kept = f"{manifest['kernels']} kernels and {manifest['launchers']} launchers, {file.stat().st_size / 1e6:.1f} MB"
    print(f"{os.path.relpath(file)}: {kept}")
    if manifest["missing"]:
        print(f"{manifest['missing']} kernels are missing: run the same command again to go on", file=sys.stderr)
    return 1 if manifest["missing"] else 0


def pack(file: Path, arch: int) -> archive.Manifest:
    """Compiles for a compute capability, and writes the archive.

    Raises:
        RuntimeError: if a stage's calls cannot be made, or without a C compiler.
    """
    # Kept between two packs, so that the second compiles only what has changed.
    cache = _FOLDER / f"sm_{arch}-{archive.environment()['libtriton']}"
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(cache)
    with tempfile.TemporaryDirectory() as folder:
        stub.libcuda(Path(folder))
        _driver()
        keys = compiled(arch)
    there = [key for key in keys if any(archive.folder_of(key).glob("*.cubin"))]
    manifest = archive.Manifest(
        **archive.environment(),
        arch=arch,
        sources=machine.sources(),
        kernels=len(there),
        launchers=archive.launchers(cache),
        missing=len(keys) - len(there),
        keys=there,
    )
    file.parent.mkdir(parents=True, exist_ok=True)
    archive.write(file, cache, manifest)
    return manifest


def compiled(arch: int) -> list[str]:
    """Has triton's cache hold every kernel of the stages; gives their keys.

    Raises:
        RuntimeError: if a stage's calls cannot be made.
    """
    device = torch.device("cpu")
    start = time.monotonic()
    with stub.pretending(arch), Compiler(device) as compiler:
        try:
            waiting = []
            for name, call in rehearsals(Setup(device, dry=False)):
                waiting.append(compiler.begin(call))
                if compiler.raised:
                    raise RuntimeError(f"a call of {name} cannot be made: {compiler.raised[0]}") from compiler.raised[0]
            print(f"{len(compiler.keys)} kernels of {len(waiting)} calls, {time.monotonic() - start:.0f} s", flush=True)
            for done, jobs in enumerate(waiting, 1):
                compiler.wait(jobs)
                if sys.stdout.isatty():
                    print(f"\r{done}/{len(waiting)} calls, {time.monotonic() - start:.0f} s", end="", flush=True)
        except KeyboardInterrupt:
            print("\nCut: packing what there is.", file=sys.stderr)
    print()
    if compiler.refused:
        print(f"{len(compiler.refused)} kernels do not compile, the first: {compiler.refused[0]}", file=sys.stderr)
    return compiler.keys


def rehearsals(setup: Setup) -> Iterator[tuple[str, Rehearsal]]:
    """Calls that launch every kernel that the stages launch, by stage."""
    for name in _STAGES:
        stage = importlib.import_module(f"benchmarks.gpu.{name}")
        yield from ((name, call) for call in stage.rehearsals(setup))


def _driver() -> None:
    """The extension module that triton's driver takes, which is compiled in C as launchers are."""
    from triton.backends.nvidia.driver import CudaUtils

    CudaUtils()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu.pack", description=__doc__.partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--arch", type=int, default=90, help="ten times the compute capability; 90 is an H100 or H200")
    parser.add_argument("--triton", default=".".join(_triton().split(".")[:2]), help="of that machine: 3.6")
    parser.add_argument("--python", default=".".join(platform.python_version_tuple()[:2]), help="of that machine: 3.12")
    parser.add_argument("--file", type=Path, help=f"where to; into {os.path.relpath(_FOLDER)} by default")
    return parser


def _problem(asked: argparse.Namespace) -> str | None:
    """Why this environment cannot pack what is asked for."""
    here = archive.environment()
    if os.environ.get("TRITON_INTERPRET"):
        return "TRITON_INTERPRET is set, so nothing would be compiled: unset it"
    if here["python"] != asked.python or not f"{here['triton']}.".startswith(f"{asked.triton}."):
        return (
            f"this is Python {here['python']} with triton {here['triton']}, whose kernels triton {asked.triton} under "
            f"Python {asked.python} would not find: run the command in an environment of those, made by `python"
            f"{asked.python} -m venv FOLDER` and `FOLDER/bin/pip install torch triton=={asked.triton}.*`"
        )
    return None


def _triton() -> str:
    return archive.environment()["triton"]


if __name__ == "__main__":
    sys.exit(main())
