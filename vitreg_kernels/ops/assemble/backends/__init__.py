"""Every way to compute the op, in the order of preference where nothing was measured: the only registry.

One file or folder each, with one frozen ``dispatch.Backend``. ``forward(inputs)`` gives the tokens. That of an opaque
one runs behind the ops of ``schema.py`` and has a ``backward(grad_tokens, sizes, gradients)`` beside it, which fills
the gradients that are not ``None``; that of any other is torch code that autograd differentiates. Autocast may be on
while they run.

Not here: what a call may be (``validation.py``), or its gradients' place in autograd (``autograd.py``).
"""

from __future__ import annotations

from . import composite, cpu, reference, triton

BACKENDS = (triton.BACKEND, cpu.BACKEND, composite.BACKEND, reference.BACKEND)
