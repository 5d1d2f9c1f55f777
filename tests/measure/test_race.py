"""A race: whoever runs is timed, right or wrong, and whoever does not says why."""

from __future__ import annotations

import warnings

import torch

from vitreg_kernels import UnsupportedError
from vitreg_kernels.measure import race, timing
from vitreg_kernels.measure.cases import attention
from vitreg_kernels.measure.oracle import Oracle
from vitreg_kernels.measure.race import Contender, Raced, Stopped, attempted, lost

CPU = torch.device("cpu")


def contender(name, *, seconds=0.001, error=None, ours=True, clock=None):
    def check():
        if error is not None:
            raise error
        return f"errors of {name}"

    return Contender(name, check, timing.Variant(lambda copy: clock and clock.sleep(seconds)), ours)


def test_each_gets_one_outcome_in_its_place(clock):
    racing = [
        contender("slow", seconds=0.01, clock=clock),
        contender("refuses", error=UnsupportedError("not built here")),
        contender("breaks", error=IndexError("out of its bounds")),
        contender("peer refuses", error=RuntimeError("no kernel"), ours=False),
        contender("fast", clock=clock),
    ]
    outcomes = race.race(racing, [None, None], device=CPU, budget_s=0.1)
    assert list(outcomes) == [one.name for one in racing]
    assert outcomes["refuses"] == Stopped("not built here", failed=False)
    assert outcomes["breaks"] == Stopped("IndexError: out of its bounds", failed=True)
    assert outcomes["peer refuses"] == Stopped("RuntimeError: no kernel", failed=False)
    assert {name: o.found for name, o in outcomes.items() if isinstance(o, Raced)} == {
        "slow": "errors of slow",
        "fast": "errors of fast",
    }
    assert outcomes["fast"].timing.median_ms < 2 < 10 <= outcomes["slow"].timing.median_ms
    assert outcomes["fast"].timing.samples > outcomes["slow"].timing.samples


def test_who_did_not_run_is_never_timed():
    called = []
    broken = contender("broken", error=IndexError())._replace(variant=timing.Variant(called.append))
    race.race([broken], [1], device=CPU, budget_s=0.0)
    assert called == []


def test_after_a_lost_gpu_nobody_is_raced_and_the_others_are_not_blamed(monkeypatch):
    monkeypatch.setattr(race, "lost", lambda device: True)
    racing = [contender("before"), contender("breaks", error=IndexError()), contender("after")]
    outcomes = race.race(racing, [None], device=CPU, budget_s=0.0)
    assert outcomes["breaks"] == Stopped("IndexError: ", failed=True)
    assert outcomes["before"] == outcomes["after"]
    assert outcomes["after"].reason.startswith("was not raced, because breaks broke")
    assert not outcomes["after"].failed


def test_the_backends_of_an_op_are_raced_on_a_call():
    """As a calibration does it: checked by the oracle, timed on copies of the call."""
    call = attention.call(torch.randn(2, 21, 3, 2, 16), num_prefix_tokens=5)
    oracle = Oracle(call)
    racing = [
        Contender(name, lambda name=name: oracle.errors(name), timing.Variant(lambda copy, name=name: copy.run(name)))
        for name in ("sdpa", "xformers")
    ]
    outcomes = race.race(racing, [call, call], device=CPU, budget_s=0.0)
    assert outcomes["sdpa"].found.keys() == {"output", *attention.GRADIENTS}
    assert all(error.passed for error in outcomes["sdpa"].found.values())
    assert "runs on cuda, not on cpu" in outcomes["xformers"].reason
    assert not outcomes["xformers"].failed


def test_warnings_are_part_of_the_reason():
    def warns():
        warnings.warn("the kernel wants another dtype", stacklevel=1)
        raise RuntimeError("no kernel")

    stopped = attempted(warns, ours=False)
    assert stopped == Stopped("RuntimeError: no kernel the kernel wants another dtype", failed=False)


def test_too_little_memory_is_nobodys_failure():
    def too_large():
        raise torch.OutOfMemoryError("tried to allocate 9 TiB")

    for ours in (True, False):
        assert attempted(too_large, ours=ours) == Stopped("tried to allocate 9 TiB", failed=False)


def test_a_refusal_of_ours_is_in_its_own_words():
    def declines():
        raise UnsupportedError("not here")

    assert attempted(declines, ours=True) == Stopped("not here", failed=False)


def test_a_gpu_is_lost_when_it_answers_no_more(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    assert not lost(torch.device("cuda"))

    def broken(device):
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    assert lost(torch.device("cuda"))
    assert not lost(torch.device("cpu"))
