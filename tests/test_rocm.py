"""On ROCm torch calls an AMD GPU "cuda" and gives it a compute capability; no Triton kernel here is made for one."""

from __future__ import annotations

import pytest
import torch

from vitreg_kernels.dispatch import Request, find
from vitreg_kernels.ops.catalogue import OPS


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("capability", [90, 94], ids=["MI200", "MI300"])
def test_an_amd_gpu_is_not_taken_for_a_hopper(op: str, capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    request = Request(op, "cuda", capability, torch.float16, head_dim=64, channels=384)
    (reason,) = find(OPS[op].backends, "triton").reasons_against(request)
    assert "this torch is built for AMD's (ROCm)" in reason
