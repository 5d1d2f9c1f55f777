"""The contract of every op, by its Triton kernels, and what only they could do: read and write beyond a tensor."""

from __future__ import annotations

import pytest
import torch
from contract import memory
from contract.op import errors, mapped, run
from contract.test_contract import *  # noqa: F403
from contract.test_contract import every_kind


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_parity_in_guarded_memory(op, backend, spec, dtype):
    """Outputs, gradients and statistics keep the accuracy rule, and every element is written and nothing else read."""
    call = mapped(op.make_call(spec._replace(dtype=dtype)), memory.guarded)
    with memory.guarded_allocations():
        results = run(op, backend.name, call, arrange=memory.guarded)
    assert not errors(op, [call], [results])
