"""The pieces of a stage's work, each once its kernels are compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TypeVar

from benchmarks.gpu.stage import Setup
from vitreg_kernels.measure.warm import Compiled, Compiler

Piece = TypeVar("Piece")


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
    compiler = Compiler(setup.device, deadline=setup.deadline)
    try:
        with compiler:
            for piece, jobs in [(piece, compiler.begin(partial(rehearse, piece))) for piece in pieces]:
                compiler.wait(jobs)
                yield piece
    finally:
        _tell(compiler.told)


def _tell(told: Compiled) -> None:
    cached, compiled, left, seconds = told
    if cached + compiled + left:
        tried = (
            f"; {compiled} of the {compiled + left} others compiled ahead in {seconds:.0f} s" if compiled + left else ""
        )
        print(f"    {cached} of {cached + compiled + left} kernels were in triton's cache{tried}", flush=True)
