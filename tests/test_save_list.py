"""``SAVE_LIST`` keeps attention's forward from running again under selective activation checkpointing."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from vit_cases import TINY, vit

from vitreg_kernels.functional import SAVE_LIST
from vitreg_kernels.ops.attention.backends import BACKENDS


@pytest.mark.parametrize(("kept", "runs"), [((), 6), (SAVE_LIST, 3)])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["packed", "separate"])
def test_attention_runs_once(kept, runs, qk_norm, change_backends):
    model, x = vit(replace(TINY, depth=3, qk_norm=qk_norm)), torch.randn(2, 3, 16, 20)
    model(x)[0].sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    (forward,) = (backend.forward for backend in BACKENDS if backend.name == "cpu")
    calls = []
    change_backends("cpu", op="attention", forward=lambda *a, **o: calls.append(1) or forward(*a, **o))
    contexts = partial(create_selective_checkpoint_contexts, list(kept))
    for block in model.blocks:
        block.forward = partial(
            checkpoint, type(block).forward.__get__(block), use_reentrant=False, context_fn=contexts
        )
    model(x)[0].sum().backward()
    assert len(calls) == runs
    for name, gradient in expected.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)
