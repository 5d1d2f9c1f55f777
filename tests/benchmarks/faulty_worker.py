"""The worker of a GPU run in whose stages something breaks: run as ``faulty_worker.py FAULTS ARGUMENTS``.

FAULTS is JSON, a fault by stage: ``hang``, ``die``, or ``lose`` the GPU. It strikes in the first piece of the stage;
of the smoke test in the memory checker, without which all is timed; of "process" before any stage, and before torch.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import contextmanager

_gone: list[str] = []


def strike(fault: str) -> None:
    if fault == "hang":
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # as in a call of CUDA that does not return
        time.sleep(600)
    if fault == "die":
        os.abort()
    _gone.append(fault)
    raise RuntimeError("CUDA error: an illegal memory access was encountered")


def main(faults: dict[str, str], arguments: list[str]) -> int:
    if "process" in faults:
        strike(faults["process"])
    from benchmarks.gpu import memcheck, pieces, stage, worker  # and torch, which takes seconds

    begun = pieces.begun

    @contextmanager
    def faulty(setup, writer, name, piece):
        assert not pieces.broken(writer, name, piece)
        struck = writer.find(kind="broken", stage=name)
        with begun(setup, writer, name, piece):
            if name in faults and not struck and (name != "smoke" or piece == memcheck.NAME):
                strike(faults[name])
            yield

    pieces.begun = faulty
    for module in (pieces, worker):
        module.lost = lambda device: bool(_gone)
    for loaded in stage.load().stages.values():
        loaded.LONGEST = 5.0
    return worker.main(arguments)


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1]), sys.argv[2:]))
