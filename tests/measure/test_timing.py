"""Interleaving really interleaves, inputs really rotate, and the budget holds."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch

from benchmarks import results
from vitreg_kernels.measure import timing
from vitreg_kernels.measure.timing import MIN_SAMPLES, Variant

CPU = torch.device("cpu")


def test_every_round_runs_every_variant_once_and_in_changing_order():
    calls = []
    variants = {name: Variant(lambda _, name=name: calls.append(name)) for name in "abc"}
    timing.interleave(variants, [None], device=CPU, budget_s=0.02)
    del calls[:3]  # the warm-up
    rounds = [calls[i : i + 3] for i in range(0, 3 * MIN_SAMPLES, 3)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({tuple(calls[i : i + 3]) for i in range(0, len(calls) - 2, 3)}) > 1


def test_inputs_are_used_in_turn_across_variants():
    seen = []
    variants = {name: Variant(seen.append) for name in "ab"}
    timing.interleave(variants, [0, 1, 2], device=CPU, budget_s=0.0)
    assert len(seen) == 2 * (1 + MIN_SAMPLES)
    assert all(later == (earlier + 1) % 3 for earlier, later in itertools.pairwise(seen))


def test_a_slow_variant_does_not_take_the_samples_of_a_fast_one(clock):
    variants = {"slow": Variant(lambda _: clock.sleep(0.02)), "fast": Variant(lambda _: clock.sleep(0.0005))}
    timings = timing.interleave(variants, [None], device=CPU, budget_s=0.12)
    assert timings["slow"].samples == MIN_SAMPLES
    assert timings["fast"].samples > 4 * MIN_SAMPLES
    assert timings["slow"].median_ms >= 20


def test_the_budget_ends_the_race(clock):
    start = clock.perf_counter()
    timing.interleave({"a": Variant(lambda _: clock.sleep(0.001))}, [None], device=CPU, budget_s=0.05)
    assert 0.05 < clock.perf_counter() - start < 0.06


def test_the_context_is_entered_for_each_call_and_stays_outside_the_clock(clock):
    inside = False
    ran_inside = []

    @contextmanager
    def context():
        nonlocal inside
        clock.sleep(0.02)
        inside = True
        yield
        inside = False

    variants = {"a": Variant(lambda _: ran_inside.append(inside), context)}
    timings = timing.interleave(variants, [None], device=CPU, budget_s=0.0)
    assert ran_inside == [True] * (1 + MIN_SAMPLES)
    assert timings["a"].median_ms < 1


def test_preparation_stays_outside_the_clock_and_its_result_is_what_is_called(clock):
    called = []

    def prepare(number):
        clock.sleep(0.02)
        return -number

    variants = {"a": Variant(called.append, prepare=prepare)}
    timings = timing.interleave(variants, [1, 2], device=CPU, budget_s=0.0)
    assert sorted(called) == [-2, -2, -1, -1]
    assert timings["a"].median_ms < 1


class Gpu:
    """Stands in for torch.cuda: a GPU of 1 GHz on which every call takes a millisecond; ``log`` has what it is told."""

    def __init__(self, monkeypatch, clock):
        self.log, self._now, self.slept, self._clock = [], 0.0, 0.0, clock
        monkeypatch.setattr(torch.cuda, "Event", self.event)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: self.log.append("synchronize"))
        monkeypatch.setattr(timing, "_flush_cache", lambda: self.log.append("flush"))

    def event(self, enable_timing):
        assert enable_timing
        event = SimpleNamespace(at=None, elapsed_time=lambda end: end.at - event.at)

        def record():
            self.log.append("record")
            event.at = self._now

        event.record = record
        return event

    def sleep(self, cycles):
        self.log.append("sleep")
        self.slept = self._now
        self._now += cycles / 1e6

    def call(self, host_ms=0.01):
        self.log.append("call")
        self._now += 1.0
        self._clock.sleep(host_ms / 1e3)

    def wait(self, began):
        """What a call that synchronises adds: the host goes on once all is done that was told since ``began``."""
        self._clock.sleep((self._now - began) / 1e3)


@pytest.fixture
def gpu(monkeypatch, clock):
    return Gpu(monkeypatch, clock)


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
def test_on_a_gpu_preparation_and_flush_are_enqueued_before_the_clock_starts(gpu, prepared):
    prepare = (lambda x: gpu.log.append("prepare")) if prepared else None
    (sample,) = timing._CudaRounds()({"a": (Variant(lambda x: gpu.call(), prepare=prepare), 1)}).values()
    assert sample.ms == pytest.approx(1.0)
    before = ["prepare", "flush"] if prepared else []
    assert gpu.log == [*before, "record", "sleep", "record", "call", "record", "synchronize"]


@pytest.mark.parametrize(
    ("host_ms", "calls"),
    [(0.1, 1), (0.4, 1), (0.7, 2), (2.5, 4), (1e6, 1 + timing._DOUBLINGS)],  # a sleep of 1 ms hides up to 0.6
)
def test_a_call_that_keeps_the_host_is_timed_again_behind_a_longer_sleep(gpu, host_ms, calls):
    rounds = timing._CudaRounds()
    slow, fast = (Variant(lambda _, ms=ms: gpu.call(ms)) for ms in (host_ms, 0.01))
    samples = rounds({"slow": (slow, None), "fast": (fast, None)})
    assert gpu.log.count("call") == calls + 1
    assert samples["slow"].ms == pytest.approx(1.0)
    assert samples["slow"].host_ms == pytest.approx(host_ms, abs=0.2)
    gpu.log.clear()
    rounds({"slow": (slow, None)})  # what a round has learnt holds in the next
    assert gpu.log.count("call") == 1


def test_a_call_that_waits_for_the_gpu_is_known_and_gets_no_longer_sleeps(gpu):
    def call(_):
        asleep = gpu.slept
        gpu.call()
        gpu.wait(asleep)

    timings = timing.interleave({"a": Variant(call)}, [None], device=torch.device("cuda"), budget_s=0.0)
    assert gpu.log.count("call") <= 1 + MIN_SAMPLES + timing._WAITS_AFTER
    assert timings["a"].waits
    assert timings["a"].median_ms == pytest.approx(1.0)
    assert results.timed(timings["a"])["waits"]
    assert "waits" not in results.timed(timings["a"]._replace(waits=False))


def test_the_time_of_the_host_is_part_of_a_timing_on_a_gpu(gpu):
    variants = {"a": Variant(lambda _: gpu.call(5.0))}
    timings = timing.interleave(variants, [None], device=torch.device("cuda"), budget_s=0.0)
    assert timings["a"].host_ms == pytest.approx(5.0, abs=0.2)
    assert timing.interleave({"a": Variant(abs)}, [1], device=CPU, budget_s=0.0)["a"].host_ms is None


def test_summary():
    assert timing.summary([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (3.5, 2.0, 5.0, 1.0, 6, None, False)


@pytest.mark.parametrize("nbytes", [1000, 2**20 + 4, 2**23])
def test_copies_are_larger_than_the_cache_together(nbytes, monkeypatch):
    monkeypatch.setattr(timing, "last_level_cache", lambda device: 2**22)
    copies = timing.copies_past_cache(lambda: (torch.empty(nbytes // 4, dtype=torch.int8),) * 4, CPU)
    assert len(copies) == len({x.data_ptr() for x, *_ in copies}) >= 2
    assert 0 <= len(copies) * nbytes - 2 * 2**22 < 2 * nbytes


def test_the_cache_of_this_machine_is_plausible():
    assert 2**18 <= timing.last_level_cache(CPU) <= 2**31


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_timed_by_its_own_clock():
    x = torch.randn(4096, 4096, device="cuda")
    variants = {"one": Variant(lambda x: x @ x), "four": Variant(lambda x: [x @ x for _ in range(4)])}
    timings = timing.interleave(variants, [x, x.clone()], device=x.device, budget_s=0.3)
    assert 3 < timings["four"].median_ms / timings["one"].median_ms < 5
