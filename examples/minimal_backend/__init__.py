"""The smallest complete backend of an op of this library: ``assemble_tokens`` by copies. All of it is ``backend.py``.

``tests/examples/test_minimal_backend.py`` holds it to everything that the library's own backends are held to.
"""

from __future__ import annotations

from .backend import BACKEND, register

__all__ = ["BACKEND", "register"]
