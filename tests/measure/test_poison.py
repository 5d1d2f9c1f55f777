"""Memory full of NaN is where it should be, and nowhere else."""

from __future__ import annotations

import pytest
import torch

from vitreg_kernels.measure.poison import BAND, guarded, poisoned
from vitreg_kernels.ops.attention.types import empty_output

CPU = torch.device("cpu")


def test_guarded_values_lie_in_nan():
    values = torch.randn(3, 4, 5).transpose(0, 2)
    inside = guarded(values)
    assert torch.equal(inside, values)
    assert inside.stride() == values.stride()
    memory = inside.as_strided((60 + 2 * BAND,), (1,), 0)
    assert memory[:BAND].isnan().all()
    assert memory[-BAND:].isnan().all()
    assert torch.equal(memory[BAND:-BAND], values.transpose(0, 2).flatten())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_uninitialised_memory_is_nan_and_only_within(dtype):
    with poisoned(CPU):
        query = torch.zeros(1, 2, 3, 4, dtype=dtype)
        buffers = (torch.empty(7, dtype=dtype), query.new_empty(7), torch.empty_like(query), empty_output(query))
        assert all(buffer.isnan().all() for buffer in buffers)
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(IndexError), poisoned(CPU):
        raise IndexError
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_torch_that_does_not_fill_is_not_trusted(monkeypatch):
    monkeypatch.setattr(torch, "empty", lambda *size, device: torch.zeros(*size, device=device))
    with pytest.raises(RuntimeError, match="does not fill uninitialised memory"), poisoned(CPU):
        pass
