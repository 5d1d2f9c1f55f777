"""TokenCut against the eigenvectors of D⁻¹A, planted objects, and graphs without one best cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from vitreg_kernels.analysis.tokencut import second_eigenvector, tokencut


def blobs(grid, *boxes):
    """``[1, M, C]``: each box of (left, top, right, bottom) has a direction of its own, and so has what is left."""
    which = torch.zeros(grid, dtype=torch.long)
    for number, (left, top, right, bottom) in enumerate(boxes, start=1):
        which[top:bottom, left:right] = number
    return torch.eye(len(boxes) + 1)[which.flatten()][None] * 3


@pytest.mark.parametrize("index", range(5))
def test_the_eigenvector_is_that_of_the_random_walk(index):
    """(D - A) x = λ D x is D⁻¹A x = (1 - λ) x, solved by another routine."""
    draw = np.random.default_rng(index)
    weights = np.where(draw.random((20, 20)) < 0.2, 1.0, 1e-5)
    weights = np.maximum(weights, weights.T)
    np.fill_diagonal(weights, 1.0)
    values, vectors = np.linalg.eig(weights / weights.sum(1, keepdims=True))
    order = np.argsort(-values.real)
    expected = vectors[:, order[1]].real

    own_values, own = second_eigenvector(weights)
    np.testing.assert_allclose(own_values, 1 - values.real[order[1:3]], atol=1e-9)
    cosine = own @ expected / np.linalg.norm(own) / np.linalg.norm(expected)
    assert abs(cosine) == pytest.approx(1, abs=1e-9)


def literal(features, tau, eps):
    """One image's ``[M, C]``: seed and foreground, by the random walk's eigenvector, whose sign does not matter."""
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    weights = np.where(unit @ unit.T > tau, 1.0, eps)
    values, vectors = np.linalg.eig(weights / weights.sum(1, keepdims=True))
    vector = vectors[:, np.argsort(-values.real)[1]].real
    seed = int(np.argmax(np.abs(vector)))
    above = vector > vector.mean()
    return seed, above if above[seed] else ~above


def test_plain_numpy_gives_the_same():
    """Of patches that change slowly over the image, so that most are in no clear part."""
    sides = []
    for index in range(30):
        draw = np.random.default_rng(index)
        features = ndimage.gaussian_filter(draw.normal(size=(7, 9, 5)), (1.5, 1.5, 0)).reshape(63, 5)
        tau, eps = ((0.2, 1e-5), (0.6, 1e-3))[index % 2]
        seed, foreground = literal(features, tau, eps)
        (found,) = tokencut(torch.from_numpy(features)[None], (7, 9), tau=tau, eps=eps)
        assert found.seed == seed, index
        assert found.mask.tolist() == foreground.tolist(), index
        sides.append(foreground.mean())
    assert min(sides) < 0.3
    assert max(sides) > 0.5


@pytest.mark.parametrize("grid", [(6, 9), (9, 6)])
def test_two_parts_are_told_apart(grid):
    """The smaller one has the larger entries, for D balances the sides: it is the object."""
    (found,) = tokencut(blobs(grid, (1, 2, 5, 4)), grid)
    assert found.box == (1, 2, 5, 4)
    assert found.seed == 2 * grid[1] + 1, "the first of its patches, which are alike"
    assert int(found.mask.sum()) == 8
    assert found.positive_share is None


def test_the_box_is_around_the_part_with_the_seed():
    """Two blobs of one kind that do not touch."""
    features = blobs((6, 9), (1, 1, 3, 3), (6, 3, 8, 5))
    features[features[..., 2] > 0] = torch.tensor([0.0, 3.0, 0.0])
    (found,) = tokencut(features, (6, 9))
    assert found.box == (1, 1, 3, 3)
    assert int(found.mask.sum()) == 8


def test_noise_below_tau_changes_nothing():
    noise = torch.randn(4, 80, 2, generator=torch.Generator().manual_seed(0)) * 0.05
    for found in tokencut(blobs((8, 10), (4, 3, 9, 6)) + noise, (8, 10)):
        assert found.box == (4, 3, 9, 6)


@pytest.mark.parametrize(
    "features",
    [torch.ones(1, 12, 4), torch.eye(12)[None], torch.zeros(1, 12, 4), blobs((3, 4), (0, 0, 4, 1), (0, 1, 4, 2))],
    ids=["all alike", "none alike", "zeros", "three parts of one size"],
)
def test_a_graph_without_one_best_cut_has_no_object(features):
    """Its second eigenvalue belongs to many vectors, and which of them a routine gives is chance."""
    (found,) = tokencut(features, (3, 4))
    assert (found.seed, found.box) == (0, None)
    assert not found.mask.any()


def test_parts_that_only_eps_connects():
    """Three, of 12, 4 and 20 patches. To cut the first from the others costs, in units of eps,
    12 * 24 / 12² + 12 * 24 / (4² + 20²) = 2.7; of the others it is 8.2 and 2.8.
    """
    (found,) = tokencut(blobs((6, 6), (0, 0, 6, 2), (4, 4, 6, 6)), (6, 6))
    assert found.box == (0, 0, 6, 2)


def test_two_patches_are_enough():
    (found,) = tokencut(torch.eye(2)[None], (1, 2))
    assert (found.seed, found.box) == (0, (0, 0, 1, 1))


def test_padding_changes_nothing():
    padded = torch.full((1, 40, 2), float("nan"))
    padded[:, :32] = blobs((4, 8), (5, 1, 8, 3))
    valid = torch.arange(40)[None] < 32
    (found,) = tokencut(padded, (5, 8), valid=valid)
    assert found.box == (5, 1, 8, 3)
    assert found.seed == 13
    assert not found.mask[32:].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.0}, r"tau is a cosine, and must be in \[-1, 1\), not 1.0"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"valid": torch.tensor([[True, False, False, False]])}, "image 0 has 1 valid patches, and at least 2"),
    ],
)
def test_what_does_not_fit_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        tokencut(torch.eye(4)[None], (2, 2), **options)
