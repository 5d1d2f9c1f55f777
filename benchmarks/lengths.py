"""What a token too many costs on a CPU: lengths that end in CLS and register tokens, beside the next even ones.

A kernel that works in whole tiles pays for a full one where a few tokens are left over, and a lane that is idle is no
useful work. Both lengths of a pair are timed side by side, and what counts is the time of a useful operation.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypedDict

import numpy as np
import torch
from torch import Tensor

from benchmarks import results
from benchmarks.attention import Progress
from benchmarks.contest import inputs_of
from benchmarks.machine import Machine
from benchmarks.peers import Peer, attempt, sdpa, vitreg
from benchmarks.report import number
from benchmarks.results import Row, Writer
from benchmarks.shapes import DTYPES, Case, DType, Size
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.race import Stopped

GOAL = 0.06
PAIRS = ((207, 208), (261, 264), (271, 272))
_BATCH: dict[Size, int] = {"quick": 2, "full": 8}
_ROUNDS: dict[Size, int] = {"quick": 60, "full": 200}
_HEADS = 6
_CPU = torch.device("cpu")


class LengthsRow(TypedDict):
    """One contender at one pair of lengths, forward. One not raced has ``None`` for everything measured."""

    kind: Literal["lengths"]
    variant: str
    ours: bool  # a backend of vitreg_kernels
    reason: str | None  # why it was not raced, in its own words; None if it was
    failed: bool  # it is ours and broke; any other reason is a refusal
    dtype: DType
    batch: int
    heads: int
    head_dim: int
    tokens: int
    next_tokens: int
    median_ms: float | None  # of ``tokens``
    next_median_ms: float | None
    gflops: float | None  # GFLOP/s of useful work at the median of ``tokens``
    next_gflops: float | None
    excess: float | None  # median over rounds of the time of a useful operation at ``tokens`` / at ``next_tokens`` - 1
    excess_p20: float | None
    excess_p80: float | None
    rounds: int
    goal: float
    machine: Machine


results.ROW_TYPES["lengths"] = LengthsRow
_MEASURED = ("median_ms", "next_median_ms", "gflops", "next_gflops", "excess", "excess_p20", "excess_p80")


def contenders() -> list[Peer]:
    """Our own kernels, and torch's SDPA beside them."""
    ours = [peer for peer in vitreg.peers("packed", None) if peer.name in vitreg.OPAQUE]
    return [*ours, Peer("torch:sdpa", sdpa)]


def run(size: Size, writer: Writer, progress: Progress) -> Iterator[Row]:
    """Measures every pair in every dtype on the CPU and yields the rows, pair by pair, once they are written.

    Resumption and ``progress`` are as of ``attention.run``.
    """
    todo = list(itertools.product(PAIRS, DTYPES))
    for done, (pair, dtype) in enumerate(todo):
        progress(done, len(todo), f"N={pair[0]} beside {pair[1]} {dtype}")
        measured = writer.find(kind="lengths", tokens=pair[0], dtype=dtype)
        yield from measured or writer.extend(measure(pair, dtype, contenders(), _BATCH[size], _ROUNDS[size]))
    progress(len(todo), len(todo), "")


def measure(pair: tuple[int, int], dtype: DType, those: Sequence[Peer], batch: int, rounds: int) -> list[Row]:
    """One row for each contender, without its ``machine``."""
    cases = [Case(batch, _HEADS, tokens, dtype, "forward") for tokens in pair]
    copies = [timing.copies_past_cache(inputs_of(case, _CPU), _CPU) for case in cases]
    outcomes = {peer.name: _attempt(peer, [its[0] for its in copies]) for peer in those}
    raced = [peer for peer in those if outcomes[peer.name] is None]
    variants = {
        f"{peer.name} {case.tokens}": timing.Variant(_in_turn(peer, its), peer.context)
        for peer in raced
        for case, its in zip(cases, copies, strict=True)
    }
    times = timing.in_rounds(variants, None, device=_CPU, rounds=rounds)
    rows = []
    for peer in those:
        row = {
            "kind": "lengths",
            "variant": peer.name,
            "ours": peer.ours,
            "reason": None,
            "failed": False,
            "dtype": dtype,
            "batch": batch,
            "heads": _HEADS,
            "head_dim": cases[0].head_dim,
            "tokens": pair[0],
            "next_tokens": pair[1],
            **dict.fromkeys(_MEASURED),
            "rounds": rounds,
            "goal": GOAL,
        }
        stopped = outcomes[peer.name]
        if stopped is not None:
            row |= stopped._asdict()
        else:
            row |= _figures(cases, [times[f"{peer.name} {tokens}"] for tokens in pair])
        rows.append(row)
    return rows


def table(rows: Sequence[Row]) -> str:
    """The rows of lengths as text; of a contender that was not raced nothing, as the race of attention says why."""
    raced = [row for row in rows if row["kind"] == "lengths" and row["reason"] is None]
    if not raced:
        return ""
    first = raced[0]
    lines = [
        "Time of a useful operation at odd lengths over that at even ones, forward, "
        f"B = {first['batch']}, H = {first['heads']},",
        f"median of {first['rounds']} rounds and p20-p80 (goal for ours: {first['goal']:.0%} more)",
    ]
    for row in raced:
        spread = f"{row['excess_p20']:+.1%} to {row['excess_p80']:+.1%}"
        verdict = "  ABOVE THE GOAL" if row["ours"] and row["excess"] > row["goal"] else ""
        speeds = f"{number(row['gflops'])}/{number(row['next_gflops'])} GFLOP/s"
        name = f"N = {row['tokens']}/{row['next_tokens']} {row['dtype']}  {row['variant']:<15}"
        lines.append(f"  {name}{speeds:>18}{row['excess']:>+8.1%}    {spread}{verdict}")
    return "\n".join(lines)


def _attempt(peer: Peer, firsts: Sequence[tuple[Tensor, ...]]) -> Stopped | None:
    """Why it cannot be raced, if it cannot."""
    for copy in firsts:
        answer = attempt(peer, lambda attend, qkv, grad_output: attend(qkv), *copy)
        if isinstance(answer, Stopped):
            return answer
    return None


def _in_turn(peer: Peer, copies: Sequence[tuple[Tensor, ...]]) -> Callable[[None], Tensor]:
    turn = itertools.cycle(copies)

    def call(_: None) -> Tensor:
        qkv, _ = next(turn)
        return peer.attend(qkv)

    return call


def _figures(cases: Sequence[Case], times_ms: Sequence[Sequence[float]]) -> Row:
    costs = [np.divide(its, case.flops) for case, its in zip(cases, times_ms, strict=True)]
    p20, median, p80 = np.percentile(costs[0] / costs[1] - 1, (20, 50, 80)).tolist()
    medians = [np.median(its).item() for its in times_ms]
    speeds = [case.flops / ms / 1e6 for case, ms in zip(cases, medians, strict=True)]
    return {
        "median_ms": medians[0],
        "next_median_ms": medians[1],
        "gflops": speeds[0],
        "next_gflops": speeds[1],
        "excess": median,
        "excess_p20": p20,
        "excess_p80": p80,
    }
