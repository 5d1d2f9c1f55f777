"""Runs the tests of timm or transformers as they are and with every model patched, and compares.

Ends with status 1 if a test that passes unpatched does not pass patched, naming it, if a class that was patched had no
fused call, or if there was none at all.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from . import timm, transformers
from .compare import HEADER, Comparison, in_columns
from .fetch import fetched
from .peer import Peer
from .run import run

PEERS = {peer.name: peer for peer in (timm.PEER, transformers.PEER)}


def main() -> int:
    """Runs what the command line asks for and returns the exit status."""
    arguments = _parser().parse_args()
    peer = PEERS[arguments.peer]
    groups = tuple(arguments.group or (peer.all_groups() if arguments.all else peer.groups))
    return compare(peer, fetched(peer), groups, fresh=arguments.fresh)


def compare(peer: Peer, folder: Path, groups: tuple[str, ...], *, fresh: bool = False) -> int:
    """Both runs of the tests, and the exit status.

    Args:
        peer: the library.
        folder: what was fetched of it.
        groups: patterns; tests that none fits are not run.
        fresh: whether to run the baseline again where its rows are there.
    """
    baseline = folder / f"baseline-torch-{torch.__version__}.jsonl"
    patched = folder / "patched.jsonl"
    patched.unlink(missing_ok=True)
    if fresh:
        baseline.unlink(missing_ok=True)
    if baseline.exists():
        print(f"baseline: what {baseline} holds is not run again (--fresh does)", flush=True)
    comparison = Comparison()
    try:
        for row in _with_progress("baseline", comparison, run(peer, folder, groups, baseline, patched=False)):
            comparison.baseline[row["test"]] = row
        print(in_columns(HEADER), flush=True)
        for row in _with_progress("patched", comparison, run(peer, folder, groups, patched, patched=True)):
            comparison.patched[row["test"]] = row
            group = comparison.chosen[row["test"]]
            if comparison.finished(group):
                with tqdm.external_write_mode():
                    print(in_columns(comparison.line(group)), flush=True)
    except KeyboardInterrupt:
        print(f"interrupted; the rows are in {patched}, and the next run takes up the baseline where this one ended")
        return 130
    for group in dict.fromkeys(comparison.chosen.values()):
        if not comparison.finished(group):
            print(in_columns(comparison.line(group)))
    faults = comparison.faults()
    print(*faults, sep="\n")
    print(
        f"{peer.name} {version(peer.name)}, torch {torch.__version__}: {len(comparison.patched)} tests, "
        f"{len(list(comparison.lost()))} lost; what pytest said is in {patched.with_suffix('.log')}"
    )
    return int(bool(faults))


def _with_progress(name: str, comparison: Comparison, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The rows of tests that were chosen; which they are, the comparison gets to know."""
    with tqdm(desc=name, unit=" tests", disable=None) as bar:
        for row in rows:
            if "chosen" in row:
                comparison.chosen = row["chosen"]
                bar.total = len(comparison.chosen)
            else:
                bar.update()
                bar.set_postfix_str(row["test"].rpartition("::")[2][-60:])
                yield row


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__)
    parser.add_argument("peer", choices=sorted(PEERS))
    parser.add_argument(
        "--all", action="store_true", help="more models: of timm all with a class known here, which takes hours"
    )
    parser.add_argument("--group", action="append", help="a pattern of a model's, class's or function's name")
    parser.add_argument("--fresh", action="store_true", help="run the baseline again")
    return parser


if __name__ == "__main__":
    sys.exit(main())
