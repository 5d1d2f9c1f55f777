"""perception_models' vision encoders, patched: the same numbers, the rotation within the op where it can be."""

from __future__ import annotations

import pytest
import torch

from tests.integrations.patching.judge import (
    DTYPES,
    assert_nothing_else_changes,
    assert_same_numbers,
    op_calls,
    scrambled,
)
from tests.integrations.patching.perception_models_like import Rope2D, SelfAttention, VisionTransformer
from vitreg_kernels import TokenLayout, patch
from vitreg_kernels.integrations import residual_stream
from vitreg_kernels.integrations.patching.method import fused_method

DIM, HEADS, GRID = 64, 2, (3, 4)


def rotation(*, cls_token=True, dim=DIM // HEADS):
    rope = Rope2D(dim, cls_token)
    rope.update_grid(torch.device("cpu"), *GRID)
    return rope


def tokens(*, cls_token=True):
    return torch.randn(2, 12 + cls_token, DIM)


def encoder(**options):
    return scrambled(VisionTransformer(8, DIM, 2, HEADS, **options))


def images():
    return torch.randn(2, 3, 24, 32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cls_token", [True, False])
def test_same_output_and_gradients(cls_token, dtype):
    module = scrambled(SelfAttention(DIM, HEADS, rotation(cls_token=cls_token)))
    assert_same_numbers(module, tokens(cls_token=cls_token), dtype=dtype)


class Halves:
    """A rotation that is not the library's own, though its angles have the same name."""

    def __init__(self):
        self.freq = rotation().freq

    def __call__(self, q, k):
        def turned(x):
            return (x * self.freq.cos() + x.roll(x.shape[-1] // 2, -1) * self.freq.sin()).to(x.dtype)

        return turned(q), turned(k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rope", [None, rotation(dim=24), Halves()], ids=["none", "part of each head", "another"])
def test_other_rotations_are_carried_out_before(rope, dtype):
    module, x = scrambled(SelfAttention(DIM, HEADS, rope)), tokens()
    assert_same_numbers(module, x, dtype=dtype)
    patch(module)
    with op_calls() as calls:
        module(x.to(dtype))
    assert [call.options.get("rope") for call in calls] == [None]


def test_the_rotation_is_the_ops():
    module = scrambled(SelfAttention(DIM, HEADS, rotation()))
    patch(module)
    with op_calls() as calls:
        module(tokens())
    ((_, _, options, _),) = calls
    assert options["rope"].interleaved
    assert options["rope"].cos.shape == (12, DIM // HEADS)
    assert options["num_prefix_tokens"] == 1


@pytest.mark.parametrize("rope", [rotation(), None, Halves()], ids=["rotated", "not rotated", "rotated before"])
def test_a_mask_is_left_unused_as_in_the_class(rope):
    module, x = scrambled(SelfAttention(DIM, HEADS, rope)), tokens()
    patch(module)
    mask = torch.full((13, 13), -torch.inf)
    assert torch.equal(module(x, attn_mask=mask), module(x))


def test_out_proj_is_read_and_never_called():
    module, ran = scrambled(SelfAttention(DIM, HEADS)), []
    module.out_proj.register_forward_hook(lambda *args: ran.append(args))
    patch(module)
    module(tokens())
    assert not ran


@torch.no_grad()
def test_statistics_are_of_the_turned_queries():
    module, x, seen = scrambled(SelfAttention(DIM, HEADS, rotation())), tokens(), []
    patch(module, num_prefix_tokens=1)
    fused_method(module).op.takers.append(("prefix_attention", seen.append))
    module(x)
    projected = torch.nn.functional.linear(x, module.in_proj_weight, module.in_proj_bias)
    query, key, _ = projected.unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
    query, key = module.rope(query, key)
    torch.testing.assert_close(seen[-1], (query[:, :, :1] @ key.mT * module.scale).softmax(-1))


@pytest.mark.parametrize("cls_token", [True, False])
def test_an_encoder_keeps_its_features_and_gradients(cls_token):
    assert_same_numbers(encoder(use_cls_token=cls_token), images(), calls=2)


def test_nothing_else_of_an_encoder_changes():
    x = images()
    assert_nothing_else_changes(encoder(use_cls_token=True), lambda model: model(x))


@pytest.mark.parametrize("cls_token", [True, False])
def test_what_is_known_of_an_encoder(cls_token):
    model = encoder(use_cls_token=cls_token)
    report = patch(model)
    assert [module.name for module in report.patched] == [f"transformer.resblocks.{i}.attn" for i in (0, 1)]
    assert [module.name for module in report.left] == ["attn_pool.attn"]
    assert report.num_prefix_tokens == cls_token
    stream = residual_stream(model)
    assert [module for _, module in stream.layers] == list(model.transformer.resblocks)
    assert stream.layout == TokenLayout(num_registers=0, num_cls_tokens=int(cls_token))


@pytest.mark.usefixtures("dynamo")
def test_compiles_to_one_graph():
    module, x = scrambled(SelfAttention(DIM, HEADS, rotation())), tokens()
    patch(module)
    torch.testing.assert_close(torch.compile(module, fullgraph=True, backend="eager")(x), module(x))
