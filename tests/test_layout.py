"""TokenLayout: counts, slices, splitting, errors, and that it traces."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from vitreg_kernels.layout import TokenLayout


def marked_tokens(batch, cls_tokens, registers, patches, channels=3):
    """``[B, N, C]`` whose values say the group: 1 CLS, 2 register, 3 patch."""
    groups = torch.tensor([1.0] * cls_tokens + [2.0] * registers + [3.0] * patches)
    return groups[None, :, None].repeat(batch, 1, channels)


@pytest.mark.parametrize(
    ("cls_tokens", "registers", "patches"), [(1, 4, 16), (2, 1, 3), (0, 4, 5), (1, 0, 5), (0, 0, 2)]
)
def test_split_finds_every_group_and_copies_nothing(cls_tokens, registers, patches):
    layout = TokenLayout(patches, num_registers=registers, num_cls_tokens=cls_tokens)
    x = marked_tokens(2, cls_tokens, registers, patches)
    groups = layout.split(x)
    assert [g.shape[1] for g in groups] == [cls_tokens, registers, patches]
    for group, mark in zip(groups, (1, 2, 3), strict=True):
        assert (group == mark).all()
    x.fill_(7)
    assert all((group == 7).all() for group in groups)
    assert groups.patches is groups[2]
    assert layout.num_prefix_tokens == cls_tokens + registers
    assert layout.num_tokens == x.shape[1]


def test_slices_partition_the_tokens():
    layout = TokenLayout(6, num_registers=3, num_cls_tokens=2)
    tokens = list(range(layout.num_tokens))
    assert tokens[layout.cls] + tokens[layout.registers] + tokens[layout.patches] == tokens
    assert (tokens[layout.cls], tokens[layout.registers]) == ([0, 1], [2, 3, 4])


def test_strip_registers():
    layout = TokenLayout(num_registers=4)
    stripped = layout.strip_registers(marked_tokens(2, 1, 4, 9))
    assert stripped.shape == (2, 10, 3)
    assert (stripped[:, 0] == 1).all()
    assert (stripped[:, 1:] == 3).all()
    x = torch.rand(2, 5, 3)
    assert TokenLayout(num_registers=0).strip_registers(x) is x


def test_one_number_a_token_splits_too():
    groups = TokenLayout().split(torch.arange(8.0)[None])
    assert groups.registers.tolist() == [[1, 2, 3, 4]]


def test_without_num_patches_any_length_fits():
    layout = TokenLayout()
    for patches in (0, 1, 50):
        assert layout.split(torch.rand(1, 5 + patches, 2)).patches.shape[1] == patches


def test_grid_gives_num_patches():
    layout = TokenLayout(grid=(3, 5))
    assert (layout.num_patches, layout.num_tokens, layout.grid) == (15, 20, (3, 5))
    assert TokenLayout(15, grid=[3, 5]) == layout


def test_is_a_frozen_value():
    layout = TokenLayout(grid=(3, 5), num_registers=2)
    assert layout == TokenLayout(15, num_registers=2, grid=(3, 5))
    assert len({layout, copy.deepcopy(layout), pickle.loads(pickle.dumps(layout))}) == 1
    with pytest.raises(AttributeError):
        layout.num_registers = 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_registers": -1}, "num_registers must be a non-negative int, not -1"),
        ({"num_registers": 4.0}, "num_registers must be a non-negative int, not 4.0"),
        ({"num_cls_tokens": True}, "num_cls_tokens must be a non-negative int, not True"),
        ({"num_patches": "196"}, "num_patches must be a non-negative int or None, not '196'"),
        ({"grid": 14}, r"grid must be \(rows, columns\), two non-negative ints, not 14"),
        ({"grid": (14, -14)}, r"not \(14, -14\)"),
        ({"grid": (14, 14), "num_patches": 195}, "num_patches=195 disagrees with grid=14x14, which has 196 patches"),
    ],
)
def test_bad_layouts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(**arguments)


def test_num_tokens_needs_the_patches():
    with pytest.raises(ValueError, match="give num_patches or grid"):
        _ = TokenLayout().num_tokens


@pytest.mark.parametrize("method", ["split", "strip_registers"])
@pytest.mark.parametrize(
    ("layout", "shape", "message"),
    [
        (TokenLayout(), (5,), r"tokens along dimension 1, not of shape \(5,\)"),
        (TokenLayout(), (2, 4, 3), "x has 4 tokens, too few for the layout's 1 CLS and 4 register tokens"),
        (TokenLayout(9), (2, 13, 3), "x has 13 tokens where the layout has 14: .* and 9 patches"),
        (TokenLayout(9), (2, 15, 3), "x has 15 tokens where the layout has 14"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(method, layout, shape, message):
    with pytest.raises(ValueError, match=message):
        getattr(layout, method)(torch.zeros(shape))


@pytest.mark.parametrize("num_patches", [None, 9])
def test_traces_whole(num_patches):
    layout = TokenLayout(num_patches)

    def pooled(x):
        groups = layout.split(x)
        built_inside = TokenLayout(num_registers=4).strip_registers(x)
        return groups.patches.mean(1) + groups.cls.sum(1) + layout.strip_registers(x).sum(1) - built_inside.sum(1)

    x = torch.rand(2, 14, 3)
    torch.testing.assert_close(torch.compile(pooled, backend="eager", fullgraph=True)(x), pooled(x))
