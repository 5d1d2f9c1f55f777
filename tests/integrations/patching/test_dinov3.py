"""DINOv3's attention modules, patched: the same numbers, with a rotation of any form and of crops in a list."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from tests.integrations.patching import dinov3_like as dinov3
from tests.integrations.patching.judge import (
    DTYPES,
    assert_nothing_else_changes,
    assert_same_numbers,
    called,
    converted,
    in_autocast,
    scrambled,
)
from vitreg_kernels import patch, patched
from vitreg_kernels.measure.accuracy import same_bits

DIM, HEADS, PREFIX = 64, 4, 5


def rope(*shape: int, patches: int = 16, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Sines and cosines, ``[*shape, M, D]``."""
    angles = (torch.rand(*shape, patches, DIM // HEADS // 2) * 6).repeat_interleave(2, -1)
    angles = torch.cat((angles[..., ::2], angles[..., 1::2]), -1)
    return angles.sin().to(dtype), angles.cos().to(dtype)


def attention(**options):
    module = dinov3.SelfAttention(DIM, HEADS, qkv_bias=True, **options)
    if options.get("mask_k_bias"):
        mask = module.qkv.bias_mask.fill_(1.0)
        mask[DIM : 2 * DIM] = 0.0
    return scrambled(module)


def block(**options):
    made = dinov3.SelfAttentionBlock(DIM, HEADS, **options)
    made.attn = attention()
    return scrambled(made)


def crops():
    return [torch.randn(2, 21, DIM), torch.randn(4, 14, DIM)]


def ropes_of_crops(*shapes, dtype=torch.float32):
    return [rope(*shape, patches=m, dtype=dtype) for shape, m in zip(shapes or ((), ()), (16, 9), strict=True)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask_k_bias", [False, True])
@pytest.mark.parametrize(
    ("make_rope", "way"),
    [
        (lambda: None, "register_attention_qkv"),
        (rope, "register_attention_qkv"),
        (lambda: rope(2, 1), "register_attention_qkv"),  # by image
        (lambda: rope(1, 1), "register_attention_qkv"),
        (lambda: rope(HEADS), "register_attention"),
        (lambda: rope(2, HEADS), "register_attention"),
    ],
    ids=["none", "rope", "by image", "of any image", "by head", "by image and head"],
)
def test_same_output_and_gradients(make_rope, way, mask_k_bias, dtype):
    module, rotation = attention(mask_k_bias=mask_k_bias), make_rope()
    ((taken, _, options, _),) = assert_same_numbers(module, torch.randn(2, 21, DIM), {"rope": rotation}, dtype)
    assert taken == way
    if rotation is not None:
        assert options["num_prefix_tokens"] == PREFIX
        assert (options["rope"] is None) == (way == "register_attention")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bf16_rotation_of_any_model(dtype):
    """DINOv3's default. The exact result is that of the same rounded cosines and sines."""
    assert_same_numbers(attention(), torch.randn(2, 21, DIM), {"rope": rope(dtype=torch.bfloat16)}, dtype)


def test_a_bf16_rotation_is_closer_to_exact_arithmetic_than_the_modules_own():
    """The module's own rounds query and key to bf16 as well, the prefix among them."""
    module, x, rotation = attention(), torch.randn(2, 21, DIM), rope(dtype=torch.bfloat16)
    exact = copy.deepcopy(module).double()(x.double(), rope=converted(rotation, torch.float64))
    own = (module(x, rope=rotation) - exact).abs().max()
    with patched(module):
        ours = (module(x, rope=rotation) - exact).abs().max()
    assert own > 1e-3
    assert ours < 1e-5


def test_autocast():
    assert_same_numbers(
        attention(), torch.randn(2, 21, DIM), {"rope": rope(dtype=torch.bfloat16)}, call=in_autocast(called)
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_a_list_of_crops_through_a_block(training, dtype):
    inputs = {"rope_or_rope_list": ropes_of_crops()}
    assert_same_numbers(block().train(training), crops(), inputs, dtype, calls=2)


@pytest.mark.parametrize("shapes", [(), ((2, 1), (4, 1)), ((HEADS,), (HEADS,))], ids=["plain", "by image", "by head"])
def test_stochastic_depth_attends_to_a_part_of_the_images(shapes):
    """In lists, and with each image's own rotation where there is one."""
    inputs = {"rope_or_rope_list": ropes_of_crops(*shapes)}
    assert_same_numbers(block(drop_path=0.5).train(), crops(), inputs, calls=2)


@pytest.mark.parametrize("training", [True, False])
def test_a_list_of_crops_is_one_crop_at_a_time(training):
    module, images, ropes = attention().train(training), crops(), ropes_of_crops()
    parameters = list(module.parameters())
    with patched(module):
        together = [crop for batch in module.forward_list(images, rope_list=ropes) for crop in batch]
        alone = [module(crop[None], rope=rotation)[0] for i, rotation in enumerate(ropes) for crop in images[i]]
        gradients = [
            torch.autograd.grad(sum(crop.square().sum() for crop in found), parameters) for found in (together, alone)
        ]
    assert len(together) == 6
    for ours, theirs in zip((*together, *gradients[0]), (*alone, *gradients[1]), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


@pytest.mark.parametrize(
    ("prefix", "patches", "message"),
    [
        (PREFIX, 15, "15 rows for 16 patches"),
        (PREFIX - 1, 16, "16 rows for 17 patches"),
        (None, 22, "22 rows for 21 patches"),
    ],
)
def test_a_rotation_of_other_tokens_is_an_error(prefix, patches, message):
    module = attention()
    patch(module, num_prefix_tokens=prefix)
    with pytest.raises(ValueError, match=message):
        module(torch.randn(2, 21, DIM), rope=rope(patches=patches))


def test_a_bias_is_refused_as_by_the_class():
    module = attention()
    with patched(module), pytest.raises(AssertionError):
        module(torch.randn(2, 21, DIM), attn_bias=object())


def test_a_learnt_rotation_gets_its_gradient():
    module, x = attention(), torch.randn(2, 21, DIM)
    sin, cos = (part.requires_grad_() for part in rope())
    expected = torch.autograd.grad(module(x, rope=(sin, cos)).square().sum(), (sin, cos))
    with patched(module):
        actual = torch.autograd.grad(module(x, rope=(sin, cos)).square().sum(), (sin, cos))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_nothing_else_changes():
    model = dinov3.DinoVisionTransformer([block(drop_path=0.5)], 4)
    x, rotation = torch.randn(4, 21, DIM), rope()

    def call(model):
        torch.manual_seed(1)
        return model.blocks[0](x, rotation)

    assert_nothing_else_changes(model.train(), call)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_attend_by_themselves(copied, calls):
    module, x = attention(), torch.randn(2, 21, DIM)
    patch(module)
    other = copied(module)
    expected = module(x)
    scrambled(module)
    assert same_bits(other(x), expected)
    assert len(calls) == 2


@pytest.mark.parametrize("registers", [0, 4])
def test_the_models_prefix_is_found(registers):
    report = patch(dinov3.DinoVisionTransformer([block()], registers))
    assert report.num_prefix_tokens == 1 + registers
    assert [(entry.name, entry.cls) for entry in report.patched] == [("blocks.0.attn", "SelfAttention")]


class Turning(dinov3.SelfAttention):
    def apply_rope(self, q, k, rope):
        raise NotImplementedError


class Widened(dinov3.SelfAttention):
    def __init__(self, *args):
        super().__init__(*args)
        self.gate = nn.Parameter(torch.ones(DIM))


class SelfAttention(nn.Module):
    """Of a name that many have."""


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Turning, "Turning has an apply_rope of its own"),
        (Widened, "has gate, as the class known here has not"),
        (lambda *args: SelfAttention(), "not a class known here"),
        (dinov3.CausalSelfAttention, "not a class known here"),
    ],
)
def test_what_is_other_than_dinov3s_is_left_alone(make, reason):
    report = patch(make(DIM, HEADS))
    assert [entry.reason for entry in report.left] == [reason]
    assert not report.patched


def test_a_block_compiles_without_a_break(dynamo):
    module, x, rotation = block(drop_path=0.5).train(), torch.randn(4, 21, DIM), rope(dtype=torch.bfloat16)
    patch(module, num_prefix_tokens=PREFIX)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    found = []
    for model in (module, compiled):
        torch.manual_seed(1)
        output = model(x, rotation)
        output.square().sum().backward()
        found.append((output, module.attn.qkv.weight.grad.clone()))
        module.zero_grad()
    torch.testing.assert_close(*found)


def test_a_list_of_crops_compiles_without_a_break(dynamo):
    """By a backend that could not read in a compiled graph where the images of a pack begin."""
    module = block(drop_path=0.5).train()
    patch(module, num_prefix_tokens=PREFIX, backend="sdpa")
    inputs = crops(), ropes_of_crops(dtype=torch.bfloat16)
    found = []
    for model in (module, torch.compile(module, fullgraph=True, backend="eager")):
        torch.manual_seed(1)
        found.append(model(*inputs))
    torch.testing.assert_close(*found)


def test_torch_fx_traces_the_modules_own_computation():
    module, x = attention(), torch.randn(2, 21, DIM)
    expected = module(x)
    patch(module)
    traced = torch.fx.symbolic_trace(module, concrete_args={"attn_bias": None, "rope": None})
    assert same_bits(traced(x, None, None), expected)
