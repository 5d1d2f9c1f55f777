"""Residual norms, token norms and assembly: every backend against fp64 in poisoned memory, then the race of norms."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Literal, NamedTuple, TypedDict

import torch

from benchmarks import norms, results
from benchmarks.gpu import accuracy, on_gpus, pieces, warm
from benchmarks.gpu.calls import OPS, calls
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.machine import Machine
from benchmarks.norms import Case
from benchmarks.peers import attempt
from benchmarks.peers import norms as contenders
from benchmarks.results import Errors, Row, Writer
from vitreg_kernels.dispatch import Backend
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.oracle import Call, Oracle
from vitreg_kernels.measure.poison import guarded, poisoned
from vitreg_kernels.measure.race import Stopped, attempted, lost
from vitreg_kernels.ops import catalogue

NAME = "norms"
SECONDS = 50.0
LONGEST = 30.0

_BUDGET_S = 0.3  # of timing a case
# ViT-L's first, the only width at which torch.compile is raced: it takes 5 to 10 s for each case, all else in one about
# a second. So the 12 races take about 35 s, and the checks, whose kernels are compiled, about 10 s.
_CHANNELS = (1024, *(channels for channels in norms.CHANNELS if channels != 1024))
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_DRY_DTYPES = ("fp16", "fp32")  # Triton's interpreter computes garbage in bf16


class NormAccuracyRow(TypedDict):
    """One call on one backend of an op."""

    kind: Literal["norm_accuracy"]
    backend: str  # with its op: "residual_norm:triton"
    case: str
    dtype: Literal["bf16", "fp16", "fp32"]
    reasons: list[str]  # why the backend does not serve the call; empty if it does
    crash: str | None  # what it raised although it says that it serves the call
    deterministic: bool | None  # two runs gave the same bits; None if it did not run
    seconds: float  # with compilation
    errors: dict[str, Errors] | None
    machine: Machine


results.ROW_TYPES["norm_accuracy"] = NormAccuracyRow


class _Check(NamedTuple):
    call: Call
    dtype: str

    def __str__(self) -> str:
        return f"{self.call.request.op} of {self.call.name} in {self.dtype}"


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """The checks that ``writer`` has no rows of, then the races."""
    undone = [check for check in _checks(setup) if _missing(setup, writer, check)]
    for number, check in enumerate(warm.ahead(undone, rehearse_check, setup), 1):
        if setup.expired:
            return
        print(f"    {number}/{len(undone)} {check}", flush=True)
        with pieces.begun(setup, writer, NAME, check):
            rows = writer.extend(_judged(check, _missing(setup, writer, check), setup.device))
            for row in rows:
                for sentence in accuracy.wrong(row, _opaque()):
                    print(f"      FAIL {sentence}", flush=True)
            yield from rows

    todo = [case for case in _cases(setup) if not _raced(writer, case)]
    warm.up(todo, partial(rehearse_race, device=setup.device), setup)
    for number, case in enumerate(todo, 1):
        if setup.expired:
            return
        print(f"    {number}/{len(todo)} {case}", end="", flush=True)
        with pieces.begun(setup, writer, NAME, case):
            rows = writer.extend(_race(case, setup))
            print(_summary(rows), flush=True)
            yield from rows


def rehearsals(setup: Setup) -> Iterator[Rehearsal]:
    """The calls of our own kernels."""
    yield from (partial(rehearse_race, case, setup.device) for case in _cases(setup))
    yield from (partial(rehearse_check, check) for check in _checks(setup))


def failures(rows: list[Row]) -> list[str]:
    """What the checks found wrong, and backends of ours that broke or were wrong in the race."""
    sentences = accuracy.all_wrong([row for row in rows if row["kind"] == "norm_accuracy"], _opaque())
    for row in rows:
        if row["kind"] != "residual_norm" or not row["ours"]:
            continue
        named = f"{row['variant']}, {row['norm']} of C = {row['channels']} in {row['dtype']}, {row['mode']}"
        if row["failed"]:
            sentences.append(f"{named}: {' '.join(row['reason'].split())}")
        wrong = {tensor: error for tensor, error in (row["errors"] or {}).items() if not error["passed"]}
        sentences += [f"{named}: {accuracy.off(tensor, error)}" for tensor, error in wrong.items()]
    return sentences


def unfinished(setup: Setup, writer: Writer) -> int:
    """Calls that lack a backend's row, and races without rows."""
    checks = sum(bool(_missing(setup, writer, check)) for check in _checks(setup))
    return checks + sum(not _raced(writer, case) for case in _cases(setup))


def rehearse_check(check: _Check) -> None:
    """The calls of our own kernels."""
    call = check.call.changed(guarded)
    for backend in _backends(call.request.op):
        if backend.opaque:
            attempted(partial(call.run, backend.name), ours=True)


def rehearse_race(case: Case, device: torch.device) -> None:
    """The calls of our own kernels."""
    copy = norms.inputs_of(case, device)()
    for peer in contenders.peers(rms=case.rms):
        if peer.name in contenders.OPAQUE:
            attempt(peer, norms.job, *copy)


def _opaque() -> set[str]:
    return {f"{op.name}:{backend.name}" for op in OPS for backend in on_gpus(op.backends) if backend.opaque}


def _backends(op: str) -> tuple[Backend, ...]:
    return on_gpus(catalogue.OPS[op].backends)


def _checks(setup: Setup) -> list[_Check]:
    return [
        _Check(call, dtype)
        for dtype in (_DRY_DTYPES if setup.dry else _DTYPES)
        for call in calls(_DTYPES[dtype], setup.device, dry=setup.dry)
    ]


def _missing(setup: Setup, writer: Writer, check: _Check) -> list[str]:
    """Backends without a row; the reference is what the others are held against. None of a check that broke."""
    if pieces.broken(writer, NAME, check):
        return []
    op = check.call.request.op
    judged = {row["backend"] for row in writer.find(kind="norm_accuracy", case=check.call.name, dtype=check.dtype)}
    those = [b.name for b in _backends(op) if setup.device.type in b.requirements.devices and b.name != "reference"]
    return [name for name in those if f"{op}:{name}" not in judged]


def _judged(check: _Check, backends: list[str], device: torch.device) -> Iterator[Row]:
    """Rows without their ``machine``; none after one whose crash took the GPU along."""
    call = check.call.changed(guarded)
    oracle = Oracle(call)
    for backend in backends:
        start = time.monotonic()
        with poisoned(device):
            outcome = attempted(partial(_twice, oracle, backend), ours=True)
        stopped = isinstance(outcome, Stopped)
        errors, deterministic = (None, None) if stopped else outcome
        yield {
            "kind": "norm_accuracy",
            "backend": f"{call.request.op}:{backend}",
            "case": call.name,
            "dtype": check.dtype,
            "reasons": [outcome.reason] if stopped and not outcome.failed else [],
            "crash": outcome.reason if stopped and outcome.failed else None,
            "deterministic": deterministic,
            "seconds": time.monotonic() - start,
            "errors": errors,
        }
        if stopped and lost(device):
            return


def _twice(oracle: Oracle, backend: str) -> tuple[dict[str, Errors], bool]:
    """Errors of a backend, and whether a second run gave the same bits."""
    first, second = oracle.run(backend), oracle.run(backend)
    errors = {name: results.errors(found) for name, found in oracle.compare(first).items()}
    return errors, all(accuracy.same_bits(first[name], second[name]) for name in first)


def _cases(setup: Setup) -> list[Case]:
    """LayerNorm of every width, then RMSNorm, which is there for xformers and has no backward there."""
    if setup.dry:
        return [Case(48, "fp32", mode, batch=3, tokens=9) for mode in norms.MODES]
    layer_norms = [Case(channels, "bf16", mode) for channels in _CHANNELS for mode in norms.MODES]
    return [*layer_norms, *(Case(channels, "bf16", "forward", rms=True) for channels in _CHANNELS)]


def _raced(writer: Writer, case: Case) -> bool:
    return bool(norms.rows_of(writer, case)) or pieces.broken(writer, NAME, case)


def _race(case: Case, setup: Setup) -> list[Row]:
    make = norms.inputs_of(case, setup.device)
    copies = [make(), make()] if setup.dry else timing.copies_past_cache(make, setup.device)
    those = contenders.peers(rms=case.rms)
    if case.channels != _CHANNELS[0]:
        reason = f"compiles anew for every shape, and is raced at C = {_CHANNELS[0]} alone"
        those = [p.unless(lambda *_: reason) if p.name == "torch:compile" else p for p in those]
    return norms.race(case, those, copies, 0.0 if setup.dry else _BUDGET_S)


def _summary(rows: list[Row]) -> str:
    """Behind the case's name: the fastest of ours and of the peers."""
    fastest = []
    for ours in (True, False):
        raced = [row for row in rows if row["ours"] is ours and row["reason"] is None]
        if raced:
            best = min(raced, key=lambda row: row["median_ms"])
            fastest.append(f"{best['variant']} {best['gbps']:.0f} GB/s")
    return ": " + (", ".join(fastest) or "nobody could be raced")
