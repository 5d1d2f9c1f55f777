"""Results lie where a race wants them: the system maps pages for them at every call, or at none but the first."""

from __future__ import annotations

import resource

import pytest
import torch

from benchmarks import memory

CPU = torch.device("cpu")
PAGES = 2048  # of 4 KiB, 8 MiB

glibc = pytest.mark.skipif(memory.choices(CPU) == ("any",), reason="needs glibc, whose allocator can be told")


def faults_of_a_call(before=lambda: None) -> int:
    for _ in range(8):  # an aligned block needs more room than it takes: neighbours that were freed, together
        torch.ones(PAGES * 1024)
    before()
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(PAGES * 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


@glibc
def test_kept_memory_is_mapped_once_and_what_was_given_back_again():
    for _ in range(2):
        with memory.kept():
            assert faults_of_a_call() < PAGES / 10
            assert faults_of_a_call(memory.give_back) >= PAGES / 2
        assert faults_of_a_call(memory.give_back) >= PAGES / 2


@glibc
def test_a_failing_race_leaves_the_allocator_as_it_should_be(monkeypatch):
    told, tell = [], memory._set
    monkeypatch.setattr(memory, "_set", lambda parameters: (told.append(parameters), tell(parameters)))
    with pytest.raises(KeyError), memory.kept():
        raise KeyError
    assert told == [memory._KEEP, memory._USUAL]


def test_the_memory_of_a_gpu_cannot_be_told():
    assert memory.choices(torch.device("cuda")) == ("any",)
