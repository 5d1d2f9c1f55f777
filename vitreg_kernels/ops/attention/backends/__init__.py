"""Every way to compute the op, in the order of preference where nothing was measured: the only registry.

One file or folder each, with one frozen ``dispatch.Backend``. ``forward(inputs)`` gives an ``AttentionResult``. An
opaque backend runs behind the ops of ``schema.py`` and also has ``backward(inputs, output, lse, grad_output,
grad_query, grad_key, grad_value)``, which fills three strided buffers; the forward of any other is torch code that
autograd differentiates. Autocast may be on while they run, their inputs cast.

Not here: what a call may be (``validation.py``), or its gradients' place in autograd (``autograd.py``).
"""

from __future__ import annotations

from . import cpu, flash_attn, reference, sdpa, triton, xformers

BACKENDS = (
    triton.BACKEND,
    cpu.BACKEND,
    sdpa.BACKEND,
    *sdpa.KERNELS,
    flash_attn.BACKEND,
    xformers.BACKEND,
    reference.BACKEND,
)
