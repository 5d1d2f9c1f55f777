"""pytest-benchmark entry point: one contender after another, for following them over time on one machine.

``python -m benchmarks`` interleaves the contenders and is what compares them with each other. Run with::

    pytest benchmarks/bench_attention.py -o python_files='bench_*.py' --benchmark-autosave --benchmark-compare
"""

from __future__ import annotations

import itertools

import pytest
import torch

from benchmarks import machine
from benchmarks.contest import inputs_of, job
from benchmarks.peers import Peer, attempt, peers
from benchmarks.shapes import Case, cases
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.race import Stopped

DEVICE = machine.default_device()


@pytest.mark.parametrize("peer", peers("quick"), ids=lambda peer: peer.name)
@pytest.mark.parametrize("case", list(cases("quick", DEVICE)), ids=str)
def test_attention(case: Case, peer: Peer, benchmark) -> None:
    copies = timing.copies_past_cache(inputs_of(case, DEVICE), DEVICE)
    result = attempt(peer, job, *copies[0])
    if isinstance(result, Stopped):
        (pytest.fail if result.failed else pytest.skip)(result.reason)
    turn = itertools.cycle(copies)

    def call() -> None:
        job(peer.attend, *next(turn))
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = str(case)
    benchmark.extra_info |= {"flops": case.flops, "bytes": case.bytes, "machine": machine.describe(DEVICE)}
    with peer.context():
        benchmark(call)
