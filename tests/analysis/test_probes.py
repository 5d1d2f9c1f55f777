"""Linear probes against what can be worked out: perfect tokens, noise, two Gaussians; no leak from image to image."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from vitreg_kernels.analysis import probes
from vitreg_kernels.analysis.draws import Drawn, PatchTokens, patchify
from vitreg_kernels.analysis.probes import classify, pixels, position


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def drawn(tokens, kind="cls", repeats=1, has=None):
    """``[S, C]``, or ``[repeats, S, C]``, as tokens of a kind that all images have."""
    tokens = tokens.expand(repeats, -1, -1) if tokens.dim() == 2 else tokens
    return Drawn(kind, tokens, torch.ones(tokens.shape[1], dtype=torch.bool) if has is None else has)


def on_grid(tokens, grid, targets=None, outlier=None):
    """``[B, M, C]``, with ``[B, M, K]`` for pixels, as patch tokens of images of one grid."""
    images, patches = tokens.shape[:2]
    index = torch.arange(patches).repeat(images)
    return PatchTokens(
        tokens.flatten(0, 1),
        torch.zeros(images * patches, 2) if targets is None else targets.flatten(0, 1),
        torch.arange(images).repeat_interleave(patches),
        index // grid[1],
        index % grid[1],
        torch.zeros(images * patches, dtype=torch.bool) if outlier is None else outlier.flatten(),
        [grid] * images,
    )


def of(found, metric, tokens="normal"):
    (probe,) = [probe for probe in found if (probe.metric, probe.tokens) == (metric, tokens)]
    return probe


def within_three(probe, expected):
    return abs(probe.score - expected) <= 3 * probe.standard_error


# Classification


def test_two_gaussians_are_told_apart_as_often_as_the_closed_form_says():
    distance = 2.0
    labels = torch.arange(3000) % 2
    tokens = torch.randn(3000, 4)
    tokens[:, 1] += distance * labels
    (probe,) = classify([drawn(tokens)], [str(label) for label in labels.tolist()], folds=3)
    best = 0.5 * (1 + math.erf(distance / 2 / math.sqrt(2)))  # Phi(d / 2), at equal classes and unit variance
    assert within_three(probe, best)
    assert probe.standard_error == pytest.approx(math.sqrt(best * (1 - best) / 3000), rel=0.05)
    assert (probe.task, probe.tokens, probe.metric, probe.chance, probe.count) == (
        "classification",
        "cls",
        "accuracy",
        0.5,
        3000,
    )
    assert probe.error is None
    assert probe.note == "chance: always the most frequent of 2 classes"


@pytest.mark.parametrize("what", ["noise", "shuffled labels"])
def test_without_information_accuracy_is_chance(what):
    labels = torch.arange(240) % 3
    tokens = torch.randn(240, 6)
    if what == "shuffled labels":
        tokens = tokens + 10 * torch.eye(3, 6)[labels]
        labels = labels[torch.randperm(240)]
    (probe,) = classify([drawn(tokens)], [str(label) for label in labels.tolist()], folds=3)
    assert probe.chance == pytest.approx(1 / 3)
    assert within_three(probe, probe.chance)


def test_more_channels_than_images_of_noise_are_not_fitted():
    labels = ["a", "b"] * 30
    (probe,) = classify([drawn(torch.randn(60, 200))], labels, folds=3)
    assert within_three(probe, 0.5)


def test_chance_is_the_most_frequent_class():
    labels = ["common"] * 90 + ["rare"] * 30
    (probe,) = classify([drawn(torch.randn(120, 3))], labels, folds=3)
    assert probe.chance == 0.75
    assert within_three(probe, 0.75)


def test_all_kinds_are_judged_on_the_same_images_and_splits(monkeypatch):
    labels = ["a", "b", "c"] * 20
    tokens = torch.randn(2, 60, 5) + torch.eye(3, 5).repeat(20, 1)
    has = torch.ones(60, dtype=torch.bool)
    has[::4] = False
    splits = []

    class Watched(StratifiedKFold):
        def split(self, x, y, groups=None):
            if self.n_splits == 3:  # the outer one
                splits.append([test.tolist() for _, test in super().split(x, y, groups)])
            return super().split(x, y, groups)

    monkeypatch.setattr(probes, "StratifiedKFold", Watched)
    monkeypatch.setattr(probes, "CLASSIFICATION_STRENGTHS", [0.1])
    kinds = [drawn(tokens), Drawn("outlier", tokens[:, has], has), drawn(tokens, "register 0")]
    found = classify(kinds, labels, folds=3)
    assert [probe.tokens for probe in found] == ["cls", "outlier", "register 0"]
    assert {(probe.score, probe.error, probe.count) for probe in found} == {(found[0].score, found[0].error, 45)}
    assert splits[:2] == splits[2:4] == splits[4:]
    assert splits[0] != splits[1]  # a repeat has a split of its own
    assert all("15 of 60 images are left out" in probe.note for probe in found)


def test_repeats_take_the_next_draw_and_give_the_deviation():
    labels = ["a", "b"] * 20
    told = torch.tensor([[0.0], [9.0]]).repeat(20, 1)
    draws = torch.stack([told, torch.zeros_like(told)])  # of the second draw nothing can be told
    (probe,) = classify([drawn(draws)], labels, folds=4)
    assert probe.score == pytest.approx((1 + 0.5) / 2, abs=0.01)
    assert probe.error == pytest.approx(np.std([1, 0.5], ddof=1), abs=0.01)
    # An image is one observation, however often it was drawn: of the mean of its repeats, 1 or 1/2.
    assert probe.standard_error == pytest.approx(np.std([1, 0.5] * 20, ddof=1) / math.sqrt(40), rel=0.05)


def test_a_kind_that_few_images_have_is_not_measured_and_costs_the_others_nothing():
    has = torch.zeros(30, dtype=torch.bool)
    has[:4] = True
    tokens = torch.eye(2).repeat(15, 1)
    kinds = [Drawn("outlier", tokens[None, :4], has), drawn(tokens)]
    outlier, cls = classify(kinds, ["a", "b"] * 15, folds=3)
    assert outlier.score is outlier.chance is outlier.standard_error is None
    assert outlier.count == 0
    assert outlier.note.startswith("not measured: too few images: needs 2 classes of at least 3 labelled images")
    assert "4 of 30 images have" in outlier.note
    assert (cls.score, cls.count) == (1.0, 30)


def test_classes_of_few_images_and_images_without_a_label_are_left_out_and_said():
    labels = ["a", "b"] * 10 + ["c", "c", None]
    (probe,) = classify([drawn(torch.randn(23, 2))], labels, folds=3)
    assert probe.count == 20
    assert probe.chance == 0.5
    assert probe.note.startswith("chance: always the most frequent of 2 classes; 3 of 23 images are left out")


@pytest.mark.parametrize("labels", [["a"] * 12, ["a"] * 10 + ["b"] * 2, [None] * 12, []])
def test_one_class_is_not_measured(labels):
    (probe,) = classify([drawn(torch.randn(len(labels), 2))], labels)
    assert probe.score is None
    assert "2 classes of at least 5" in probe.note


def test_the_scale_of_channels_does_not_matter():
    labels = ["a", "b"] * 30
    tokens = torch.randn(60, 3) + torch.tensor([[0.0], [1.0]]).repeat(30, 1)
    (probe,) = classify([drawn(tokens)], labels, folds=3)
    (scaled,) = classify([drawn(tokens * torch.tensor([1e-4, 1.0, 1e4]) + 100)], labels, folds=3)
    assert scaled.score == pytest.approx(probe.score, abs=0.02)


def test_what_classify_is_given_must_fit():
    tokens = torch.randn(12, 2)
    with pytest.raises(ValueError, match=r"the same 11 images that have labels, not .images, repeats. ..12, 1"):
        classify([drawn(tokens)], ["a"] * 11)
    with pytest.raises(ValueError, match="drawn equally often"):
        classify([drawn(tokens), drawn(tokens, "normal", repeats=2)], ["a", "b"] * 6)
    with pytest.raises(ValueError, match="folds must be at least 3"):
        classify([drawn(tokens)], ["a", "b"] * 6, folds=2)
    with pytest.raises(ValueError, match="1 of 24 values are NaN or infinite"):
        classify(
            [
                drawn(
                    tokens.index_fill(0, torch.tensor(3), 0).index_put(
                        (torch.tensor(3), torch.tensor(1)), torch.tensor(torch.inf)
                    )
                )
            ],
            ["a", "b"] * 6,
        )


# Position


def test_tokens_that_name_their_position_tell_it():
    grid = (3, 4)
    found = position(on_grid(torch.eye(12).expand(6, -1, -1), grid), folds=3)
    assert of(found, "top-1").score == 1
    assert of(found, "top-1").standard_error == 0
    assert of(found, "mean distance").score == 0
    assert of(found, "top-1").count == 72
    assert of(found, "top-1").chance == pytest.approx(1 / 12)
    assert of(found, "top-1", "outlier").note == "not measured: no such patch"


def test_noise_tells_no_position():
    grid = (3, 4)
    found = position(on_grid(torch.randn(40, 12, 5), grid), folds=3)
    assert within_three(of(found, "top-1"), 1 / 12)
    places = np.array([(row, column) for row in range(3) for column in range(4)])
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    assert of(found, "mean distance").chance == pytest.approx(apart.mean(0).min())
    # A map that learnt nothing guesses at random, which is farther than always one in the middle.
    assert within_three(of(found, "mean distance"), apart.mean())
    assert of(found, "mean distance").score > of(found, "mean distance").chance


def test_shuffled_positions_are_not_told():
    patches = on_grid(torch.eye(12).expand(30, -1, -1), (3, 4))
    order = torch.cat([image * 12 + torch.randperm(12) for image in range(30)])
    found = position(patches._replace(tokens=patches.tokens[order]), folds=3)
    assert within_three(of(found, "top-1"), 1 / 12)


def test_a_distance_is_counted_in_patches_of_a_grid_that_is_not_square():
    tokens = torch.eye(10).expand(6, -1, -1).clone()
    tokens[0, [0, 9]] = tokens[0, [9, 0]]  # two opposite corners of one image say that they are the other
    found = position(on_grid(tokens, (2, 5)), folds=3)
    assert of(found, "top-1").score == pytest.approx(1 - 2 / 60)
    assert of(found, "mean distance").score == pytest.approx(2 / 60 * math.hypot(1, 4))


def test_normal_patches_and_outliers_are_judged_apart_by_one_map():
    outlier = torch.zeros(9, 12, dtype=torch.bool)
    outlier[:, [2, 7]] = True
    tokens = torch.eye(12).expand(9, -1, -1).clone()
    tokens[outlier] = 0  # an outlier says nothing of its position
    found = position(on_grid(tokens, (3, 4), outlier=outlier), folds=3)
    assert [probe.tokens for probe in found] == ["normal", "normal", "outlier", "outlier"]
    assert of(found, "top-1").score == 1
    assert of(found, "top-1").count == 90
    assert of(found, "top-1", "outlier").score == pytest.approx(0.5)  # always one of their two positions
    assert of(found, "top-1", "outlier").chance == 0.5
    assert of(found, "mean distance", "outlier").chance == pytest.approx(math.hypot(1, 1) / 2)


def test_no_image_has_tokens_in_training_and_in_test():
    # All tokens of an image are the same and at the same position; another image has another of each.
    image = torch.arange(12).repeat_interleave(5)
    patches = PatchTokens(
        torch.eye(12)[image],
        torch.randn(12, 3)[image],
        image,
        image // 4,
        image % 4,
        torch.zeros(60, dtype=torch.bool),
        [(3, 4)] * 12,
    )
    assert of(position(patches, folds=3), "top-1").score == 0
    assert of(pixels(patches, folds=3), "R2").score < 0.1


def test_the_standard_error_counts_images_not_tokens():
    # Half of the images tell all positions, the others none: as uncertain as a coin thrown once an image.
    tokens = torch.eye(12).expand(40, -1, -1).clone()
    tokens[::2] = 0
    probe = of(position(on_grid(tokens, (3, 4)), folds=4), "top-1")
    by_image = np.array([1 / 12, 1.0] * 20)
    assert probe.score == pytest.approx(by_image.mean())
    assert probe.standard_error == pytest.approx(by_image.std(ddof=1) / math.sqrt(40))


def test_positions_are_of_the_most_frequent_grid():
    first, other = on_grid(torch.eye(12).expand(6, -1, -1), (3, 4)), on_grid(torch.randn(2, 12, 12), (4, 3))
    found = position(PatchTokens.join([other, first]), folds=3)
    assert of(found, "top-1").score == 1
    assert of(found, "top-1").note.endswith("; 2 images of other grids are left out")


@pytest.mark.parametrize("probe", [position, pixels])
def test_too_few_images_are_not_measured(probe):
    found = probe(on_grid(torch.randn(4, 12, 5), (3, 4)))
    assert len(found) == 4
    assert all(each.score is None and each.note.startswith("not measured: too few images: needs 5") for each in found)
    assert (
        len(
            probe(
                PatchTokens(
                    torch.zeros(0, 5), torch.zeros(0, 2), *[torch.zeros(0).long()] * 3, torch.zeros(0).bool(), []
                )
            )
        )
        == 4
    )


def test_one_position_is_not_measured():
    found = position(on_grid(torch.randn(6, 1, 5), (1, 1)))
    assert "2 positions" in found[0].note


# Pixels


def test_tokens_that_are_the_pixels_tell_them():
    patches = patchify(torch.rand(8, 3, 8, 12), 2)
    found = pixels(on_grid(patches, (4, 6), patches), folds=4)
    mean = patches.flatten(0, 1).mean(0)
    assert of(found, "L2 error").score < 1e-6
    assert of(found, "L2 error").chance == pytest.approx((patches - mean).norm(dim=-1).mean().item(), rel=0.02)
    assert of(found, "L2 error").count == 192
    assert of(found, "R2").score == pytest.approx(1, abs=1e-6)
    assert of(found, "R2").chance == 0
    assert of(found, "R2", "outlier").note == "not measured: no such patch"


def test_pixels_cut_the_wrong_way_are_not_told():
    images = torch.rand(8, 3, 8, 12)
    reshaped = images.reshape(8, 24, -1)
    assert of(pixels(on_grid(patchify(images, 2), (4, 6), reshaped), folds=4), "R2").score < 0.1


def test_noise_tells_no_pixels():
    found = pixels(on_grid(torch.randn(40, 6, 4), (2, 3), torch.rand(40, 6, 7)), folds=3)
    error = of(found, "L2 error")
    assert within_three(error, error.chance)
    assert within_three(of(found, "R2"), 0)


def test_a_map_and_noise_of_known_size_give_the_share_that_is_told():
    tokens = torch.randn(60, 6, 4)
    mixing = torch.linalg.qr(torch.randn(4, 4)).Q
    found = pixels(on_grid(tokens, (2, 3), tokens @ mixing + torch.randn(60, 6, 4)), folds=4)
    assert within_three(of(found, "R2"), 0.5)


def test_outliers_are_judged_against_their_own_mean_patch():
    outlier = torch.zeros(12, 6, dtype=torch.bool)
    outlier[:, 0] = True
    target, tokens = torch.randn(12, 6, 5), torch.zeros(12, 6, 6)
    target[outlier] = 7 + 0.1 * torch.randn(12, 5)  # all about the same: told by being an outlier, not by the token
    tokens[~outlier, :5] = target[~outlier]
    tokens[outlier, 5] = 50
    found = pixels(on_grid(tokens, (2, 3), target, outlier), folds=3)
    assert of(found, "R2").score > 0.9
    assert of(found, "R2", "outlier").score < 0.1
    assert of(found, "L2 error", "outlier").chance < 0.5


def test_a_kind_of_a_single_image_is_judged_against_all_patches_of_the_others():
    outlier = torch.zeros(6, 6, dtype=torch.bool)
    outlier[2, 5] = True
    target = torch.full((6, 6, 2), 3.0) + torch.tensor([[1.0], [-1.0]]).repeat(3, 2)
    patches = on_grid(torch.randn(6, 6, 4), (2, 3), target, outlier)
    found = pixels(patches, folds=3)
    error = of(found, "L2 error", "outlier")
    assert error.chance == pytest.approx(math.sqrt(2))
    assert (error.count, error.standard_error) == (1, None)
    assert of(found, "R2", "outlier").note == "not measured: the patches do not differ"
    assert of(position(patches, folds=3), "mean distance", "outlier").chance == pytest.approx(math.hypot(1, 1))


def test_patches_that_do_not_differ_have_no_variance_to_tell():
    found = pixels(on_grid(torch.randn(6, 6, 4), (2, 3), torch.ones(6, 6, 5)), folds=3)
    assert of(found, "L2 error").score == pytest.approx(0, abs=1e-6)
    assert of(found, "R2").note == "not measured: the patches do not differ"


def test_half_precision_tokens_are_taken():
    tokens = torch.eye(12).expand(6, -1, -1)
    for dtype in (torch.float16, torch.bfloat16):
        assert of(position(on_grid(tokens.to(dtype), (3, 4)), folds=3), "top-1").score == 1


def test_scores_are_of_sklearn_on_held_out_tokens():
    labels = np.array(["a", "b"])[np.arange(40) % 2]
    tokens = torch.randn(40, 3) + torch.from_numpy(np.arange(40) % 2)[:, None]
    (probe,) = classify([drawn(tokens)], labels.tolist(), folds=4, seed=5)
    # The same by hand, with the strengths tried in a plain loop.
    x, right = tokens.numpy(), 0
    for train, test in StratifiedKFold(4, shuffle=True, random_state=5).split(x, labels):
        best = (-1.0, None)
        for strength in probes.CLASSIFICATION_STRENGTHS:
            scores = []
            for fit, check in StratifiedKFold(3, shuffle=True, random_state=5).split(x[train], labels[train]):
                scores.append(
                    _accuracy(strength, x[train][fit], labels[train][fit], x[train][check], labels[train][check])[0]
                )
            if np.mean(scores) > best[0]:
                best = (np.mean(scores), strength)
        right += _accuracy(best[1], x[train], labels[train], x[test], labels[test])[1]
    assert probe.score == pytest.approx(right / 40)


def _accuracy(strength, x, y, held_out, truth):
    mean, std = x.mean(0), x.std(0)
    model = LogisticRegression(C=strength, max_iter=1000).fit((x - mean) / std, y)
    right = model.predict((held_out - mean) / std) == truth
    return right.mean(), right.sum()
