"""`make gpu`: accuracy, races, models and tuning on an NVIDIA GPU, in stages that survive a cut.

Not here: anything that runs on a CPU, but for the rehearsal of a run; those races are in ``benchmarks`` itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.gpu import began  # noqa: F401  before torch
from vitreg_kernels.dispatch import Backend
from vitreg_kernels.ops.attention import backends


def on_gpus(backends: Sequence[Backend]) -> tuple[Backend, ...]:
    """Those that may be a GPU's default, or what the others are held against; a rehearsal on a CPU is of the same."""
    return tuple(backend for backend in backends if backend.name != "cpu")


BACKENDS = on_gpus(backends.BACKENDS)
