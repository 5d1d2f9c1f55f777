"""A masked key is as good as absent, whatever it holds, in every way that the kernels walk over keys."""

from __future__ import annotations

import math

import pytest
import torch
from harness import call, check, random_rope, with_masked_keys_of

from vitreg_kernels.ops.attention.backends.triton import plan
from vitreg_kernels.ops.attention.backends.triton import tiles as tuning


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, of logits that are masked
@pytest.mark.parametrize(
    ("head_dim", "rope", "held"),
    [(32, None, math.nan), (24, None, math.inf), (24, "halves", math.nan), (32, "pairs", -math.inf)],
)
@pytest.mark.parametrize(("arch", "resident"), [(80, False), (90, True)], ids=["swept", "resident"])
def test_masked_keys_may_hold_anything(arch, resident, head_dim, rope, held, monkeypatch) -> None:
    tokens, prefix = 69, 5
    if resident:
        monkeypatch.setattr(tuning, "_FEW_HEADS", 0)  # one kernel for all gradients
    mask = torch.rand(2, 1, 1, tokens) < 0.6
    inputs = call(tokens, prefix, head_dim, torch.float16, batch=2, heads=1, attn_mask=mask)
    if rope:
        turned = random_rope(tokens - prefix, head_dim, interleaved=rope == "pairs")
        inputs = inputs._replace(rope=turned)
    assert bool(plan.launch_plan(inputs, "forward", arch).resident_widths) == resident
    check(with_masked_keys_of(inputs, held), arch=arch)
