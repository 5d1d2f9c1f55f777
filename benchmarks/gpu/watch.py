"""A process that is watched: where it stands, and an end to it when it hangs.

A kernel that never ends blocks its process in CUDA, where no signal but the last is heard. So whoever watches is
another process, which knows from a file what the first is doing and until when that may take.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.machine import ROOT

BEGIN_S = 60.0  # for a process to import torch, and again to take hold of the GPU
_LOOK_S = 0.2  # between two looks at a process
_GRACE_S = 5.0  # for a process that is told to end


class Mark(NamedTuple):
    """What a process is doing.

    Attributes:
        file: the result file it writes; ``None`` if there is none yet.
        stage: the stage it is in; ``None`` before the first.
        piece: the piece of work; ``None`` between two.
        limit: ``time.monotonic()``, of every process alike, from which on it counts as hung.
    """

    file: str | None
    stage: str | None = None
    piece: str | None = None
    limit: float = math.inf

    def write(self, path: Path) -> None:
        """Leaves it for ``read``, whole at every moment."""
        beside = path.with_suffix(".part")
        beside.write_text(json.dumps(self))
        os.replace(beside, path)


class Ended(NamedTuple):
    """How a process ended.

    Attributes:
        code: its status, or the negative of the signal that ended it.
        mark: what it was doing.
        why: ``"by itself"``, ``"hung"`` beyond its mark's limit, or at the end of the time for all, ``"time"``.
    """

    code: int
    mark: Mark
    why: str = "by itself"


def read(path: Path) -> Mark:
    """The last mark that was left."""
    return Mark(*json.loads(path.read_text()))


def watch(command: Sequence[str], path: Path, end: float) -> Ended:
    """Runs a command that leaves its marks in a file, until it ends or has to.

    Whatever ends this process ends that one too, by ``end_with_watcher``.

    Args:
        command: program and arguments.
        path: of the marks. The first is there, as a process may hang before it comes to say what it does.
        end: ``time.monotonic()`` at which it is ended, whatever it does.
    """
    # In a session of its own, so that what it has started can be ended with it.
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, start_new_session=True)
    why = "by itself"
    try:
        while process.poll() is None:
            now, mark = time.monotonic(), read(path)
            if now >= end or now >= mark.limit:
                why = "time" if now >= end else "hung"
                break
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LOOK_S)
        if why == "by itself":
            mark = read(path)
    finally:
        _stop(process)
    return Ended(process.returncode, mark, why)


def end_with_watcher() -> None:
    """Has this process end when the one that watches it does, even if that was killed."""

    def wait() -> None:
        os.read(0, 1)  # nothing is ever written: it returns when the other end is gone
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def _stop(process: subprocess.Popen[bytes]) -> None:
    """First by Ctrl-C, so that it ends as it would by hand; then for good, with all that it has started."""
    if process.poll() is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(subprocess.TimeoutExpired):  # one that is stuck in a driver outlives even that
        process.wait(_GRACE_S)
