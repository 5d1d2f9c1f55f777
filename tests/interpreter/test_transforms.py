"""Function transforms of the Triton kernels: the table's cells, and every input mapped alone."""

from __future__ import annotations

from contract.test_transforms import *  # noqa: F403
