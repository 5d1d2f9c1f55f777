"""Function transforms of the Triton kernels: the cells of the table. More would take the interpreter long."""

from __future__ import annotations

from contract.test_transforms import OPS, test_calls_of_one_image, test_the_table_is_true

__all__ = ["OPS", "test_calls_of_one_image", "test_the_table_is_true"]
