"""One run of a library's tests, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .peer import Peer

_REPOSITORY = Path(__file__).parents[2]


def run(peer: Peer, folder: Path, groups: Sequence[str], rows: Path, *, patched: bool) -> Iterator[dict[str, Any]]:
    """Run the tests and give what the plugin writes of each, as it comes; pytest's own words go into ``<rows>.log``.

    Args:
        peer: the library.
        folder: what was fetched.
        groups: patterns; tests that none fits are not run.
        rows: file to which the plugin adds its rows. What is in it is given first.
        patched: whether models are patched.
    """
    tests = [str(folder / f"{peer.name}_tests" / file) for file in peer.tests]  # a path of its own stays as it is
    command = [sys.executable, "-m", "pytest", "-ptests.peers.plugin", "-pno:cacheprovider", "--noconftest"]
    command += ["--disable-warnings", f"--rows={rows}", f"--rootdir={folder}", f"--config-file={folder / 'pytest.ini'}"]
    command += [f"--group={group}" for group in groups]
    command += [f"--left-out={test}" for test in peer.left_out]
    command += [f"--built-by={peer.built_by}", "--patched"] if patched else []
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(folder), str(_REPOSITORY))),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "HF_HUB_OFFLINE": "1",
        "VITREG_CALIBRATION": "0",
    }
    with (
        rows.with_suffix(".log").open("w") as log,
        subprocess.Popen([*command, *tests], cwd=folder, env=environment, stdout=log, stderr=log) as process,
    ):
        try:
            yield from _rows_of(process, rows)
        finally:
            process.terminate()


def _rows_of(process: subprocess.Popen[bytes], path: Path) -> Iterator[dict[str, Any]]:
    path.touch()
    unfinished = ""
    with path.open() as file:
        while True:
            ended = process.poll() is not None
            *lines, unfinished = (unfinished + file.read()).split("\n")
            yield from map(json.loads, lines)
            if ended:
                return
            time.sleep(0.2)
