"""LOST against a literal loop, worked examples, its traps, and its options."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from vitreg_kernels.analysis import lost as module
from vitreg_kernels.analysis.lost import LostOptions, lost


def literal(features, grid, options, valid):
    """One image, one number at a time: seed, mask, box, share of positive entries. Its own flood fill, no library."""
    rows, columns = grid
    kept = [i for i in range(rows * columns) if valid[i]]
    vectors = {i: features[i] for i in kept}
    if options.center:
        mean = sum(vectors.values()) / len(kept)
        vectors = {i: v - mean for i, v in vectors.items()}
    if options.normalize:
        vectors = {i: F.normalize(v, dim=0) for i, v in vectors.items()}
    gram = {(i, j): float(vectors[i] @ vectors[j]) + options.bias for i in kept for j in kept}
    degree = {i: sum(gram[i, j] > 0 for j in kept if j != i) for i in kept}
    ranked = sorted(kept, key=lambda i: (degree[i], i))
    seed = ranked[0]
    similars = [s for s in ranked[: options.potentials] if gram[seed, s] > 0]
    mask = {i for i in kept if sum(gram[s, i] for s in similars) > 0}

    component, waiting = set(), [seed] if seed in mask else []
    while waiting:
        i = waiting.pop()
        component.add(i)
        row, column = divmod(i, columns)
        beside = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
        inside = {r * columns + c for r, c in beside if 0 <= r < rows and 0 <= c < columns}
        waiting += (inside & mask) - component
    ys, xs = [i // columns for i in component], [i % columns for i in component]
    box = (min(xs), min(ys), max(xs) + 1, max(ys) + 1) if component else None
    ties = sum(degree[i] == degree[seed] for i in kept) > 1
    return seed, mask, box, sum(value > 0 for value in gram.values()) / len(kept) ** 2, ties


def case(index):
    """Whole numbers, so that every order of summing gives the same; many ties, non-square grids, some padding."""
    draw = torch.Generator().manual_seed(index)

    def among(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    grid = (among(1, 7), among(1, 7))
    patches = grid[0] * grid[1]
    features = torch.randint(-2, 3, (1, patches, among(1, 6)), generator=draw).float()
    options = LostOptions(potentials=among(1, 12), bias=float(among(-2, 3)))
    valid = torch.rand(1, patches, generator=draw) < (1.0 if index % 2 else 0.7)
    valid[0, among(0, patches)] = True
    return features, grid, options, valid


def test_a_literal_loop_gives_the_same():
    """In 200 random cases, of which many have several patches of the lowest degree, no box, or the whole image."""
    seen = {"ties": 0, "none": 0, "whole": 0}
    for index in range(200):
        features, grid, options, valid = case(index)
        seed, mask, box, share, ties = literal(features[0], grid, options, valid[0])
        (found,) = lost(features, grid, options, valid=valid)
        assert (found.seed, found.box) == (seed, box), index
        assert set(found.mask.nonzero().flatten().tolist()) == mask, index
        assert found.positive_share == pytest.approx(share, abs=1e-12)
        seen["ties"] += ties
        seen["none"] += box is None
        seen["whole"] += box == (0, 0, grid[1], grid[0])
    assert min(seen.values()) >= 10, seen


def test_a_literal_loop_gives_the_same_of_centred_features():
    options = LostOptions(center=True, normalize=True, bias=0.05, potentials=9)
    for index in range(40):
        draw = torch.Generator().manual_seed(1000 + index)
        features = torch.randn(1, 5 * 7, 6, generator=draw, dtype=torch.float64)
        valid = torch.rand(1, 35, generator=draw) < 0.8
        seed, mask, box, _, _ = literal(features[0], (5, 7), options, valid[0])
        (found,) = lost(features, (5, 7), options, valid=valid)
        assert (found.seed, found.box, set(found.mask.nonzero().flatten().tolist())) == (seed, box, mask), index


def test_four_by_four_by_hand():
    """An object of 3 patches (a), a patch like it but apart (b), and 12 of background, which resemble each other.

        . . . b
        . a . .
        . a a .
        . . . .

    The object's patches resemble 3 others, background 11. The seed is the first of degree 3, which is b: its component
    is b alone. Without b, it is the object.
    """
    features = torch.tensor([0.0, 1.0]).repeat(16, 1)
    features[[3, 5, 9, 10]] = torch.tensor([1.0, 0.0])
    (found,) = lost(features[None], (4, 4))
    assert (found.seed, found.box) == (3, (3, 0, 4, 1))
    assert found.mask.nonzero().flatten().tolist() == [3, 5, 9, 10]
    assert found.positive_share == (4 * 4 + 12 * 12) / 16**2

    features[3] = torch.tensor([0.0, 1.0])
    (found,) = lost(features[None], (4, 4))
    assert (found.seed, found.box) == (5, (1, 1, 3, 3))


def test_the_similars_decide_and_not_the_seed_alone():
    """Patch 3 is unlike the seed, 0, but so much like 1 that the sum over both takes it in.

    By rising degree they are 0, 3, 1, 2, 4, 5: 1 is among the potentials if there are three of them.
    """
    features = torch.tensor([[[1.0, 0.0], [1.0, 3.0], [-1.0, -3.0], [-1.0, 1.0], [-1.0, -2.0], [-1.0, -2.0]]])
    (alone,) = lost(features, (1, 6), LostOptions(potentials=2))
    (helped,) = lost(features, (1, 6), LostOptions(potentials=3))
    assert (alone.seed, alone.mask.nonzero().flatten().tolist()) == (0, [0, 1])
    assert (helped.seed, helped.mask.nonzero().flatten().tolist()) == (0, [0, 1, 3])


@pytest.mark.parametrize("grid", [(9, 14), (14, 9)])
def test_a_planted_object_is_found_to_the_patch(grid):
    draw = torch.Generator().manual_seed(0)
    truth = torch.zeros(grid, dtype=torch.bool)
    truth[3:7, 2:8] = True
    directions = torch.nn.init.orthogonal_(torch.empty(2, 32), generator=draw)
    features = directions[truth.flatten().long()] * 5 + torch.randn(truth.numel(), 32, generator=draw) * 0.03
    for options in (LostOptions(bias=-1.0), LostOptions.CENTRED):
        (found,) = lost(features[None], grid, options)
        assert found.box == (2, 3, 8, 7)
        assert torch.equal(found.mask, truth.flatten())


@pytest.mark.parametrize("options", [LostOptions.OFFICIAL, LostOptions.CENTRED])
def test_identical_patches_are_the_whole_image_from_the_first(options):
    (found,) = lost(torch.ones(1, 12, 4), (3, 4), options)
    assert (found.seed, found.box, found.positive_share) == (0, (0, 0, 4, 3), 1.0)


def test_if_every_patch_resembles_every_other_it_is_the_whole_image():
    """Which is what it means that a Gram matrix is positive: the share says so."""
    features = torch.rand(2, 30, 8, generator=torch.Generator().manual_seed(0)) + 0.1
    for found in lost(features, (5, 6)):
        assert (found.seed, found.box, found.positive_share) == (0, (0, 0, 6, 5), 1.0)


def test_a_seed_that_is_background_gives_no_box():
    """A bias below all products: no patch resembles even itself."""
    (found,) = lost(torch.eye(4)[None], (2, 2), LostOptions(bias=-2.0))
    assert found.box is None
    assert not found.mask.any()
    assert found.positive_share == 0


def test_patches_meet_at_edges_and_not_at_corners():
    features = torch.tensor([[1.0, 0.0]] * 4)
    features[[0, 3]] = torch.tensor([0.0, 1.0])
    (found,) = lost(features[None], (2, 2))
    assert (found.seed, found.box, found.mask.tolist()) == (0, (0, 0, 1, 1), [True, False, False, True])


@pytest.mark.parametrize("options", [LostOptions.OFFICIAL, LostOptions.CENTRED, LostOptions(bias=3.0)])
def test_padding_changes_nothing(options):
    """A row of patches more, which hold anything, even NaN: the same as without it."""
    features = torch.randn(3, 20, 6, generator=torch.Generator().manual_seed(1))
    padded = torch.cat([features, torch.full((3, 5, 6), 50.0)], dim=1)
    padded[0, 20:] = float("nan")
    valid = torch.ones(3, 25, dtype=torch.bool)
    valid[:, 20:] = False
    for own, other in zip(lost(features, (4, 5), options), lost(padded, (5, 5), options, valid=valid), strict=True):
        assert (own.box, own.seed, own.positive_share) == (other.box, other.seed, other.positive_share)
        assert torch.equal(torch.nn.functional.pad(own.mask, (0, 5)), other.mask)


def test_a_batch_is_as_its_images():
    features = torch.randint(-2, 3, (5, 24, 4), generator=torch.Generator().manual_seed(2)).float()
    together = lost(features, (4, 6))
    for i, found in enumerate(together):
        (alone,) = lost(features[i : i + 1], (4, 6))
        assert found[:2] == alone[:2]
        assert torch.equal(found.mask, alone.mask)
    assert lost(features[:0], (4, 6)) == []


@pytest.mark.parametrize("entries", [1, 50, 120])
def test_blocks_of_rows_change_nothing(monkeypatch, entries):
    features = torch.randint(-2, 3, (2, 24, 4), generator=torch.Generator().manual_seed(3)).float()
    valid = torch.rand(2, 24, generator=torch.Generator().manual_seed(4)) < 0.8
    whole = lost(features, (4, 6), LostOptions(bias=1.0), valid=valid)
    monkeypatch.setattr(module, "_BLOCK", entries)
    for one, other in zip(whole, lost(features, (4, 6), LostOptions(bias=1.0), valid=valid), strict=True):
        assert (one.box, one.seed, one.positive_share) == (other.box, other.seed, other.positive_share)


def test_the_gram_matrix_is_never_held_whole(monkeypatch):
    """The largest tensor that is made holds a block of rows; of 400 patches, not their 160 000 entries."""
    largest = []

    class Sizes(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                largest.append(result.numel())
            return result

    monkeypatch.setattr(module, "_BLOCK", 20_000)
    with Sizes():
        lost(torch.randn(1, 400, 8), (20, 20), LostOptions.CENTRED)
    assert 10_000 < max(largest) <= 20_000


@pytest.mark.parametrize(
    ("features", "grid", "valid", "message"),
    [
        (torch.zeros(4, 3), (2, 2), None, r"must be \[B, M, C\].*\[4, 3\]"),
        (torch.zeros(1, 5, 3), (2, 2), None, "features of 5 tokens do not fill a grid of 2 x 2 = 4.*registers"),
        (torch.zeros(1, 4, 3), (2, 2), torch.ones(1, 4), "valid must be bool"),
        (torch.zeros(1, 4, 3), (2, 2), torch.ones(4, dtype=torch.bool), r"valid must be bool \[1, 4\]"),
        (torch.zeros(2, 4, 3), (2, 2), torch.tensor([[True] * 4, [False] * 4]), "image 1 has 0 valid patches"),
        (torch.tensor([[[0.0]] * 3 + [[float("inf")]]]), (2, 2), None, "features of image 0 are not finite"),
    ],
)
def test_what_does_not_fit_is_named(features, grid, valid, message):
    with pytest.raises(ValueError, match=message):
        lost(features, grid, valid=valid)


def test_presets():
    assert LostOptions.parse("official") == LostOptions.OFFICIAL == LostOptions()
    assert LostOptions.parse("centred") == LostOptions(center=True, normalize=True, bias=0.05)
    assert str(LostOptions.OFFICIAL) == "features=key,layer=-1,normalize=false,center=false,bias=0.0,potentials=100"


@pytest.mark.parametrize(
    "options",
    [
        LostOptions.OFFICIAL,
        LostOptions.CENTRED,
        LostOptions("value", layer=3, center=True, bias=-1e-7, potentials=7),
    ],
)
def test_options_say_all_of_themselves(options):
    assert LostOptions.parse(str(options)) == options


def test_options_not_named_are_as_official():
    assert LostOptions.parse("features=value, bias=0.1") == LostOptions("value", bias=0.1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("oficial", "must be 'official' or 'centred', or some of features, layer, .*'oficial'"),
        ("", "'' in '' is none of these"),
        ("bias", "'bias' in 'bias' is none of these"),
        ("k_patches=3", "'k_patches=3' in"),
        ("bias=1,bias=2", "each once.*'bias=2'"),
        ("features=keys", "one of tokens, query, key, value, not 'keys'"),
        ("layer=last", "option layer of LOST must be of type int, not 'last'"),
        ("bias=much", "option bias of LOST must be of type float, not 'much'"),
        ("bias=nan", "bias of LOST must be finite"),
        ("center=yes", "option center of LOST must be true or false, not 'yes'"),
        ("potentials=0", "at least 1, the seed itself, not 0"),
    ],
)
def test_options_that_are_none_are_named(text, message):
    with pytest.raises(ValueError, match=message):
        LostOptions.parse(text)
