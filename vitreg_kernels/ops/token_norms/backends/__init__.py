"""Every way to compute the ops, in the order of preference where nothing was measured: the only registry.

One file or folder each, with one frozen ``TokenNormsBackend``. Autocast may be on while they run.

Not here: what a call may be (``validation.py``), or its gradients' place in autograd (``autograd.py``).
"""

from __future__ import annotations

from . import composite, cpu, reference, triton

BACKENDS = (triton.BACKEND, cpu.BACKEND, composite.BACKEND, reference.BACKEND)
