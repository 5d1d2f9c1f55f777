"""What torch's FLOP counter says of the ops: as many products as torch counts of its own fused attention."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vitreg_kernels import RegisterViT, functional
from vitreg_kernels.nn.config import ViTConfig

BATCH, HEADS, TOKENS, HEAD_DIM, PREFIX = 2, 3, 21, 16, 5
PRODUCT = 2 * BATCH * HEADS * TOKENS**2 * HEAD_DIM  # of queries and keys


def counted(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def qkv(batch=BATCH, tokens=TOKENS):
    return torch.randn(batch, tokens, 3, HEADS, HEAD_DIM, requires_grad=True)


@pytest.mark.parametrize("packed", [True, False])
def test_attention(packed):
    """2 products forward, and 5 backward, which makes the logits again."""

    def attend(qkv):
        if packed:
            return functional.register_attention_qkv(qkv, backend="cpu")
        query, key, value = (x.transpose(1, 2) for x in qkv.unbind(2))
        return functional.register_attention(query, key, value, backend="cpu")

    assert counted(attend, qkv()) == 2 * PRODUCT
    assert counted(lambda x: attend(x).sum().backward(), qkv()) == 7 * PRODUCT


def test_packed_images_count_by_their_lengths():
    bounds = torch.tensor([0, 5, 12, 21], dtype=torch.int32)
    expected = 2 * 2 * HEADS * (5**2 + 7**2 + 9**2) * HEAD_DIM

    def attend(qkv):
        return functional.register_attention_qkv(qkv, cu_seqlens=bounds, max_seqlen=9, backend="cpu")

    assert counted(attend, qkv(1)) == expected
    assert counted(lambda x: attend(x).sum().backward(), qkv(1)) == expected // 2 * 7


def test_packed_images_of_unknown_length_count_as_the_longest():
    with torch._subclasses.FakeTensorMode():
        bounds = torch.zeros(4, dtype=torch.int32)
        found = counted(
            lambda x: torch.ops.vitreg.attention_forward_qkv(x, None, None, None, False, bounds, 9, 0, 1.0, "", "cpu"),
            torch.randn(1, TOKENS, 3, HEADS, HEAD_DIM),
        )
    assert found == 2 * 2 * HEADS * 3 * 9**2 * HEAD_DIM


@pytest.mark.parametrize(("outputs", "rows"), [(("lse",), TOKENS), (("prefix_attention",), PREFIX), ((), 0)])
def test_statistics_of_sdpa_make_the_logits_again(outputs, rows):
    query, key, value = (x.transpose(1, 2).detach() for x in qkv().unbind(2))

    def attend(outputs):
        functional.register_attention(query, key, value, num_prefix_tokens=PREFIX, outputs=outputs, backend="sdpa")

    assert counted(attend, outputs) - counted(attend, ()) == PRODUCT * rows // TOKENS


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_whole_model(compiled):
    """Its linear layers as torch counts them, its attention, and nothing for norms and assembly."""
    config = ViTConfig(image_size=32, patch_size=8, dim=48, depth=2, num_heads=3, num_registers=4)
    model, images = RegisterViT(config, backend="cpu"), torch.randn(2, 3, 32, 32)
    tokens, dim = 21, 48
    linear = 2 * 2 * tokens * (3 + 1 + 4 + 4) * dim**2
    attention = 2 * 2 * 2 * 3 * tokens**2 * 16
    patches = 2 * 2 * 16 * 3 * 64 * dim
    run = torch.compile(model.forward_features, backend="aot_eager") if compiled else model.forward_features
    run(images)  # compiled outside the counter
    with torch.no_grad():
        run(images)
        assert counted(run, images) == 2 * (linear + attention) + patches


@pytest.mark.parametrize("first", ["vitreg_kernels", pytest.param("torch.utils.flop_counter", marks=pytest.mark.slow)])
def test_whichever_is_imported_first(first):
    """Importing this library does not import the counter, which takes long; importing the counter later is enough."""
    second = {"vitreg_kernels", "torch.utils.flop_counter"} - {first}
    code = f"""
import sys
import {first}
assert {first != "vitreg_kernels"} or "torch.utils.flop_counter" not in sys.modules
import {second.pop()}
import torch
from torch.utils.flop_counter import FlopCounterMode
from vitreg_kernels.functional import register_attention
x = torch.ones(1, 1, 4, 8)
with FlopCounterMode(display=False) as counter:
    register_attention(x, x, x, backend="cpu")
assert counter.get_total_flops() == 2 * 2 * 4 * 4 * 8, counter.get_total_flops()
"""
    subprocess.run([sys.executable, "-c", code], check=True)
