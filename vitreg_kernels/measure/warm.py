"""Kernels compiled ahead, on every core: a call whose kernels are compiled loads them from triton's cache on disk.

The calls themselves tell which kernels they take. They are made once with every launch left out, so that nothing runs
on the GPU and what they give is garbage.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from multiprocessing import get_context
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from .._triton.launch import Launch
from .._triton.replay import recording
from ..ops._shared.capability import tuned_for

if TYPE_CHECKING:
    from .._triton.offline import Compilation


class Compiled(NamedTuple):
    """What became of the kernels that some calls launch, each counted once.

    Attributes:
        cached: triton's cache on disk had them.
        compiled: they were compiled.
        left: they failed, or the deadline came first: the real call compiles them, or tells what is wrong.
        seconds: from the first of the calls to the last kernel.
    """

    cached: int
    compiled: int
    left: int
    seconds: float


def compile_ahead(
    calls: Iterable[Callable[[], object]], device: torch.device, *, deadline: float = math.inf
) -> Compiled:
    """Compiles all that some calls would launch, and runs none of it.

    Args:
        calls: on tensors of the real shapes, the most important first: which kernels are launched may hang on the
            number of images too. What one raises is left for the real call to tell.
        device: the GPU.
        deadline: ``time.monotonic()`` from which on nothing is waited for.
    """
    with Compiler(device, deadline=deadline) as compiler:
        for jobs in [compiler.begin(call) for call in calls]:
            compiler.wait(jobs)
    return compiler.told


class Compiler:
    """As ``compile_ahead``, for who goes on with a call as soon as its own kernels are there.

    A context: what has not begun when it ends never does, and what has is given until the deadline.

    Args:
        device, deadline: as of ``compile_ahead``.

    Attributes:
        told: what became of the kernels, once the context has ended.
        keys: of the kernels, in triton's cache.
        raised: what calls raised.
        refused: why kernels or their launchers do not compile, once the context has ended.
    """

    told: Compiled

    def __init__(self, device: torch.device, *, deadline: float = math.inf) -> None:
        self.raised: list[Exception] = []
        self.refused: list[str] = []
        self._device, self._deadline = device, deadline
        self._jobs: dict[str, Future[str | None]] = {}  # by the key of the kernel
        self._cached: set[str] = set()
        self._ends: list[float] = []

    @property
    def keys(self) -> list[str]:
        return sorted(self._cached | self._jobs.keys())

    def __enter__(self) -> Compiler:
        self._start = time.monotonic()
        self._processes = processes(self._deadline)
        self._pool = self._processes.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._processes.__exit__(*error)
        ended = [job for job in self._jobs.values() if not job.cancelled()]
        reasons = [job.exception() or job.result() for job in ended]  # a process that died gives an exception
        self.refused = [str(reason) for reason in reasons if reason is not None]
        compiled = len(ended) - len(self.refused)
        seconds = max(self._ends, default=self._start) - self._start
        self.told = Compiled(len(self._cached), compiled, len(self._jobs) - compiled, seconds)

    def begin(self, call: Callable[[], object]) -> list[Future[str | None]]:
        """Has other processes compile those kernels of a call that no cache has; what ``wait`` takes."""
        needed: list[Future[str | None]] = []
        if time.monotonic() >= self._deadline:
            return needed
        try:
            from .._triton import offline

            arch = tuned_for(self._device)
            for launch in launched(call):
                kernel = offline.compilation(launch, arch)
                if kernel.key not in self._jobs:
                    if kernel.key in self._cached or kernel.cached:
                        self._cached.add(kernel.key)
                        continue
                    self._jobs[kernel.key] = job = self._pool.submit(_compile, kernel)
                    job.add_done_callback(lambda _: self._ends.append(time.monotonic()))
                needed.append(self._jobs[kernel.key])
        except Exception as error:  # a call may raise anything, and so may the pool once a process of it has died
            self.raised.append(error)
        return needed

    def wait(self, jobs: Iterable[Future[str | None]]) -> None:
        """Until they have ended, or the deadline has come."""
        wait(list(jobs), _until(self._deadline))


@contextmanager
def processes(deadline: float = math.inf) -> Iterator[Executor]:
    """As many processes as there are cores, to compile in.

    A job that has not begun when the block ends never does; one that has is waited for until the deadline, of
    ``time.monotonic()``, and then ended.
    """
    # Not forked: CUDA does not survive that. They start with the first jobs. Ctrl-C is for the process that waits.
    pool = _Pool(cores(), get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    finally:
        pool.end(deadline)


class _Pool(ProcessPoolExecutor):
    """Its processes do not run the caller's script again, as a spawned one does: few scripts are made for that."""

    def end(self, deadline: float) -> None:
        """Shuts it down by a deadline, with what has not ended by then."""
        started = list(self._processes.values())
        self.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.join(_until(deadline))
            process.kill()

    def submit(self, *job: Any) -> Future[Any]:
        main = sys.modules["__main__"]
        sys.modules["__main__"] = ModuleType("__main__")  # without a file or a spec there is nothing to run
        try:
            return super().submit(*job)
        finally:
            sys.modules["__main__"] = main


def _until(deadline: float) -> float | None:
    """Seconds that may be waited; ``None`` without a deadline."""
    return None if math.isinf(deadline) else max(0.0, deadline - time.monotonic())


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def launched(call: Callable[[], object]) -> list[Launch]:
    """What a call would launch. Nothing is."""
    with recording(run=False) as launches:
        call()
    return launches


def _compile(kernel: Compilation) -> str | None:
    """Puts a kernel and its launcher into triton's cache on disk; why it could not."""
    try:
        compiled = kernel.run()
        _build_launcher(compiled)
    except Exception as error:  # not every exception survives the way back to the process that waits
        return f"{type(error).__name__}: {error}"
    return None


def _build_launcher(compiled: object) -> None:
    """What triton up to 3.6 compiles in C for each signature, at the first launch; later ones have one for all."""
    from triton.backends.nvidia import driver

    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(compiled.src, compiled.metadata)
