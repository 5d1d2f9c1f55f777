"""Lets timm, and transformers, be imported on a CPU-only torch."""

from __future__ import annotations

from contextlib import suppress

from benchmarks.timm_vits import import_timm

with suppress(ModuleNotFoundError):  # the tests that need it are left out
    import_timm()
