"""Cosines of neighbours against a literal loop, densities against scipy and against their integral."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.integrate import trapezoid
from scipy.stats import gaussian_kde

from vitreg_kernels.analysis.similarity import by_kind, density, neighbour_cosine


def literal(embeddings, grid, valid):
    rows, columns = grid
    found = torch.full(embeddings.shape[:2], math.nan, dtype=torch.float64)
    for image in range(len(embeddings)):
        for row in range(rows):
            for column in range(columns):
                cosines = []
                for r, c in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                    both = (row * columns + column, r * columns + c)
                    if 0 <= r < rows and 0 <= c < columns and valid[image, list(both)].all():
                        a, b = (embeddings[image, i].double() for i in both)
                        cosines.append(float(a @ b / (a.norm() * b.norm())))
                if cosines:
                    found[image, row * columns + column] = sum(cosines) / len(cosines)
    return found


@pytest.mark.parametrize("grid", [(3, 4), (4, 3), (1, 5), (5, 1), (1, 1), (2, 2)], ids=str)
def test_neighbour_cosine_is_the_mean_over_those_that_exist(grid):
    embeddings = torch.randn(2, grid[0] * grid[1], 7) + 0.5
    everything = torch.ones(embeddings.shape[:2], dtype=torch.bool)
    expected = literal(embeddings, grid, everything)
    torch.testing.assert_close(neighbour_cosine(embeddings, grid).double(), expected, rtol=0, atol=1e-6, equal_nan=True)
    assert expected.isnan().any() == (grid == (1, 1))


def test_padding_is_nobodys_neighbour():
    embeddings = torch.randn(2, 12, 7)
    valid = torch.ones(2, 12, dtype=torch.bool)
    valid[0, 8:] = False
    valid[1] = False
    valid[1, 5] = True
    found = neighbour_cosine(embeddings, (3, 4), valid)
    torch.testing.assert_close(found.double(), literal(embeddings, (3, 4), valid), rtol=0, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found[0, :8], neighbour_cosine(embeddings[:1, :8], (2, 4))[0])
    assert found[1].isnan().all()


def test_neighbour_cosine_is_the_sum_over_four_shifted_copies():
    embeddings = torch.randn(1, 30, 9, dtype=torch.float64)
    unit = F.pad(F.normalize(embeddings, dim=-1).view(1, 5, 6, 9), (0, 0, 1, 1, 1, 1))
    shifted = (unit[:, :-2, 1:-1], unit[:, 2:, 1:-1], unit[:, 1:-1, :-2], unit[:, 1:-1, 2:])
    total = sum((unit[:, 1:-1, 1:-1] * other).sum(-1) for other in shifted)
    count = sum((other.norm(dim=-1) > 0).double() for other in shifted)
    torch.testing.assert_close(neighbour_cosine(embeddings, (5, 6)), (total / count).flatten(1), rtol=0, atol=1e-12)


def test_zero_vectors_are_like_nothing():
    embeddings = torch.ones(1, 4, 3)
    embeddings[0, 0] = 0.0
    assert neighbour_cosine(embeddings, (2, 2))[0].tolist() == pytest.approx([0.0, 0.5, 0.5, 1.0], abs=1e-6)


def test_embeddings_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"12 patches of the grid 3 x 4, not of shape \(2, 13, 7\)"):
        neighbour_cosine(torch.zeros(2, 13, 7), (3, 4))


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
@pytest.mark.parametrize("count", [1, 2, 19, 20, 500])
def test_densities_integrate_to_one(count, scale):
    values = scale * np.random.default_rng(0).normal(0.6, 0.1, count)
    points, found = density(values)
    assert points.shape == found.shape == (256,)
    assert trapezoid(found, points) == pytest.approx(1.0, abs=1e-2)
    assert (found[0], found[-1]) == pytest.approx((0.0, 0.0), abs=1e-2 * found.max())


@pytest.mark.parametrize(
    "values", [np.full(50, 0.9), np.full(50, 0.0), np.array([0.3, 0.1 + 0.2] * 15), np.full(21, 1e6)]
)
def test_values_that_differ_by_rounding_alone_are_one_bin(values):
    """Or two, if its edge is between them."""
    points, found = density(values)
    assert trapezoid(found, points) == pytest.approx(1.0, abs=1e-2)
    assert 8 <= (found > 0).sum() <= 16
    inside, half = points[found > 0], 0.501 * (points[1] - points[0])
    assert inside[0] - half <= values[0] <= inside[-1] + half


def test_the_density_is_scipys():
    values = np.random.default_rng(0).normal(0.6, 0.1, 300)
    points, found = density(values)
    np.testing.assert_allclose(found, gaussian_kde(values)(points), rtol=1e-12)
    at = np.linspace(0, 1, 50)
    np.testing.assert_allclose(density(values, at)[1], gaussian_kde(values)(at), rtol=1e-12)


def test_few_values_are_counted():
    """Four of five in one bin."""
    points = np.linspace(0.0, 1.0, 161)
    _, found = density(np.array([0.51, 0.52, 0.51, 0.51, 0.91]), points)
    width = 8 / 160
    assert found[points.searchsorted(0.515)] == pytest.approx(0.8 / width)
    assert found[points.searchsorted(0.91)] == pytest.approx(0.2 / width)
    assert found.sum() / 160 == pytest.approx(1.0)


@pytest.mark.parametrize("values", [[], [0.5, math.nan], [math.inf] * 30])
def test_densities_need_finite_values(values):
    with pytest.raises(ValueError, match="at least one value and only finite ones"):
        density(np.array(values))


def test_outliers_and_the_others_share_their_points():
    values = torch.cat((0.6 + 0.05 * torch.randn(400), 0.92 + 0.02 * torch.randn(30)))
    outlier = torch.arange(430) >= 400
    found = by_kind(values, outlier)
    assert found.counts == {"normal": 400, "outlier": 30}
    assert found.means["outlier"] == pytest.approx(values[400:].mean().item())
    assert found.means["normal"] == pytest.approx(values[:400].mean().item())
    for of_kind in found.densities.values():
        assert trapezoid(of_kind, found.points) == pytest.approx(1.0, abs=1e-2)
    assert found.points[int(np.argmax(found.densities["outlier"]))] == pytest.approx(0.92, abs=0.03)


def test_a_kind_without_patches_is_absent():
    found = by_kind(torch.rand(50), torch.zeros(50, dtype=torch.bool))
    assert found.counts == {"normal": 50, "outlier": 0}
    assert found.densities.keys() == found.means.keys() == {"normal"}
    with pytest.raises(ValueError, match="no patches"):
        by_kind(torch.rand(0), torch.zeros(0, dtype=torch.bool))
