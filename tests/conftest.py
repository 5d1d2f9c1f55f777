"""One seed and no leftovers from a compiled test in the next; Hypothesis draws the same examples every time."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

# What the user of this machine has calibrated is no concern of the tests.
os.environ["VITREG_CALIBRATION"] = "0"

from vitreg_kernels.dispatch.rules import select_cached
from vitreg_kernels.measure import timing
from vitreg_kernels.ops.catalogue import OPS

hypothesis.settings.register_profile("vitreg", derandomize=True, deadline=None, database=None, print_blob=False)
hypothesis.settings.load_profile("vitreg")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "of_ops(names, cases): parameters made of the OPS of the module it is collected in"
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """So that the same tests serve the ops of any module that imports them."""
    for mark in metafunc.definition.iter_markers("of_ops"):
        names, cases = mark.args
        metafunc.parametrize(names, list(cases(metafunc.module.OPS)))


@pytest.fixture(autouse=True, scope="session")
def _interrupts():
    """Ctrl-C reaches the tests and what they start, also where a shell began them in the background without it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def change_backends() -> Iterator[Callable[..., None]]:
    """Called with a backend's name and fields of ``Backend``, changes them for one test; in every op, or in ``op``.

    Backends are frozen for everybody else. The objects stay the same, since many a module holds them.
    """
    before = []

    def change(name: str, *, op: str | None = None, **fields: Any) -> None:
        changed = [b for of in OPS.values() if op in (None, of.name) for b in of.backends if b.name == name]
        assert changed
        for backend in changed:
            for field, value in fields.items():
                before.append((backend, field, getattr(backend, field)))
                object.__setattr__(backend, field, value)
        select_cached.cache_clear()

    yield change
    for backend, field, value in reversed(before):
        object.__setattr__(backend, field, value)
    select_cached.cache_clear()


@pytest.fixture
def dynamo():
    """An empty compile cache, before and after."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


class Clock:
    """Stands in for the module ``time``: moved by what sleeps, and by a tenth of a millisecond at every look."""

    def __init__(self) -> None:
        self._now = 0.0

    def perf_counter(self) -> float:
        self._now += 1e-4
        return self._now

    def sleep(self, seconds: float) -> None:
        self._now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of all timing, out of the hands of a busy machine."""
    clock = Clock()
    monkeypatch.setattr(timing, "time", clock)
    return clock
