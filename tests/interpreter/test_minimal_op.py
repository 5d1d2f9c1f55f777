"""``examples/minimal_op`` under the contract, by its Triton kernels, and what function transforms do with them."""

from __future__ import annotations

import pytest
from contract.test_contract import *  # noqa: F403
from contract.transforms import TRIALS, is_tried, outcome
from minimal_op.contract import UnitTokens
from test_contract import test_parity_in_guarded_memory

__all__ = ["test_parity_in_guarded_memory"]

OPS = (UnitTokens(),)


@pytest.mark.parametrize("trial", [trial for trial in TRIALS if is_tried(trial, OPS[0])], ids=lambda trial: trial.name)
def test_function_transforms(trial, tmp_path):
    """All that are tried of the library's own ops, but the mode that no kernel has a rule for."""
    expected = "a kernel has no rule for is_grads_batched=True" if "is_grads_batched" in trial.name else "works"
    assert outcome(trial, OPS[0], "triton", tmp_path).startswith(expected)
