"""Every backend and every peer on the shapes of ViTs in bf16, interleaved: the time of a head beside the roofline."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Literal, get_args

import torch

from benchmarks import results, roofline
from benchmarks.contest import contest, inputs_of, job, runs_of
from benchmarks.gpu import pieces, smoke, warm
from benchmarks.gpu.accuracy import off
from benchmarks.gpu.stage import Rehearsal, Setup
from benchmarks.machine import Machine
from benchmarks.peers import Pack, Peer, attempt, everyone, pack_of, vitreg
from benchmarks.results import Errors, Row, Writer
from benchmarks.roofline import Roofline
from benchmarks.shapes import HEAD_DIM, Case, DType, Layout, Mode
from vitreg_kernels.measure import timing

NAME = "race"
SECONDS = 110.0
LONGEST = 25.0

FLEX = "torch:flex"
_BUDGET_S = 0.8  # of timing a case
_UNIFORM: tuple[Layout, ...] = ("packed", "separate")
# (batch, heads) by tokens, the most important first: 1024 heads fill a GPU, and of 54 tokens 4096.
_SHAPES = {261: (64, 16), 201: (64, 16), 1029: (64, 16), 1374: (64, 16), 54: (256, 16)}
_WIDE = {261: (128, 8), 201: (128, 8), 1029: (128, 8)}  # of head dim 128
_CROPS = ((2, 261), (8, 54))  # a sample of DINOv2's training
_SAMPLES = (64, 16)  # and heads


class RaceRow(results.HostTime):
    """One contender in one case. One not raced has ``None`` for everything measured.

    In the multi-crop layout ``batch`` counts samples of several images, and ``tokens`` are those of a sample.
    """

    kind: Literal["race"]
    variant: str
    ours: bool  # a backend of vitreg_kernels; the others are its peers
    default: bool  # what backend=None takes
    reason: str | None  # why it was not raced, in its own words; None if it was
    failed: bool  # it is ours and broke; any other reason is a refusal
    layout: Layout
    mode: Mode
    dtype: DType
    batch: int
    heads: int
    tokens: int
    prefix_tokens: int
    head_dim: int
    flops: int  # useful work
    bytes: int  # useful traffic
    median_ms: float | None
    p20_ms: float | None
    p80_ms: float | None
    samples: int | None
    ns_per_head: float | None  # at the median, of a (batch, head)
    tflops: float | None  # TFLOP/s at the median
    gbps: float | None  # GB/s at the median
    roofline_ns: float | None  # of a (batch, head) at the run's highest ceilings by then; None without any
    roofline_fraction: float | None  # roofline_ns / ns_per_head
    best_peer: str | None  # the fastest peer of the case
    speedup: float | None  # best peer's median / this median: above 1 is faster than every peer
    errors: dict[str, Errors] | None  # of "output"; with a backward also "grad_query", "grad_key", "grad_value"
    machine: Machine


results.ROW_TYPES["race"] = RaceRow


def run(setup: Setup, writer: Writer) -> Iterator[Row]:
    """The cases that ``writer`` has no rows of, the most important first."""
    cases = _cases(setup)
    warm.up([case for case in cases if not _done(writer, case)], partial(rehearse, device=setup.device), setup)
    for number, case in enumerate(cases, 1):
        if _done(writer, case):
            continue
        if setup.expired:
            return
        print(f"    {number}/{len(cases)} {case}", end="", flush=True)
        with pieces.begun(setup, writer, NAME, case):
            those = [_unless_wrong(peer, case, setup, writer) for peer in _contenders(case, setup)]
            rows = writer.extend(race(case, those, setup, roofline.highest(writer.rows)))
            print(_summary(rows), flush=True)
            yield from rows
        if setup.device.type == "cuda":
            torch.cuda.empty_cache()  # a contender that holds N x N leaves blocks of no use to the next case


def rehearsals(setup: Setup) -> Iterator[Rehearsal]:
    """The calls of our own kernels."""
    return (partial(rehearse, case, device=setup.device) for case in _cases(setup))


def failures(rows: list[Row]) -> list[str]:
    """Backends of ours that broke, and their results that break the accuracy rule."""
    sentences = []
    for row in rows:
        if row["kind"] != "race" or not row["ours"]:
            continue
        named = (
            f"{row['variant']} at N = {row['tokens']}, D = {row['head_dim']} in {row['dtype']}, "
            f"{row['layout']}, {row['mode']}"
        )
        if row["failed"]:
            sentences.append(f"{named}: {' '.join(row['reason'].split())}")
        sentences += [
            f"{named}: {off(tensor, error)}" for tensor, error in (row["errors"] or {}).items() if not error["passed"]
        ]
    return sentences


def unfinished(setup: Setup, writer: Writer) -> int:
    """Cases without rows."""
    return sum(not _done(writer, case) for case in _cases(setup))


def race(case: Case, contenders: list[Peer], setup: Setup, ceilings: Roofline | None) -> list[Row]:
    """One row for each contender, raced or not, without its ``machine``."""
    device = setup.device
    pack = _pack(case, device)
    make = inputs_of(case, device)
    # In a rehearsal there is nothing to time, and a CPU's cache would take thousands of copies of so small an input.
    copies = [make(), make()] if setup.dry else timing.copies_past_cache(make, device)
    default = vitreg.default(pack, *copies[0][:-1])
    heads = case.batch * case.heads
    roofline_ns = None
    if ceilings is not None:
        roofline_ns = max(case.bytes / ceilings.copy_gbps, case.flops / ceilings.peak_gflops(case.dtype)) / heads
    rows = []
    for row in contest(case, contenders, copies, 0.0 if setup.dry else _BUDGET_S):
        median_ms = row["median_ms"]
        ns_per_head = None if median_ms is None else 1e6 * median_ms / heads
        rows.append(
            {
                "kind": "race",
                **row,
                "default": row["variant"] == default,
                "layout": case.layout,
                "ns_per_head": ns_per_head,
                "tflops": None if median_ms is None else case.flops / median_ms / 1e9,
                "roofline_ns": roofline_ns,
                "roofline_fraction": None if None in (roofline_ns, ns_per_head) else roofline_ns / ns_per_head,
            }
        )
    return rows


def rehearse(case: Case, device: torch.device) -> None:
    """The calls of our own kernels."""
    copy = inputs_of(case, device)()
    for peer in vitreg.peers(case.layout, _pack(case, device)):
        if peer.name in vitreg.OPAQUE:
            attempt(peer, job, *copy)


def _pack(case: Case, device: torch.device) -> Pack | None:
    return pack_of(runs_of(case), device) if case.crops else None


def _cases(setup: Setup) -> list[Case]:
    if setup.dry:  # in fp32, because Triton's interpreter computes garbage in bf16
        return [*_uniform({22: (2, 1)}, "fp32", 16), *_multicrop((2, 1), ((2, 22), (2, 9)), "fp32", 16)]
    narrow, wide = _uniform(_SHAPES, "bf16", HEAD_DIM), _uniform(_WIDE, "bf16", 128)
    return [*narrow, *_multicrop(_SAMPLES, _CROPS, "bf16", HEAD_DIM), *wide]


def _uniform(shapes: dict[int, tuple[int, int]], dtype: DType, head_dim: int) -> list[Case]:
    """Each length of these (batch, heads), packed and separate, in every mode."""
    return [
        Case(*shape, tokens, dtype, mode, head_dim, layout=layout)
        for (tokens, shape), layout, mode in product(shapes.items(), _UNIFORM, get_args(Mode))
    ]


def _multicrop(shape: tuple[int, int], crops: tuple[tuple[int, int], ...], dtype: DType, head_dim: int) -> list[Case]:
    """These crops of (samples, heads), in every mode."""
    tokens = sum(images * length for images, length in crops)
    return [Case(*shape, tokens, dtype, mode, head_dim, layout="multicrop", crops=crops) for mode in get_args(Mode)]


def rows_of(writer: Writer, case: Case) -> list[Row]:
    """Of the case, whichever stage raced it."""
    fields = ("layout", "mode", "dtype", "batch", "heads", "tokens", "head_dim")
    return writer.find(kind="race", **{field: getattr(case, field) for field in fields})


def _done(writer: Writer, case: Case) -> bool:
    its = [row for row in rows_of(writer, case) if row["variant"] != FLEX]
    return bool(its) or pieces.broken(writer, NAME, case)


def _contenders(case: Case, setup: Setup) -> list[Peer]:
    """All but FlexAttention, which a later stage races: it is compiled anew for every shape."""
    return [peer for peer in everyone(case.layout, _pack(case, setup.device)) if peer.name != FLEX]


def _unless_wrong(peer: Peer, case: Case, setup: Setup, writer: Writer) -> Peer:
    """A kernel of ours that the smoke test found wrong has a reason in the place of times."""
    if peer.name not in vitreg.OPAQUE:
        return peer
    backend, backward = peer.name.removeprefix("vitreg:"), case.mode != "forward"
    lengths = [tokens for _, tokens in case.crops] or [case.tokens]
    found = (smoke.against(backend, tokens, backward=backward, setup=setup, writer=writer) for tokens in lengths)
    reason = next(filter(None, found), None)
    return peer.unless(lambda *_: reason)


def _summary(rows: list[Row]) -> str:
    """Behind the case's name: the fastest of ours and of the peers."""
    fastest = []
    for ours in (True, False):
        raced = [row for row in rows if row["ours"] is ours and row["reason"] is None]
        if raced:
            best = min(raced, key=lambda row: row["median_ms"])
            fastest.append(f"{best['variant']} {best['ns_per_head']:.4g} ns a head")
    return ": " + (", ".join(fastest) or "nobody could be raced")
