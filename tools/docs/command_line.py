"""What each command of ``vitreg`` answers to ``--help``, as argparse of Python 3.10 to 3.12 writes it."""

from __future__ import annotations

import argparse
import os

from vitreg_kernels import cli

WIDTH = 100


def blocks() -> dict[str, str]:
    """The help of the whole and of each command, by name."""
    parser = cli.parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return {parser.prog: _help(parser)} | {each.prog: _help(each) for each in commands.choices.values()}


def _help(parser: argparse.ArgumentParser) -> str:
    # argparse takes the width of the terminal from the environment when it formats.
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = str(WIDTH)
    try:
        return f"```\n{parser.format_help().strip()}\n```"
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before
