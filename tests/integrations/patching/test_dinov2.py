"""DINOv2's attention modules, patched: the same numbers, alone and of crops in one row."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from tests.integrations.patching import dinov2_like as dinov2
from tests.integrations.patching.judge import (
    DTYPES,
    assert_nothing_else_changes,
    assert_same_numbers,
    scrambled,
)
from vitreg_kernels import patch, patched
from vitreg_kernels.measure.accuracy import same_bits

DIM, HEADS = 64, 4
LENGTHS = (21, 21, 9, 9, 9)  # tokens of two global and three local crops


def with_module_dropout(*args, **options):
    """As in DINOv2's older code and in the copies of it."""
    module = dinov2.Attention(*args, **options)
    module.attn_drop = nn.Dropout(module.attn_drop)
    return module


def crops():
    return [torch.randn(2, 21, DIM), torch.randn(3, 9, DIM)]


def block(**options):
    return scrambled(dinov2.NestedTensorBlock(DIM, HEADS, qkv_bias=True, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "make",
    [
        partial(dinov2.MemEffAttention, qkv_bias=True),
        partial(dinov2.MemEffAttention, proj_bias=False),
        partial(dinov2.Attention, qkv_bias=True),
        with_module_dropout,
    ],
)
def test_same_output_and_gradients(make, dtype):
    assert_same_numbers(scrambled(make(DIM, HEADS)), torch.randn(2, 21, DIM), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_crops_in_one_row_are_one_call(dtype):
    module, mask = scrambled(dinov2.MemEffAttention(DIM, HEADS, qkv_bias=True)), dinov2.BlockDiagonalMask(LENGTHS)
    ((_, _, options, _),) = assert_same_numbers(module, torch.randn(1, sum(LENGTHS), DIM), {"attn_bias": mask}, dtype)
    assert options["cu_seqlens"] is mask.q_seqinfo.seqstart  # read where it lies
    assert options["max_seqlen"] == 21


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_list_of_crops_through_a_block(dtype, training):
    assert_same_numbers(block().train(training), crops(), dtype=dtype)


@pytest.mark.parametrize("training", [True, False])
def test_a_list_of_crops_is_one_crop_at_a_time(training):
    module, images = block().train(training), crops()
    parameters = list(module.parameters())
    with patched(module):
        together = [crop for batch in module(images) for crop in batch]
        alone = [module(crop[None])[0] for batch in images for crop in batch]
        gradients = [
            torch.autograd.grad(sum(crop.square().sum() for crop in found), parameters) for found in (together, alone)
        ]
    assert len(together) == 5
    for ours, theirs in zip((*together, *gradients[0]), (*alone, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize("images", [lambda: torch.randn(8, 21, DIM), crops])
def test_stochastic_depth_attends_to_a_part_of_the_images(images):
    assert_same_numbers(block(drop_path=0.5).train(), images())


@pytest.mark.parametrize("case", ["causal", "causal mask", "other keys"])
def test_what_is_more_than_images_apart_stays_the_modules_own(case, calls):
    x = torch.randn(1, sum(LENGTHS), DIM)
    if case == "causal":
        module, inputs = dinov2.Attention(DIM, HEADS), {"is_causal": True}
    else:
        mask = (dinov2.BlockDiagonalCausalMask if case == "causal mask" else dinov2.BlockDiagonalMask)(LENGTHS)
        if case == "other keys":
            mask.k_seqinfo.seqstart_py = [0, sum(LENGTHS)]
        module, inputs = dinov2.MemEffAttention(DIM, HEADS), {"attn_bias": mask}
    expected = module(x, **inputs)
    with patched(module):
        assert same_bits(module(x, **inputs), expected)
    assert not calls


def test_is_causal_may_be_given_by_place():
    module, x = dinov2.Attention(DIM, HEADS), torch.randn(2, 9, DIM)
    with patched(module):
        assert same_bits(module(x, True), dinov2.Attention.forward(module, x, True))
        torch.testing.assert_close(module(x, False), dinov2.Attention.forward(module, x, False))


@pytest.mark.parametrize("make", [dinov2.Attention, with_module_dropout])
def test_dropout_is_the_modules_own(make, calls):
    module, x = make(DIM, HEADS, attn_drop=0.25).train(), torch.randn(2, 9, DIM)
    with patched(module):
        module(x)
        module.eval()(x)
    assert [call.options["dropout_p"] for call in calls] == [0.25, 0.0]


def test_whether_weights_are_dropped_without_xformers_is_left_to_the_class(calls):
    module, x = dinov2.MemEffAttention(DIM, HEADS, attn_drop=0.25).train(), torch.randn(1, sum(LENGTHS), DIM)
    for inputs in ({}, {"attn_bias": dinov2.BlockDiagonalMask(LENGTHS)}):
        torch.manual_seed(1)
        expected = module(x, **inputs)
        with patched(module):
            torch.manual_seed(1)
            assert same_bits(module(x, **inputs), expected)
            assert not calls
    with patched(module):
        module.eval()(x)
    assert len(calls) == 1


class Recorder(nn.Module):
    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, weights):
        self.seen.append(weights.shape)
        return weights


@pytest.mark.parametrize("way", ["hook", "module"])
def test_whoever_looks_at_the_probabilities_sees_them(way):
    module, recorder = with_module_dropout(DIM, HEADS), Recorder()
    with patched(module):
        if way == "hook":
            module.attn_drop.register_forward_hook(lambda _, __, weights: recorder(weights))
        else:
            module.attn_drop = recorder
        module(torch.randn(2, 9, DIM))
    assert recorder.seen == [(2, HEADS, 9, 9)]


def test_nothing_else_changes():
    model = dinov2.DinoVisionTransformer([block(drop_path=0.5)], 4)
    x = torch.randn(4, 21, DIM)

    def call(model):
        torch.manual_seed(1)
        return model.blocks[0](x)

    assert_nothing_else_changes(model.train(), call)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_attend_by_themselves(copied, calls):
    module, images = block(), crops()
    patch(module)
    other = copied(module)
    expected = module(images)
    scrambled(module)
    assert all(map(same_bits, other(images), expected))
    assert len(calls) == 2


@pytest.mark.parametrize("registers", [0, 4])
def test_the_models_prefix_is_found(registers):
    report = patch(dinov2.DinoVisionTransformer([block(), block()], registers))
    assert report.num_prefix_tokens == 1 + registers
    assert [(entry.name, entry.cls) for entry in report.patched] == [
        ("blocks.0.attn", "MemEffAttention"),
        ("blocks.1.attn", "MemEffAttention"),
    ]


class WithNorms(dinov2.MemEffAttention):
    """As in VGGT, whose class has the same name."""

    def __init__(self, *args):
        super().__init__(*args)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()


class WithPositions(dinov2.MemEffAttention):
    def forward(self, x, attn_bias=None, pos=None):
        raise NotImplementedError


WithPositions.__name__ = "MemEffAttention"


class Attention(nn.Module):
    """As in DINO and MAE: DINOv2's name and parts, in a file without the other class."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.scale = num_heads, (dim // num_heads) ** -0.5
        self.qkv, self.attn_drop = nn.Linear(dim, 3 * dim), nn.Dropout(0.0)
        self.proj, self.proj_drop = nn.Linear(dim, dim), nn.Dropout(0.0)

    def forward(self, x):
        return x, "its attention"


def scaled(module):
    module.scale = 1.0
    return module


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (WithNorms, "has q_norm, k_norm, as the class known here has not"),
        (WithPositions, "its forward takes pos, which is not known here"),
        (Attention, "not a class known here"),
        (lambda *args: scaled(dinov2.Attention(*args)), "its scale is 1, not 1 / sqrt(head dim)"),
    ],
)
def test_what_is_other_than_dinov2s_is_left_alone(make, reason):
    report = patch(make(DIM, HEADS))
    assert [entry.reason for entry in report.left] == [reason]
    assert not report.patched


def test_compiles_without_a_break(dynamo):
    module, x = scrambled(dinov2.MemEffAttention(DIM, HEADS)), torch.randn(1, sum(LENGTHS), DIM)
    mask = dinov2.BlockDiagonalMask(LENGTHS)
    patch(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, attn_bias=mask), module(x, attn_bias=mask))
