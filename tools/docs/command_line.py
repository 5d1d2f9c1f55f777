"""What each command of ``vitreg`` answers to ``--help``, as argparse of Python 3.10 to 3.12 writes it, and what is the
same on every machine of what they answer else: the classes that ``patch`` knows, and what each backend serves."""

from __future__ import annotations

import argparse
import os

from vitreg_kernels import cli
from vitreg_kernels.cli.info import support_table
from vitreg_kernels.cli.support import support
from vitreg_kernels.ops.catalogue import OPS

WIDTH = 84


def blocks() -> dict[str, str]:
    """The help of the whole and of each command, by name, and what ``vitreg support`` prints."""
    parser = cli.parser()
    (commands,) = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    helps = {each.prog: _help(each) for each in commands.choices.values()}
    return {parser.prog: _help(parser)} | helps | {"the answer of vitreg support": f"```\n{support()}\n```"}


def support_tables() -> dict[str, str]:
    """What each backend serves, a table an op."""
    return {f"backends of {op.replace('_', ' ')}": support_table(op) for op in OPS}


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
