"""Tokens for the probes: the right kind from each image, evenly, and with the pixels that lie beneath them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitreg_kernels.analysis.draws import Drawn, PatchTokens, draw_patches, draw_tokens, patchify
from vitreg_kernels.layout import TokenLayout

LAYOUT = TokenLayout(num_registers=2, grid=(2, 3))
KINDS = ("cls", "register 0", "register 1", "normal", "outlier")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def numbered(batch, layout=LAYOUT):
    """``[B, N, 2]``: each token says which image it is of, and its place in the sequence."""
    image, place = torch.arange(batch)[:, None], torch.arange(layout.num_tokens)[None]
    return torch.stack(torch.broadcast_tensors(image, place), dim=-1).float()


def some_outliers(batch, layout=LAYOUT):
    """Patches 1 and 4 of every image but the second."""
    outliers = torch.zeros(batch, layout.num_patches, dtype=torch.bool)
    outliers[:, [1, 4]] = True
    outliers[1:2] = False
    return outliers


def test_each_kind_is_drawn_from_its_tokens_and_its_images():
    outliers = some_outliers(4)
    for kind, places in zip(KINDS, ({0}, {1}, {2}, {3, 4, 5, 6, 7, 8}, {4, 7}), strict=True):
        drawn = draw_tokens(numbered(4), kind, outliers, LAYOUT, generator=generator(), repeats=40)
        images = [0, 2, 3] if kind == "outlier" else [0, 1, 2, 3]
        assert drawn.kind == kind
        assert drawn.has.nonzero().flatten().tolist() == images
        assert drawn.missing == 4 - len(images)
        assert drawn.tokens.shape == (40, len(images), 2)
        assert (drawn.tokens[:, :, 0] == torch.tensor(images)).all()
        assert set(drawn.tokens[:, :, 1].flatten().tolist()) == places
        if kind == "normal":
            assert not {4.0, 7.0} & set(drawn.tokens[:, [0, 2, 3], 1].flatten().tolist())


def test_every_token_of_a_kind_is_as_likely():
    drawn = draw_tokens(numbered(1), "normal", some_outliers(1), LAYOUT, generator=generator(), repeats=4000)
    counts = drawn.tokens[:, 0, 1].long().bincount(minlength=9)
    assert counts.nonzero().flatten().tolist() == [3, 5, 6, 8]
    assert ((counts[[3, 5, 6, 8]] - 1000).abs() < 4 * (4000 * 0.25 * 0.75) ** 0.5).all()


def test_what_is_drawn_does_not_depend_on_the_batch_size():
    features, outliers = numbered(5), some_outliers(5)
    for kind in KINDS:
        whole = draw_tokens(features, kind, outliers, LAYOUT, generator=generator(3))
        through = generator(3)
        parts = [
            draw_tokens(features[i : i + n], kind, outliers[i : i + n], LAYOUT, generator=through)
            for i, n in ((0, 1), (1, 3), (4, 1))
        ]
        joined = Drawn.join(parts)
        assert torch.equal(joined.tokens, whole.tokens)
        assert torch.equal(joined.has, whole.has)


def test_padding_is_never_drawn():
    valid = torch.zeros(2, 6, dtype=torch.bool)
    valid[0, [0, 1]] = True  # of which 1 is an outlier; nothing of the second image is shown
    for kind, place in (("normal", 3), ("outlier", 4)):
        drawn = draw_tokens(
            numbered(2), kind, torch.tensor([[0, 1, 0, 0, 1, 0]] * 2).bool(), LAYOUT, generator=generator(), valid=valid
        )
        assert drawn.has.tolist() == [True, False]
        assert set(drawn.tokens[..., 1].flatten().tolist()) == {place}


@pytest.mark.parametrize("kind", ["register 2", "register -1", "registers", "patch", ""])
def test_a_kind_that_the_layout_lacks_is_refused(kind):
    with pytest.raises(ValueError, match=r"kind must be one of .*'register 1', 'normal', 'outlier'"):
        draw_tokens(numbered(2), kind, some_outliers(2), LAYOUT, generator=generator())


def test_a_model_without_cls_has_none_to_draw():
    layout = TokenLayout(num_registers=0, num_cls_tokens=0, grid=(2, 3))
    with pytest.raises(ValueError, match=r"one of \['normal', 'outlier'\] for this layout, not 'cls'"):
        draw_tokens(numbered(2, layout), "cls", None, layout, generator=generator())


def test_masks_that_do_not_fit_are_refused():
    for outliers in (None, torch.zeros(2, 5, dtype=torch.bool), torch.zeros(2, 6)):
        with pytest.raises(ValueError, match="outliers must be bool of shape \\(2, 6\\), one for each patch"):
            draw_tokens(numbered(2), "normal", outliers, LAYOUT, generator=generator())


def test_tokens_of_several_kinds_are_not_joined():
    kinds = [draw_tokens(numbered(2), kind, None, LAYOUT, generator=generator()) for kind in ("cls", "register 0")]
    with pytest.raises(ValueError, match="one kind"):
        Drawn.join(kinds)


def test_patches_are_what_the_patch_embedding_sees():
    images = torch.randn(2, 3, 8, 12)
    embedding = nn.Conv2d(3, 5, 4, stride=4, bias=False)
    seen = embedding(images).flatten(2).transpose(1, 2)
    by_hand = patchify(images, 4) @ embedding.weight.flatten(1).T
    torch.testing.assert_close(by_hand, seen)
    # The mistake of a published reproduction: the same shape, and stripes of one channel for patches.
    reshaped = images.reshape(2, 6, -1)
    assert reshaped.shape == patchify(images, 4).shape
    assert (reshaped @ embedding.weight.flatten(1).T - seen).abs().max() > 0.1


def test_images_that_do_not_make_whole_patches_are_refused():
    with pytest.raises(ValueError, match="multiples of the patch size 5"):
        patchify(torch.zeros(1, 3, 8, 10), 5)


def test_patch_tokens_come_with_their_place_and_pixels():
    images, outliers = torch.randn(3, 3, 8, 12), some_outliers(3)
    patches = draw_patches(numbered(3), images, outliers, LAYOUT, (2, 3), generator=generator())
    assert patches.grids == [(2, 3)] * 3
    assert len(patches.tokens) == 18
    for token, pixels, image, row, column, outlier in zip(*patches[:6], strict=True):
        assert token.tolist() == [image, 3 + row * 3 + column]
        beneath = images[image, :, row * 4 : row * 4 + 4, column * 4 : column * 4 + 4]
        assert torch.equal(pixels, beneath.flatten())
        assert outlier == outliers[image, row * 3 + column]


def test_so_many_patches_of_an_image_are_drawn_of_those_shown():
    valid = torch.ones(3, 6, dtype=torch.bool)
    valid[0, :4] = False
    images = torch.zeros(3, 3, 8, 12)
    drawn = draw_patches(
        numbered(3), images, some_outliers(3), LAYOUT, (2, 3), generator=generator(), per_image=3, valid=valid
    )
    assert drawn.image.bincount().tolist() == [2, 3, 3]
    assert drawn.tokens[:2, 1].tolist() == [7, 8]
    assert len({tuple(token.tolist()) for token in drawn.tokens}) == 8


def test_patch_tokens_of_several_grids_are_joined_with_their_images_counted_through():
    square = TokenLayout(num_registers=0, grid=(2, 2))
    first = draw_patches(numbered(2), torch.zeros(2, 3, 8, 12), some_outliers(2), LAYOUT, (2, 3), generator=generator())
    none = torch.zeros(1, 4, dtype=torch.bool)
    second = draw_patches(numbered(1, square), torch.zeros(1, 3, 8, 8), none, square, (2, 2), generator=generator())
    joined = PatchTokens.join([first, second])
    assert joined.image.bincount().tolist() == [6, 6, 4]
    assert joined.grids == [(2, 3), (2, 3), (2, 2)]
    assert joined.outlier.sum() == 2
    with pytest.raises(ValueError, match="no patch tokens"):
        PatchTokens.join([])


@pytest.mark.parametrize(("shape", "grid"), [((2, 3, 8, 12), (3, 3)), ((1, 3, 8, 12), (2, 3)), ((2, 3, 8, 9), (2, 3))])
def test_images_of_another_grid_are_refused(shape, grid):
    with pytest.raises(ValueError, match=r"fit a grid of|square patches|multiples"):
        draw_patches(numbered(2), torch.zeros(shape), some_outliers(2), LAYOUT, grid, generator=generator())
