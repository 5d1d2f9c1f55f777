"""Rows of attention against softmax(Q K^T) in fp64, with CLS and registers that look at known patches."""

from __future__ import annotations

import math

import pytest
import torch

from vitreg_kernels import RegisterViT, TokenLayout, ViTConfig
from vitreg_kernels.analysis.attention import attention_maps, colour_limits, prefix_names, shares, sinks
from vitreg_kernels.analysis.record import record
from vitreg_kernels.functional import register_attention

GRID = (3, 5)
LAYOUT = TokenLayout(num_registers=2, grid=GRID)
PREFIX, TOKENS = 3, 18


def attended(query, key):
    """All probabilities in fp64, and those of the prefix and the mean as the kernels give them."""
    every = (query.double() @ key.double().mT / math.sqrt(query.shape[-1])).softmax(-1)
    _, outputs = register_attention(
        query, key, key, num_prefix_tokens=PREFIX, outputs=("prefix_attention", "received_attention")
    )
    return every, outputs.prefix_attention, outputs.received_attention


@pytest.fixture
def tokens():
    return torch.randn(2, 4, TOKENS, 16), torch.randn(2, 4, TOKENS, 16)


def test_maps_are_the_patches_of_each_row(tokens):
    every, rows, _ = attended(*tokens)
    maps = attention_maps(rows, LAYOUT, GRID)
    assert maps.shape == (2, 4, PREFIX, *GRID)
    for row in range(3):
        for column in range(5):
            expected = every[:, :, :PREFIX, PREFIX + 5 * row + column]
            torch.testing.assert_close(maps[..., row, column].double(), expected, rtol=1e-5, atol=1e-7)
    on_prefix = torch.tensor([x.on_prefix for x in shares(rows, LAYOUT, layer=0)])
    torch.testing.assert_close(maps.sum((-1, -2)).mean((0, 1)) + on_prefix, torch.ones(PREFIX), rtol=0, atol=1e-6)


def test_each_token_has_its_own_map(tokens):
    """CLS and registers whose queries are the key of one patch each, by head and on average."""
    query, key = tokens
    key = torch.nn.functional.normalize(key, dim=-1)
    looked_at = [(2, 0), (0, 4), (1, 3)]
    for token, (row, column) in enumerate(looked_at):
        query[:, :, token] = 200.0 * key[:, :, PREFIX + 5 * row + column]
    maps = attention_maps(attended(query, key)[1], LAYOUT, GRID)
    for token, (row, column) in enumerate(looked_at):
        assert (maps[:, :, token, row, column] > 0.9).all()
        assert (maps.mean(1)[:, token, row, column] > 0.9).all()


def test_maps_of_a_recorded_model():
    config = ViTConfig(dim=32, depth=2, num_heads=2, patch_size=4, image_size=(8, 12), num_registers=4)
    model = RegisterViT(config).eval()
    found = record(model, torch.randn(2, 3, 8, 12), attention=[-1], received=[-1])
    rows = found.attention[1]
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 2, 5))
    assert attention_maps(rows, found.layout, found.grid).shape == (2, 2, 5, 2, 3)
    assert [x.tokens for x in shares(rows, found.layout, layer=1)] == ["cls", *(f"register {i}" for i in range(4))]
    assert not sinks(found.received[1], rows).possible.any()


def test_without_a_prefix_there_are_no_maps():
    layout = TokenLayout(num_registers=0, num_cls_tokens=0)
    rows = torch.zeros(2, 4, 0, 15)
    assert attention_maps(rows, layout, GRID).shape == (2, 4, 0, *GRID)
    assert shares(rows, layout, torch.ones(2, 15, dtype=torch.bool), layer=0) == []
    received = torch.full((2, 4, 15), 1 / 15)
    assert not sinks(received, rows).possible.any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 4, 3, 17), r"of 3 CLS and register tokens and 15 patches, not of shape \(2, 4, 3, 17\)"),
        ((2, 4, 1, 18), r"of 3 CLS and register tokens and 15 patches, not of shape \(2, 4, 1, 18\)"),
        ((4, 3, 18), r"not of shape \(4, 3, 18\)"),
    ],
)
def test_attention_of_other_tokens_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        attention_maps(torch.zeros(shape), TokenLayout(num_registers=2), GRID)
    with pytest.raises(ValueError, match=message):
        shares(torch.zeros(shape), LAYOUT, layer=0)


def test_colours_are_of_patches_alone():
    """A register's own norm or share is not on the scale."""
    rows = torch.full((1, 1, PREFIX, TOKENS), 0.01)
    rows[..., 1] = 0.8
    rows[..., 7] = 0.05
    assert colour_limits(attention_maps(rows, LAYOUT, GRID)) == pytest.approx((0.01, 0.05))
    assert colour_limits(torch.tensor([[2.0, math.nan], [math.inf, 5.0]])) == (2.0, 5.0)
    assert colour_limits(torch.full((2, 2), math.nan)) == (0.0, 1.0)


def test_names_follow_the_layout():
    assert prefix_names(LAYOUT) == ["cls", "register 0", "register 1"]
    assert prefix_names(TokenLayout(num_registers=1, num_cls_tokens=2)) == ["cls 0", "cls 1", "register 0"]
    assert prefix_names(TokenLayout(num_registers=0, num_cls_tokens=0)) == []


def test_shares_of_the_prefix_and_of_outliers(tokens):
    every, rows, _ = attended(*tokens)
    outlier = torch.zeros(2, 15, dtype=torch.bool)
    outlier[0, [3, 14]] = True
    outlier[1, 7] = True
    for token, found in enumerate(shares(rows, LAYOUT, outlier, layer=4)):
        of_token = every[:, :, token]
        on_outliers = (of_token[0, :, [6, 17]].sum(-1).sum() + of_token[1, :, 10].sum()) / 8
        assert (found.layer, found.tokens) == (4, prefix_names(LAYOUT)[token])
        assert found.on_prefix == pytest.approx(of_token[..., :PREFIX].sum(-1).mean().item(), rel=1e-5)
        assert found.on_outliers == pytest.approx(on_outliers.item(), rel=1e-5)
        assert found.outliers == pytest.approx(3 / 30)


@pytest.mark.parametrize("outlier", [None, torch.zeros(2, 15, dtype=torch.bool)], ids=["unknown", "none"])
def test_without_outliers_there_is_no_share_on_them(tokens, outlier):
    for found in shares(attended(*tokens)[1], LAYOUT, outlier, layer=0):
        assert (found.on_outliers, found.outliers) == (None, None)


def test_outliers_of_other_patches_are_refused(tokens):
    with pytest.raises(ValueError, match=r"\[B, M\] = \[2, 15\], not of shape \(2, 18\)"):
        shares(attended(*tokens)[1], LAYOUT, torch.zeros(2, TOKENS, dtype=torch.bool), layer=0)


@pytest.mark.parametrize("sharpness", [0.0, 3.0, 8.0, 14.0, 60.0])
def test_bounds_hold_the_share_of_queries(tokens, sharpness):
    """All queries lean towards one token: a register in the first image, a patch in the second."""
    query, key = tokens
    for image, sink in enumerate((1, 11)):
        query[image] += sharpness * torch.nn.functional.normalize(key[image, :, sink : sink + 1], dim=-1)
    every, rows, received = attended(query, key)
    truth = (every >= 0.5).double().mean(2)
    found = sinks(received, rows)
    assert (found.at_least <= truth + 1e-6).all()
    assert (truth <= found.at_most + 1e-6).all()
    assert (truth[found.certain] >= 0.9).all()
    assert found.possible[truth >= 0.9].all()
    if sharpness == 60.0:
        expected = torch.zeros(2, 4, TOKENS, dtype=torch.bool)
        expected[0, :, 1] = expected[1, :, 11] = True
        assert torch.equal(found.certain, expected)
        assert torch.equal(found.possible, expected)
    if sharpness == 0.0:
        assert not found.possible.any()


def test_bounds_worked_by_hand():
    """Of ten queries three are known, one of which looks at token 0; the other seven put .9 on it on average."""
    rows = torch.zeros(1, 1, 3, 10)
    rows[..., 0, 0], rows[..., 1, 0] = 0.75, 0.25
    received = torch.zeros(1, 1, 10)
    received[..., 0] = (0.75 + 0.25 + 7 * 0.9) / 10
    found = sinks(received, rows)
    assert found.at_least[0, 0, 0].item() == pytest.approx((1 + 7 * 0.8) / 10, abs=1e-6)
    assert found.at_most[0, 0, 0].item() == pytest.approx((1 + 7) / 10, abs=1e-6)
    assert not found.at_most[..., 1:].any()


def test_received_and_rows_of_other_tokens_are_refused():
    with pytest.raises(
        ValueError, match=r"same images, heads and tokens, not of shapes \(2, 4, 17\) and \(2, 4, 3, 18\)"
    ):
        sinks(torch.zeros(2, 4, 17), torch.zeros(2, 4, 3, 18))
