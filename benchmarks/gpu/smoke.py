"""A training step's attention in bf16, of few and of many heads, against fp64; then under NVIDIA's memory checker."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Literal, TypedDict

import torch

from benchmarks import results
from benchmarks.contest import check_of, inputs_of, job
from benchmarks.gpu import memcheck, pieces, warm
from benchmarks.gpu.accuracy import off
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.machine import Machine
from benchmarks.peers import Peer, attempt, vitreg
from benchmarks.results import Errors, Row, Writer
from benchmarks.shapes import Case, DType
from vitreg_kernels.measure.race import Stopped

NAME = "smoke"
SECONDS = 50.0
LONGEST = 60.0

_TOKENS = (54, 261, 1029)  # each takes other kernels
_SHAPES = ((1, 2), (64, 16))  # (batch, heads): kernels may choose their programs by the number


class SmokeRow(TypedDict):
    """One of our own backends in one case: the errors of the first and the last image."""

    kind: Literal["smoke"]
    backend: str
    dtype: DType
    batch: int
    heads: int
    tokens: int
    head_dim: int
    reason: str | None  # why there are no errors, in its own words
    failed: bool  # it broke; any other reason is a refusal
    seconds: float
    errors: dict[str, Errors] | None
    machine: Machine


results.ROW_TYPES["smoke"] = SmokeRow


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """The cases that ``writer`` has no rows of, then the memory checker."""
    todo = [case for case in _cases(setup) if not _done(writer, case)]
    warm.up(todo, partial(rehearse, device=setup.device), setup)
    for case in todo:
        if setup.expired:
            return
        print(f"    {_named(case)}", flush=True)
        with pieces.begun(setup, writer, NAME, _named(case)):
            rows = writer.extend(_judged(case, setup))
            for sentence in failures(rows):
                print(f"      FAIL {sentence}", flush=True)
            yield from rows
    if not _checked(writer) and not setup.expired:
        print("    memory checker", end="", flush=True)
        with pieces.begun(setup, writer, NAME, memcheck.NAME):
            rows = writer.extend([memcheck.check(setup.device)])
            print(f": {memcheck.told(rows[0])}", flush=True)
            yield from rows


def rehearsals(setup: Setup) -> Iterator[Rehearsal]:
    """The calls of our own kernels."""
    return (partial(rehearse, case, setup.device) for case in _cases(setup))


def failures(rows: list[Row]) -> list[str]:
    """Backends that broke or are wrong, and what the memory checker found."""
    sentences = []
    for row in rows:
        if row["kind"] == memcheck.NAME and row["failed"]:
            sentences.append(f"memory checker: {memcheck.told(row)}")
        if row["kind"] != NAME:
            continue
        named = f"{row['backend']} at N = {row['tokens']}, {row['batch'] * row['heads']} heads in {row['dtype']}"
        if row["failed"]:
            sentences.append(f"{named}: {' '.join(row['reason'].split())}")
        sentences += [f"{named}: {off(name, e)}" for name, e in (row["errors"] or {}).items() if not e["passed"]]
    return sentences


def against(backend: str, tokens: int, *, backward: bool, setup: Setup, writer: Writer) -> str | None:
    """Why a backend of ours is not to be timed at a length: where it takes the same kernels it was wrong, or broke."""
    cases = _cases(setup)
    lengths = sorted({case.tokens for case in cases})
    judged = next((length for length in lengths if length >= tokens), lengths[-1])
    of_it = writer.find(kind=NAME, backend=backend, tokens=judged)
    hung = any(pieces.broken(writer, NAME, _named(case)) for case in cases if case.tokens == judged)
    wrong = {name for row in of_it for name, error in (row["errors"] or {}).items() if not error["passed"]}
    if hung or any(row["failed"] for row in of_it) or (wrong if backward else "output" in wrong):
        return f"is wrong or broke at N = {judged} in the smoke test"
    return None


def unfinished(setup: Setup, writer: Writer) -> int:
    """Cases without rows, and the memory checker."""
    return sum(not _done(writer, case) for case in _cases(setup)) + (not _checked(writer))


def rehearse(case: Case, device: torch.device) -> None:
    """The calls of our own kernels."""
    copy = inputs_of(case, device)()
    for peer in _ours():
        attempt(peer, job, *copy)


def _ours() -> list[Peer]:
    return [peer for peer in vitreg.peers("packed", None) if peer.name in vitreg.OPAQUE and peer.name != "vitreg:cpu"]


def _cases(setup: Setup) -> list[Case]:
    if setup.dry:  # in fp32, because Triton's interpreter computes garbage in bf16
        return [Case(2, 1, 22, "fp32", "forward+backward", 16)]
    return [Case(*shape, tokens, "bf16", "forward+backward") for tokens, shape in product(_TOKENS, _SHAPES)]


def _judged(case: Case, setup: Setup) -> Iterator[Row]:
    copy = inputs_of(case, setup.device)()
    check = check_of(case, copy)
    for peer in _ours():
        start = time.monotonic()
        outcome = attempt(peer, check, *copy)
        stopped = isinstance(outcome, Stopped)
        yield {
            "kind": NAME,
            "backend": peer.name.removeprefix("vitreg:"),
            "dtype": case.dtype,
            "batch": case.batch,
            "heads": case.heads,
            "tokens": case.tokens,
            "head_dim": case.head_dim,
            "reason": outcome.reason if stopped else None,
            "failed": stopped and outcome.failed,
            "seconds": time.monotonic() - start,
            "errors": None if stopped else outcome,
        }


def _done(writer: Writer, case: Case) -> bool:
    its = writer.find(kind=NAME, tokens=case.tokens, batch=case.batch, heads=case.heads)
    return bool(its) or pieces.broken(writer, NAME, _named(case))


def _checked(writer: Writer) -> bool:
    return bool(writer.find(kind=memcheck.NAME)) or pieces.broken(writer, NAME, memcheck.NAME)


def _named(case: Case) -> str:
    return f"N={case.tokens}, {case.batch * case.heads} heads, {case.dtype}"
