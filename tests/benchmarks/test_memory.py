"""Results lie where a race wants them: the system maps pages for them at every call, or at none but the first."""

from __future__ import annotations

import mmap
import resource

import pytest
import torch

from benchmarks import memory

CPU = torch.device("cpu")
PAGES = 2048  # of 4 KiB, 8 MiB


def count_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def are_counted() -> bool:
    faults = count_faults()
    with mmap.mmap(-1, 2**20) as fresh:
        fresh.write(b"1" * 2**20)
    return count_faults() > faults


glibc = pytest.mark.skipif(
    memory.choices(CPU) == ("any",) or not are_counted(),
    reason="needs glibc, whose allocator can be told, and a system that counts page faults",
)


def faults_of_a_call(before=lambda: None) -> int:
    for _ in range(8):  # an aligned block needs more room than it takes: neighbours that were freed, together
        torch.ones(PAGES * 1024)
    before()
    faults = count_faults()
    torch.ones(PAGES * 1024)
    return count_faults() - faults


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
