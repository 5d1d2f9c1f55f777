"""`make gpu`: accuracy, races, models and tuning on an NVIDIA GPU, in stages that survive a cut."""

from __future__ import annotations

from vitreg_kernels.ops.attention import backends

# What may run on a GPU; a rehearsal on a CPU is of the same.
BACKENDS = tuple(backend for backend in backends.BACKENDS if backend is not backends.native)
