"""What each output of the attention costs when it is asked for: forward in bf16, over the same call without any."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from benchmarks import results
from benchmarks.contest import inputs_of
from benchmarks.gpu import BACKENDS, pieces, smoke, warm
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.machine import Machine
from benchmarks.results import Row, Writer
from benchmarks.shapes import Case, DType
from vitreg_kernels import functional
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.race import Stopped, attempted
from vitreg_kernels.ops.attention.types import OUTPUT_NAMES

NAME = "outputs"
SECONDS = 20.0
LONGEST = 25.0

_BUDGET_S = 3.0  # of timing a length, shared by 16 calls
_TOKENS = (261, 201, 1029)  # the most important first
_FOUR = ("lse", "max_logit", "token_norms", "prefix_attention")
_ASKED: tuple[tuple[str, ...], ...] = ((), *((name,) for name in OUTPUT_NAMES), _FOUR, OUTPUT_NAMES)
_KERNELS = tuple(backend.name for backend in BACKENDS if backend.opaque)  # our own
# Of our kernels, times the call without any: what goes without a second pass over the keys may cost, and with one.
_GOALS = {_FOUR: 1.05, ("received_attention",): 1.35, OUTPUT_NAMES: 1.35}


class OutputsRow(results.HostTime):
    """One backend asked for some outputs. One that could not be timed has ``None`` for everything measured."""

    kind: Literal["outputs"]
    backend: str
    outputs: list[str]
    reason: str | None  # why it was not timed, in its own words; None if it was
    failed: bool  # it broke; any other reason is a refusal
    dtype: DType
    batch: int
    heads: int
    tokens: int
    prefix_tokens: int
    head_dim: int
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    samples: int | None
    ratio: float | None  # over the same backend's median without outputs
    goal: float | None  # what the ratio should be at most; None where there is no goal
    machine: Machine


results.ROW_TYPES["outputs"] = OutputsRow


class _Call(NamedTuple):
    backend: str
    outputs: tuple[str, ...]

    def __call__(self, case: Case, copy: tuple[Tensor, ...]) -> object:
        return functional.register_attention_qkv(
            copy[0], num_prefix_tokens=case.prefix_tokens, outputs=self.outputs, backend=self.backend
        )


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """The lengths that ``writer`` has no rows of, all calls of one interleaved."""
    cases = _cases(setup)
    warm.up([case for case in cases if not _done(writer, case)], partial(rehearse, device=setup.device), setup)
    for number, case in enumerate(cases, 1):
        if _done(writer, case):
            continue
        if setup.expired:
            return
        print(f"    {number}/{len(cases)} {case}", end="", flush=True)
        with pieces.begun(setup, writer, NAME, case):
            rows = writer.extend(cost(case, setup, writer))
            print(_summary(rows), flush=True)
            yield from rows


def rehearsals(setup: Setup) -> Iterator[Rehearsal]:
    """The calls of our own kernels."""
    return (partial(rehearse, case, setup.device) for case in _cases(setup))


def failures(rows: list[Row]) -> list[str]:
    """Calls that broke. What they give is judged by the accuracy stage, and a goal that is missed is no failure."""
    return [
        f"{row['backend']} with outputs={tuple(row['outputs'])} at N = {row['tokens']} in {row['dtype']}: "
        f"{' '.join(row['reason'].split())}"
        for row in rows
        if row["kind"] == "outputs" and row["failed"]
    ]


def unfinished(setup: Setup, writer: Writer) -> int:
    """Lengths without rows."""
    return sum(not _done(writer, case) for case in _cases(setup))


def cost(case: Case, setup: Setup, writer: Writer) -> list[Row]:
    """One row for each backend and set of outputs, without its ``machine``."""
    make = inputs_of(case, setup.device)
    copies = [make(), make()] if setup.dry else timing.copies_past_cache(make, setup.device)
    calls = [_Call(backend, outputs) for backend, outputs in product((*_KERNELS, "sdpa"), _ASKED)]
    wrong = {b: smoke.against(b, case.tokens, backward=False, setup=setup, writer=writer) for b in _KERNELS}
    stopped = {call: Stopped(reason, failed=False) for call in calls if (reason := wrong.get(call.backend))}
    left = [call for call in calls if call not in stopped]
    stopped |= {call: stop for call in left if (stop := _stop(call, case, copies[0])) is not None}
    timings = timing.interleave(
        {call: timing.Variant(partial(call, case)) for call in calls if call not in stopped},
        copies,
        device=setup.device,
        budget_s=0.0 if setup.dry else _BUDGET_S,
    )
    return [_row(case, call, stopped.get(call), timings) for call in calls]


def rehearse(case: Case, device: torch.device) -> None:
    """The calls of our own kernels."""
    copy = inputs_of(case, device)()
    for backend, outputs in product(_KERNELS, _ASKED):
        _stop(_Call(backend, outputs), case, copy)


def _stop(call: _Call, case: Case, copy: tuple[Tensor, ...]) -> Stopped | None:
    """What stops a call, if anything does."""

    def answer() -> None:
        call(case, copy)
        if copy[0].is_cuda:
            torch.cuda.synchronize()  # a kernel's own errors come late

    return attempted(answer, ours=True)


def _row(case: Case, call: _Call, stopped: Stopped | None, timings: dict[_Call, timing.Timing]) -> Row:
    timed, without = timings.get(call), timings.get(call._replace(outputs=()))
    return {
        "kind": "outputs",
        "backend": call.backend,
        "outputs": list(call.outputs),
        "reason": stopped and stopped.reason,
        "failed": stopped is not None and stopped.failed,
        "dtype": case.dtype,
        "batch": case.batch,
        "heads": case.heads,
        "tokens": case.tokens,
        "prefix_tokens": case.prefix_tokens,
        "head_dim": case.head_dim,
        **(results.UNTIMED if timed is None else results.timed(timed)),
        "ratio": timed and without and timed.median_ms / without.median_ms,
        "goal": _GOALS.get(call.outputs) if call.backend in _KERNELS else None,
    }


def _cases(setup: Setup) -> list[Case]:
    if setup.dry:
        return [Case(2, 1, 22, "fp32", "forward", 16)]
    return [Case(64, 16, tokens, "bf16", "forward") for tokens in _TOKENS]


def _done(writer: Writer, case: Case) -> bool:
    its = writer.find(kind="outputs", dtype=case.dtype, tokens=case.tokens)
    return bool(its) or pieces.broken(writer, NAME, case)


def _summary(rows: list[Row]) -> str:
    """Behind the case's name: what all outputs cost by backend."""
    costs = {row["backend"]: row["ratio"] for row in rows if row["outputs"] == list(OUTPUT_NAMES)}
    known = [f"{backend} takes {ratio:.3g} times as long with all five" for backend, ratio in costs.items() if ratio]
    return ": " + (", ".join(known) or "nobody could be timed")
