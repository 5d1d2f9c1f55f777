"""The command line, ``vitreg`` or ``python -m vitreg_kernels``: one file a command, each thin.

Not here: anything that Python could not call just as well; a command prints what the library tells.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from .._version import __version__
from ..ops.catalogue import OPS
from . import analyze, calibrate
from .check import check
from .info import info
from .support import support


def parser() -> argparse.ArgumentParser:
    """Of all commands."""
    vitreg = argparse.ArgumentParser(prog="vitreg", description="Fused attention for ViTs with register tokens.")
    vitreg.add_argument("--version", action="version", version=f"vitreg_kernels {__version__}")
    commands = vitreg.add_subparsers(dest="command", required=True)
    commands.add_parser("info", help="this machine, and what each backend supports")
    commands.add_parser("support", help="the classes of other libraries that patch(model) knows")
    checking = commands.add_parser("check", help="accuracy of every backend usable on this machine, against fp64")
    checking.add_argument("--op", action="append", help=f"check this one only, of {', '.join(OPS)} (may be repeated)")
    checking.add_argument("--backend", action="append", help="check this one only (may be repeated)")
    checking.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    calibrate.add_to(commands)
    analyze.add_to(commands)
    return vitreg


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit status is 0 only if all is well.

    Where nobody reads on, as behind ``| head``, it ends in silence, by the status of a process that SIGPIPE ended.
    """
    arguments = parser().parse_args(argv)
    try:
        status = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        # Python writes what is left at its end, and would complain of the same again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + 13
    return status


def _run(arguments: argparse.Namespace) -> int:
    if arguments.command == "info":
        print(info())
        return 0
    if arguments.command == "support":
        print(support())
        return 0
    if arguments.command == "calibrate":
        return calibrate.run(arguments)
    if arguments.command == "analyze":
        return analyze.run(arguments)
    return check(arguments.op, arguments.backend, arguments.device)
