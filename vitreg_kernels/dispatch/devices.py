"""What tables of measurements call a device."""

from __future__ import annotations

import functools
import platform
import re
from pathlib import Path

import torch

from .._native import library

_CPU = f"cpu_{library.isa()}" if library.isa() else "cpu"
_MULTIPROCESSORS = " multiprocessors"


def kind(device: str, capability: int) -> str:
    """Of a device type: ``"sm_90"``, ``"cpu_avx512"`` (by the instruction set in use), or the type itself."""
    if device == "cuda":
        return f"sm_{capability}"
    return _CPU if device == "cpu" else device


def processor() -> str:
    """The CPU's marketing name; ``platform.processor()`` knows it on no Linux."""
    info = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def gpu(device: torch.device) -> str:
    """One GPU's own name, which tells it from others of its architecture: ``"NVIDIA H200, 132 multiprocessors"``.

    A part of a GPU (MIG) is named as such by its driver, and has fewer multiprocessors.
    """
    return _gpu(device)


def is_gpu(name: str) -> bool:
    """Whether a name is one that ``gpu`` gave."""
    return name.endswith(_MULTIPROCESSORS)


# The compiler traces through the choice of a backend and cannot trace a cache. So marked, it asks this once and takes
# the answer; what torch.compiler.assume_constant_result does, which would import the compiler here.
gpu._dynamo_marked_constant = True


@functools.cache
def _gpu(device: torch.device) -> str:
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name}, {properties.multi_processor_count}{_MULTIPROCESSORS}"
