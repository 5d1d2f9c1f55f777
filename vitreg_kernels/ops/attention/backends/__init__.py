"""Every way to compute the op, in the order of preference: the only registry.

A backend is a module with ``NAME``, ``OPAQUE``, ``REQUIREMENTS``, ``not_supported_reasons``, ``not_default_reasons``
and ``forward(inputs) -> AttentionResult``. An opaque one runs behind the ops of ``schema.py`` and also has
``backward(inputs, output, lse, grad_output, grad_query, grad_key, grad_value)``, which fills three strided buffers; the
forward of any other is torch code that autograd differentiates. Autocast may be on while they run, their inputs cast.
"""

from __future__ import annotations

from . import native, reference, sdpa, triton, xformers

BACKENDS = (triton, native, sdpa, xformers, reference)
