"""The exceptions of this library that are not Python's own."""

from __future__ import annotations


class UnsupportedError(RuntimeError):
    """No backend, or not the one that was named, can serve a call. The message lists the reasons."""


# A traceback shows where to import it from: ``vitreg_kernels.UnsupportedError``.
UnsupportedError.__module__ = "vitreg_kernels"
