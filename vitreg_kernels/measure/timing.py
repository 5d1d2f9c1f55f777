"""Interleaved timing: every variant meets the same state of the machine, so their ratios can be trusted.

In each round every variant runs once, in an order shuffled anew, so a change of clock, a busy neighbour or what the
previous variant left in the cache falls on all of them alike. Each call gets another copy of the input, and the copies
together are larger than the last-level cache, so nobody is served from it. What a variant prepares outside the clock is
flushed out of a GPU's cache, as the layers between a forward and its backward do.
"""

from __future__ import annotations

import math
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

MIN_SAMPLES = 3
# Cycles the GPU is kept busy before each call, so that the host has enqueued it before it starts: about 0.6 ms. A call
# that keeps the host longer than this share of them is timed again behind twice as many, up to about 0.15 s; unless it
# is seen to wait for the GPU, which no sleep can hide: after this many doublings it kept the host longer by most of
# what the last one added.
_SLEEP_CYCLES = 1_000_000
_HIDDEN_SHARE = 0.6
_DOUBLINGS = 8
_WAITS_AFTER, _WAITS_SHARE = 3, 0.8
_DEFAULT_CACHE = 32 * 2**20


class Variant(NamedTuple):
    """One contender.

    Attributes:
        call: what is timed.
        context: entered around each call, outside the clock.
        prepare: makes the argument of ``call`` from an input, outside the clock.
    """

    call: Callable[[Any], object]
    context: Callable[[], AbstractContextManager[object]] = nullcontext
    prepare: Callable[[Any], Any] | None = None

    def prepared(self, argument: Any) -> Any:
        """What ``call`` takes."""
        return argument if self.prepare is None else self.prepare(argument)


class Timing(NamedTuple):
    """Milliseconds a call, over ``samples`` calls; ``host_ms`` is what enqueuing one keeps the host of a GPU.

    ``waits`` says of a call on a GPU that it synchronises, so that its time holds some of the host's.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    min_ms: float
    samples: int
    host_ms: float | None = None
    waits: bool = False


class Sample(NamedTuple):
    """One call: milliseconds of the device, and of the host that enqueued it on a GPU; ``waits`` as of ``Timing``."""

    ms: float
    host_ms: float | None = None
    waits: bool = False


def interleave(
    variants: Mapping[str, Variant], inputs: Sequence[Any], *, device: torch.device, budget_s: float
) -> dict[str, Timing]:
    """Times every variant in shuffled rounds until ``budget_s`` is spent.

    The budget is shared out equally: a variant that has spent its share sits out the later rounds, so one slow
    contender does not take the samples of the others. Each has at least ``MIN_SAMPLES``, whatever they cost.

    Args:
        variants: name -> contender; each gets one of ``inputs``.
        inputs: copies of one input, see ``copies_past_cache``; used in turn, across variants.
        device: where the variants run. The CPU is timed with ``perf_counter``, a GPU with CUDA events.
        budget_s: seconds for all variants together, warm-up left out.
    """
    timed_round = _rounds_on(device)
    turn = 0

    def next_input() -> Any:
        nonlocal turn
        turn += 1
        return inputs[turn % len(inputs)]

    for variant in variants.values():
        with variant.context():
            variant.call(variant.prepared(next_input()))  # compiles, allocates, wakes the threads

    order = random.Random(0)
    samples: dict[str, list[Sample]] = {name: [] for name in variants}
    share_ms = 1e3 * budget_s / max(len(variants), 1)
    deadline = time.perf_counter() + budget_s
    while active := [
        name
        for name, its in samples.items()
        if len(its) < MIN_SAMPLES or (sum(one.ms for one in its) < share_ms and time.perf_counter() < deadline)
    ]:
        order.shuffle(active)
        for name, sample in timed_round({name: (variants[name], next_input()) for name in active}).items():
            samples[name].append(sample)
    return {name: _timing(its) for name, its in samples.items()}


def in_rounds(
    variants: Mapping[str, Variant], argument: Any, *, device: torch.device, rounds: int
) -> dict[str, list[float]]:
    """Times every variant once a round, in an order that is drawn anew for each.

    Args:
        variants: name -> contender.
        argument: what each takes.
        device: where they run.
        rounds: how many, after one to warm up.

    Returns:
        Milliseconds by name and round. Two of a round were measured side by side: their ratio is worth more than that
        of two medians.
    """
    timed_round = _rounds_on(device)
    order = random.Random(0)
    names = list(variants)
    samples: dict[str, list[float]] = {name: [] for name in variants}
    for i in range(1 + rounds):
        order.shuffle(names)
        for name, sample in timed_round({name: (variants[name], argument) for name in names}).items():
            if i:
                samples[name].append(sample.ms)
    return samples


def summary(times_ms: Sequence[float]) -> Timing:
    """Median, 20th and 80th percentile, and least of some samples in milliseconds."""
    p20, median, p80 = np.percentile(times_ms, (20, 50, 80)).tolist()
    return Timing(median, p20, p80, min(times_ms), len(times_ms))


def copies_past_cache(make: Callable[[], tuple[Tensor, ...]], device: torch.device) -> list[tuple[Tensor, ...]]:
    """As many inputs from ``make``, at least 2, as take twice the last-level cache of ``device``."""
    first = make()
    count = max(2, math.ceil(2 * last_level_cache(device) / sum(x.nbytes for x in first)))
    return [first, *(make() for _ in range(count - 1))]


def last_level_cache(device: torch.device) -> int:
    """Bytes of the largest cache of ``device``; 32 MiB where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=_DEFAULT_CACHE)


def _timing(samples: Sequence[Sample]) -> Timing:
    host = [sample.host_ms for sample in samples if sample.host_ms is not None]
    timing = summary([sample.ms for sample in samples])
    waits = any(sample.waits for sample in samples)
    return timing._replace(host_ms=float(np.median(host)), waits=waits) if host else timing


_Calls = Mapping[str, tuple[Variant, Any]]  # in their order, each with its argument


def _rounds_on(device: torch.device) -> Callable[[_Calls], dict[str, Sample]]:
    return _CudaRounds() if device.type == "cuda" else _cpu_round


def _cpu_round(calls: _Calls) -> dict[str, Sample]:
    samples = {}
    for name, (variant, argument) in calls.items():
        with variant.context():
            prepared = variant.prepared(argument)
            start = time.perf_counter()
            variant.call(prepared)
            samples[name] = Sample(1e3 * (time.perf_counter() - start))
    return samples


class _CudaRounds:
    """Rounds of calls on a GPU. How long it sleeps before each, a call's first samples tell for the later ones."""

    def __init__(self) -> None:
        self._doublings: Counter[str] = Counter()
        self._waiting: set[str] = set()

    def __call__(self, calls: _Calls) -> dict[str, Sample]:
        samples = {}
        left = dict(calls)
        before: dict[str, tuple[float, float]] = {}
        while left:
            marks = {name: self._enqueue(name, *call) for name, call in left.items()}
            torch.cuda.synchronize()
            for name, (host_ms, asleep, start, end) in marks.items():
                slept_ms = asleep.elapsed_time(start)
                if self._doublings[name] >= _WAITS_AFTER and name in before:
                    host_before, slept_before = before[name]
                    if host_ms - host_before > _WAITS_SHARE * (slept_ms - slept_before):
                        self._waiting.add(name)
                        self._doublings[name] = 0
                before[name] = host_ms, slept_ms
                hidden = host_ms <= _HIDDEN_SHARE * slept_ms
                if hidden or name in self._waiting or self._doublings[name] == _DOUBLINGS:
                    samples[name] = Sample(start.elapsed_time(end), host_ms, name in self._waiting)
                    del left[name]
                else:
                    self._doublings[name] += 1
        return samples

    def _enqueue(self, name: str, variant: Variant, argument: Any) -> tuple[float, Any, Any, Any]:
        """Milliseconds of the host, and events: the GPU falls asleep, begins, and ends."""
        asleep, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        with variant.context():
            prepared = variant.prepared(argument)
            if variant.prepare is not None:
                _flush_cache()
            asleep.record()
            torch.cuda._sleep(_SLEEP_CYCLES << self._doublings[name])
            start.record()
            begun = time.perf_counter()
            variant.call(prepared)
            host_ms = 1e3 * (time.perf_counter() - begun)
            end.record()
            del prepared  # or the next one would need its memory beside this one's
        return host_ms, asleep, start, end


def _flush_cache() -> None:
    """Reads more than the cache holds: lines that were written would be written back within the clock."""
    device = torch.device("cuda", torch.cuda.current_device())
    torch.empty(2 * last_level_cache(device) // 4, device=device).sum()
