"""The attention race: every contender on every ViT shape, interleaved, with its errors against fp64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from benchmarks import machine, roofline
from benchmarks.contest import contest, inputs_of
from benchmarks.peers import Peer, peers
from benchmarks.results import Row, Writer
from benchmarks.roofline import Roofline
from benchmarks.shapes import Case, Size, cases
from vitreg_kernels.measure import timing

Progress = Callable[[int, int, str], None]

# Seconds of timing a case, shared by its contenders; their warm-up, their errors and the few samples that a slow one
# takes beyond its share come on top.
_BUDGET_S: dict[Size, float] = {"quick": 1.0, "full": 15.0}


def run(size: Size, writer: Writer, progress: Progress, device: torch.device | None = None) -> Iterator[Row]:
    """Races every contender over the cases of ``size`` and yields the rows, case by case, once they are written.

    The ceilings are measured again before each length and number of threads, as the machine's clock may rise or a
    neighbour fall quiet, and the highest for that number that ``writer`` holds counts. The rows of cases that
    ``writer`` already has (from a cut run) are yielded as they stand. ``progress(done, total, label)`` is called before
    each case, and at the end with ``done == total``.
    """
    device = device or machine.default_device()
    todo = list(cases(size, device))
    measured_at = None
    for done, case in enumerate(todo):
        progress(done, len(todo), str(case))
        fields = ("dtype", "mode", "tokens", "threads")
        raced = writer.find(kind="attention", **{field: getattr(case, field) for field in fields})
        if raced:
            yield from raced
            continue
        with machine.threads(case.threads):
            if (case.tokens, case.threads) != measured_at:
                measured_at = case.tokens, case.threads
                writer.extend([{"kind": "roofline", **roofline.measure(device)._asdict()}])
            ceilings = roofline.highest(writer.rows, case.threads)
            rows = writer.extend(race(case, peers(size), ceilings, device, _BUDGET_S[size]))
        yield from rows
    progress(len(todo), len(todo), "")


def race(
    case: Case, contenders: Sequence[Peer], ceilings: Roofline, device: torch.device, budget_s: float
) -> list[Row]:
    """One row for each contender, raced or not, without its ``machine``."""
    copies = timing.copies_past_cache(inputs_of(case, device), device)
    peak_gflops, peak_source = ceilings.peak_gflops(case.dtype), ceilings.peak_source(case.dtype)
    rows = []
    for row in contest(case, contenders, copies, budget_s):
        gflops = None if row["median_ms"] is None else case.flops / row["median_ms"] / 1e6
        rows.append(
            {
                "kind": "attention",
                **row,
                "threads": case.threads,
                "peak_gflops": peak_gflops,
                "peak_source": peak_source,
                "peak_gbps": ceilings.copy_gbps,
                "gflops": gflops,
                "peak_fraction": None if gflops is None else gflops / peak_gflops,
            }
        )
    return rows
