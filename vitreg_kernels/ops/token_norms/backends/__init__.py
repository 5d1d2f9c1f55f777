"""Every way to compute the ops, in the order of preference: the only registry.

A backend is a module with ``NAME``, ``OPAQUE``, ``REQUIREMENTS``, ``not_supported_reasons``, ``not_default_reasons``,
``forward(x)``, which gives the norms of tokens, and ``accumulate(norms, layout, into)``, which counts one fp32 norm or
more. The latter always runs behind the op of ``schema.py``, an opaque backend's ``forward`` too. Autocast may be on.
"""

from __future__ import annotations

from . import composite, native, reference, triton

BACKENDS = (triton, native, composite, reference)
