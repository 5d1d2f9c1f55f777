"""Every way to compute the op, in the order of preference: the only registry.

A backend is a module with ``NAME``, ``REQUIREMENTS``, ``not_supported_reasons``, ``not_default_reasons`` and
``forward(inputs) -> AttentionResult``. One that also has ``backward(inputs, output, lse, grad_output, grad_query,
grad_key, grad_value)``, which fills three strided buffers, runs behind an opaque op; the forward of any other is torch
code that autograd differentiates.
"""

from __future__ import annotations

from . import reference, sdpa, triton, xformers

BACKENDS = (triton, sdpa, xformers, reference)
