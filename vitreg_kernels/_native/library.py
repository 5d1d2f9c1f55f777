"""The native CPU library, loaded when this module is first imported, where the install has one that runs here.

``VITREG_NATIVE=0`` in the environment leaves it alone, as an install without it would be. ``VITREG_CPU_ISA`` names the
instruction set to run (baseline, avx2, avx512, avx512bf16, amx) instead of the best that the CPU has; tests do.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from .sources import digest

_FOLDER = Path(__file__).parent
_LIBRARY, _METADATA = _FOLDER / "libvitreg_cpu.so", _FOLDER / "cpu.json"
# There in a checkout only; in a wheel the library and the Python files have come together.
_SOURCES = _FOLDER.parents[1] / "csrc"


def _load() -> tuple[str, str]:
    """The instruction set that the library runs, and why there is none; one of the two is empty."""
    if os.environ.get("VITREG_NATIVE") == "0":
        return "", "VITREG_NATIVE=0 is set"
    if not _LIBRARY.exists():
        return "", str(_metadata().get("reason") or _not_built())
    if (_SOURCES / "bindings.cpp").exists() and _metadata().get("sources") != digest(_SOURCES):
        again = "build it again by python setup.py build_ext --inplace"
        return "", f"the library was built from other sources than those in {_SOURCES}; {again}"
    try:
        torch.ops.load_library(_LIBRARY)
        return torch.ops.vitreg_cpu.cpu_isa(), ""
    except (OSError, RuntimeError, AttributeError) as error:  # of the linker, of the library, or it has no such op
        return "", (str(error).strip() or type(error).__name__).splitlines()[0]


def _not_built() -> str:
    """Why the library is missing where no build has told, and what to do about it.

    Most often an installed package has one, and Python was started in a checkout, whose folder it takes instead.
    """
    checkout = _SOURCES.parent
    if (_SOURCES / "bindings.cpp").exists():
        return (
            f"it was not built in the checkout {checkout}, which this Python imports the package from; start Python in "
            "another folder if the package is installed, or build it there by pip install -e ."
        )
    return "it was not built; install the package, which builds it"


def _metadata() -> dict[str, Any]:
    """What the build wrote down; it may hold anything, or nothing, and is only told to people and compared."""
    try:
        written = json.loads(_METADATA.read_text())
    except (OSError, ValueError):
        return {}
    return written if isinstance(written, dict) else {}


_ISA, _FAULT = _load()


def isa() -> str:
    """The instruction set that native kernels run in this process; empty where there are none."""
    return _ISA


def faults() -> list[str]:
    """Why native kernels cannot run in this process; empty if they can."""
    return [f"there are no native kernels: {_FAULT}"] if _FAULT else []


def summary() -> str:
    """What there is, for a person."""
    if _FAULT:
        return f"none, {_FAULT}"
    built = _metadata()
    sets = built.get("instruction_sets")
    of = ", ".join(map(str, sets)) if isinstance(sets, list) else "unknown"
    torch_version, compiler = (built.get(name, "unknown") for name in ("torch", "compiler"))
    return f"{_ISA} (of {of}), built against torch {torch_version} by {compiler}"
