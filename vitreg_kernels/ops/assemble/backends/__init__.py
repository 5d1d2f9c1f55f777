"""Every way to compute the op, in the order of preference: the only registry.

A backend is a module with ``NAME``, ``OPAQUE``, ``REQUIREMENTS``, ``not_supported_reasons``, ``not_default_reasons``
and ``forward(inputs)``, which gives the tokens. That of an opaque one runs behind the ops of ``schema.py`` and has a
``backward(grad_tokens, sizes, gradients)`` beside it, which fills the gradients that are not ``None``; that of any
other is torch code that autograd differentiates. Autocast may be on while they run.
"""

from __future__ import annotations

from . import composite, native, reference, triton

BACKENDS = (triton, native, composite, reference)
