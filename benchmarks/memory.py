"""Where the results of a CPU call lie: in memory that the process kept of earlier calls, or fresh from the system.

Fresh memory is mapped page by page as it is first written, which takes longer than a call that does little arithmetic.
glibc gives large blocks back to the system when they are freed: those above 32 MiB always, smaller ones as its history
has it (``man mallopt``). A race of such calls is of two kinds, therefore, and neither stands for the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch

# "any": as the allocator has it; of a GPU's, torch keeps it.
Memory = Literal["kept", "fresh", "any"]

IN_WORDS: dict[Memory, str] = {
    "kept": "results in memory kept from earlier calls",
    "fresh": "results in memory fresh from the system",
    "any": "results wherever the allocator puts them",
}

# Of glibc's malloc.h: parameters, and their values for keeping all that was ever mapped.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_KEEP = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1}
# What glibc's own rule ends at in a process that has freed large blocks.
_USUAL = {_M_MMAP_MAX: 65536, _M_MMAP_THRESHOLD: 32 * 2**20, _M_TRIM_THRESHOLD: 64 * 2**20}
_MADV_NOHUGEPAGE = 15  # of Linux's mman.h


def choices(device: torch.device) -> tuple[Memory, ...]:
    """The kinds of memory that results on ``device`` can be given."""
    glibc = device.type == "cpu" and hasattr(ctypes.CDLL(None), "gnu_get_libc_version")  # which runs on Linux
    return ("kept", "fresh") if glibc else ("any",)


@contextmanager
def kept() -> Iterator[None]:
    """What is freed within stays mapped, for the next call."""
    _set(_KEEP)
    try:
        yield
    finally:
        _set(_USUAL)
        give_back()


def give_back() -> None:
    """Everything that is free goes back to the system; what is made next is fresh, and in pages of the usual size."""
    libc = ctypes.CDLL(None)
    libc.malloc_trim(0)
    # Who asked for huge pages of the heap, as kernels of ours do, would have got them for those after it.
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith("[heap]"):
            first, end = (int(address, 16) for address in line.split()[0].split("-"))
            libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(end - first), _MADV_NOHUGEPAGE)


def _set(parameters: dict[int, int]) -> None:
    for parameter, value in parameters.items():
        if not ctypes.CDLL(None).mallopt(parameter, value):
            raise OSError(f"mallopt({parameter}, {value}) was refused")
