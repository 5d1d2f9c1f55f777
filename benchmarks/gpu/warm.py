"""Kernels compiled ahead, on every core: a call whose kernels are compiled loads them from triton's cache on disk.

A stage's own calls tell which kernels they take. They are made once with every launch left out, so that nothing runs
on the GPU and what they give is garbage.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, TypeVar

from benchmarks.gpu.stage import Setup
from benchmarks.machine import cores
from vitreg_kernels._triton.launch import Launch
from vitreg_kernels._triton.replay import recording
from vitreg_kernels.ops._shared.capability import tuned_for

if TYPE_CHECKING:
    from vitreg_kernels._triton.offline import Compilation

Piece = TypeVar("Piece")


@contextmanager
def processes() -> Iterator[Executor]:
    """As many processes as there are cores, to compile in. A job that has not begun when the block ends never does."""
    # Not forked: CUDA does not survive that. They start with the first jobs. Ctrl-C is for the process that waits.
    pool = ProcessPoolExecutor(cores(), get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def up(pieces: Iterable[Piece], rehearse: Callable[[Piece], object], setup: Setup) -> None:
    """As ``ahead``, but returns once all kernels are compiled: for stages that time, and so want an idle host."""
    for _ in ahead(pieces, rehearse, setup):
        pass


def ahead(pieces: Iterable[Piece], rehearse: Callable[[Piece], object], setup: Setup) -> Iterator[Piece]:
    """The pieces of a stage's work, each as soon as its kernels are compiled; those of the others go on meanwhile.

    What fails here is left for the real call to tell. Off a GPU nothing is compiled.

    Args:
        pieces: the most important first.
        rehearse: makes the calls that a piece will make, on tensors of the same shapes: which kernels are launched may
            hang on the number of images too.
        setup: of the stage; from its deadline on nothing is waited for.
    """
    if setup.device.type != "cuda":
        yield from pieces
        return
    start, ends = time.monotonic(), []
    jobs: dict[str, Future[bool]] = {}
    try:
        with processes() as pool:
            needed = [(piece, _begin(rehearse, piece, setup, pool, jobs)) for piece in pieces]
            for job in jobs.values():
                job.add_done_callback(lambda _: ends.append(time.monotonic()))  # at once if it has ended
            for piece, its in needed:
                wait(its, min(setup.deadline - time.monotonic(), threading.TIMEOUT_MAX))
                yield piece
    finally:
        if jobs:
            compiled = sum(not job.cancelled() and job.exception() is None and job.result() for job in jobs.values())
            seconds = max(ends, default=start) - start
            print(f"    {compiled} of {len(jobs)} kernels compiled ahead in {seconds:.0f} s", flush=True)


def launched(call: Callable[[], object]) -> list[Launch]:
    """What a call would launch. Nothing is."""
    with recording(run=False) as launches:
        call()
    return launches


def _begin(
    rehearse: Callable[[Piece], object], piece: Piece, setup: Setup, pool: Executor, jobs: dict[str, Future[bool]]
) -> list[Future[bool]]:
    """Adds to ``jobs``, by their key, those kernels of a piece that no cache has; the jobs that it needs."""
    needed = []
    if setup.expired:
        return needed
    try:
        from vitreg_kernels._triton import offline

        arch = tuned_for(setup.device)
        for launch in launched(partial(rehearse, piece)):
            kernel = offline.compilation(launch, arch)
            if kernel.key not in jobs and not kernel.cached:
                jobs[kernel.key] = pool.submit(_compile, kernel)
            if kernel.key in jobs:
                needed.append(jobs[kernel.key])
    except Exception:  # a call may raise anything, and so may the pool once a process of it has died
        pass
    return needed


def _compile(kernel: Compilation) -> bool:
    """Puts a kernel into triton's cache on disk; whether it could."""
    try:
        kernel.run()
    except Exception:  # not every exception survives the way back to the process that waits
        return False
    return True
