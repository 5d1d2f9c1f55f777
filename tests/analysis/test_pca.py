"""Joint principal components: sklearn's, with signs that stay, and colours that compare between images."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from vitreg_kernels.analysis import pca
from vitreg_kernels.analysis.pca import joint_pca


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def scene(images, grid=(4, 6), channels=8, noise=0.01):
    """Tokens whose variance lies along three known directions, 9 : 4 : 1, far from zero; and the directions."""
    directions = torch.linalg.qr(torch.randn(channels, 3)).Q.T
    directions = directions * directions.gather(1, directions.abs().argmax(1, keepdim=True)).sign()
    where = torch.randn(images, *grid, 3) * torch.tensor([3.0, 2.0, 1.0])
    return where @ directions + 5 + noise * torch.randn(images, *grid, channels), directions, where


def test_components_are_those_of_sklearn():
    tokens, _, _ = scene(5)
    found = joint_pca(tokens)
    wanted = PCA(3, svd_solver="full").fit(tokens.reshape(-1, 8).double().numpy())
    signs = (found.components.double().numpy() * wanted.components_).sum(1)
    np.testing.assert_allclose(np.abs(signs), 1, atol=1e-5)
    np.testing.assert_allclose(found.components, wanted.components_ * np.sign(signs)[:, None], atol=1e-5)
    np.testing.assert_allclose(found.explained, wanted.explained_variance_ratio_, atol=1e-5)
    np.testing.assert_allclose(found.mean, wanted.mean_, rtol=1e-6)
    coordinates = wanted.transform(tokens.reshape(-1, 8).double().numpy()) * np.sign(signs)
    low, high = np.percentile(coordinates, (2, 98), axis=0)
    colours = ((coordinates - low) / (high - low)).clip(0, 1).reshape(5, 4, 6, 3)
    np.testing.assert_allclose(torch.stack(found.colours), colours, atol=1e-5)


def test_the_largest_loading_is_positive_whichever_signs_a_version_of_sklearn_gives(monkeypatch):
    tokens = torch.randn(3, 4, 4, 6)
    found = joint_pca(tokens)
    assert (found.components.gather(1, found.components.abs().argmax(1, keepdim=True)) > 0).all()

    class Flipped(PCA):
        def fit(self, x):
            super().fit(x)
            self.components_ *= [[-1], [1], [-1]]
            return self

    monkeypatch.setattr(pca, "PCA", Flipped)
    assert torch.equal(joint_pca(tokens).components, found.components)


def test_halves_of_the_images_and_mirrored_tokens_keep_their_signs():
    tokens, directions, _ = scene(24)
    for half in (tokens[:12], tokens[12:]):
        assert ((joint_pca(half).components * directions).sum(1) > 0.95).all()
    # What is upside down is told as such: the components stay, the colours are turned round.
    mirrored = joint_pca(-tokens)
    torch.testing.assert_close(mirrored.components, joint_pca(tokens).components, atol=1e-5, rtol=0)
    turned = 1 - torch.stack(mirrored.colours)
    torch.testing.assert_close(turned, torch.stack(joint_pca(tokens).colours), atol=1e-5, rtol=0)


def test_a_planted_scene_of_three_regions_has_three_colours_in_all_images():
    # Three regions, elsewhere in each image, at the corners of a triangle: two components, in which they differ.
    corners = torch.zeros(3, 6)
    corners[0, 0], corners[1, 1], corners[2, 2] = 10, 7, 4
    regions = torch.stack([torch.arange(24).roll(shift).reshape(4, 6) // 8 for shift in (0, 5, 11)])
    found = joint_pca(corners[regions] + 0.01 * torch.randn(3, 4, 6, 6), components=2)
    colours = torch.stack(found.colours)
    means = torch.stack([colours[regions == region].mean(0) for region in range(3)])
    for region in range(3):
        assert (colours[regions == region] - means[region]).abs().max() < 0.05
    assert torch.cdist(means, means)[~torch.eye(3, dtype=torch.bool)].min() > 0.5


def test_colours_are_those_of_all_images_together():
    tokens, _, _ = scene(4)
    tokens[0] = tokens[0] * 0.1 + 5 * 0.9  # a dull image: its colours do not fill the range
    colours = joint_pca(tokens).colours
    assert all(each.min() >= 0 and each.max() <= 1 and each.dtype == torch.float32 for each in colours)
    assert (colours[0].amax((0, 1)) - colours[0].amin((0, 1)) < 0.4).all()
    assert torch.stack(colours).amax((0, 1, 2)).tolist() == [1, 1, 1]
    assert torch.stack(colours).amin((0, 1, 2)).tolist() == [0, 0, 0]


def test_images_of_several_grids_are_fitted_as_one():
    tokens, _, _ = scene(2)
    cut = [tokens[0], tokens[1, :2], tokens[1, 2:, :3], tokens[1, 2:, 3:]]
    whole, found = joint_pca(tokens), joint_pca(cut)
    assert [tuple(each.shape) for each in found.colours] == [(4, 6, 3), (2, 6, 3), (2, 3, 3), (2, 3, 3)]
    torch.testing.assert_close(found.components, whole.components, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.colours[1], whole.colours[1][:2], atol=1e-5, rtol=0)
    torch.testing.assert_close(found.colours[3], whole.colours[1][2:, 3:], atol=1e-5, rtol=0)


def test_what_is_outside_the_foreground_is_black_and_counts_for_nothing():
    tokens, _, _ = scene(3)
    foreground = torch.rand(3, 4, 6) > 0.3
    found = joint_pca(tokens, foreground=foreground)
    other = tokens.clone()
    other[~foreground] = torch.nan
    again = joint_pca(other, foreground=foreground)
    assert torch.equal(found.components, again.components)
    assert torch.equal(torch.stack(found.colours), torch.stack(again.colours))
    assert (torch.stack(found.colours)[~foreground] == 0).all()
    assert torch.stack(found.colours)[foreground].any()


def test_one_massive_token_does_not_decide_the_colours_of_all():
    tokens, _, _ = scene(10)
    tokens[3, 1, 1, 0] = 1e4
    colours = torch.stack(joint_pca(tokens).colours)
    assert colours[..., 1:].flatten(0, 2).std(0).min() > 0.2


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, 12345.678])
def test_constant_features_are_grey(value):
    found = joint_pca(torch.full((2, 3, 4, 5), value))
    assert (torch.stack(found.colours) == 0.5).all()
    assert not found.components.any()
    assert not found.explained.any()
    assert joint_pca(torch.full((1, 1, 1, 5), value), components=1).colours[0].item() == 0.5


def test_a_component_that_does_not_vary_is_grey_and_not_rounding_errors():
    direction = torch.randn(6)
    tokens = torch.randn(3, 4, 5, 1) * direction + 100 * torch.randn(6)
    found = joint_pca(tokens.double())
    colours = torch.stack(found.colours)
    assert colours[..., 0].std() > 0.2
    assert (colours[..., 1:] == 0.5).all()
    assert not found.components[1:].any()
    torch.testing.assert_close(found.explained, torch.tensor([1.0, 0, 0]))


def test_patches_that_are_alike_but_for_rounding_stay_grey_beside_one_that_is_not():
    tokens = torch.full((4, 5, 5, 6), 3.0) * (1 + 1e-8 * torch.randn(4, 5, 5, 6).double())
    tokens[0, 0, 0, 2] = 50
    colours = torch.stack(joint_pca(tokens).colours)
    assert (colours == 0.5).all()


def test_half_precision_is_taken():
    tokens, directions, _ = scene(6)
    for dtype in (torch.float16, torch.bfloat16):
        assert ((joint_pca(tokens.to(dtype)).components * directions).sum(1) > 0.9).all()


def test_bad_input_is_refused_in_one_sentence():
    tokens, _, _ = scene(2, grid=(1, 2))
    with pytest.raises(ValueError, match=r"5 components need at least as many patches and channels.*4 patches of 8"):
        joint_pca(tokens, components=5)
    with pytest.raises(ValueError, match=r"3 components .* not 4 patches of 2 channels"):
        joint_pca(tokens[..., :2])
    with pytest.raises(ValueError, match="0 patches"):
        joint_pca(tokens, foreground=torch.zeros(2, 1, 2, dtype=torch.bool))
    with pytest.raises(ValueError, match="0 patches"):
        joint_pca([])
    with pytest.raises(ValueError, match="1 of 4 patch tokens are NaN or infinite"):
        joint_pca(tokens.index_put((torch.tensor(1), torch.tensor(0), torch.tensor(1)), torch.tensor(torch.inf)))
    with pytest.raises(ValueError, match="rising percentiles"):
        joint_pca(tokens, clip=(98, 2))
    with pytest.raises(ValueError, match="a mask for each of 2 images, not 1"):
        joint_pca(tokens, foreground=[torch.ones(1, 2, dtype=torch.bool)])
    with pytest.raises(ValueError, match=r"foreground of image 0 must be bool of shape \(1, 2\)"):
        joint_pca(tokens, foreground=torch.ones(2, 2, 1, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"tokens of image 1 must be \[rows, columns, C\]"):
        joint_pca([tokens[0], tokens[1, ..., :7]])
    with pytest.raises(ValueError, match=r"tokens of image 0 must be \[rows, columns, C\]"):
        joint_pca(tokens.flatten(1, 2))
